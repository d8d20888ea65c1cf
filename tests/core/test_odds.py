"""Odds: at every batch size each sample's branch survives with its p_l, and training has the mean of the whole branch.

What breaks without: a published recipe means another network here, and one is trained that is not the one evaluated.

Survival is seen from outside. Each block of a small network adds a number to a channel of its own, so that one row of
the output tells which blocks have survived for it. The bounds are four standard errors with a fixed seed; over the
whole file about a thousand numbers are compared so, of which 0.06 would be outside by chance.
"""

import math

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import sd_resnet

from ..conftest import NARROW

PROBS = (0.03, 0.5, 0.969)
BLOCKS = 6  # two of each probability
DRAWS = 20_000
SIZES = (1, 2, 3, 7, 16)
MODES = ('batch', 'subset', 'row')


class Branch(nn.Module):
    """A linear branch: the first channel, which nobody changes, times a weight, into the block's own channel."""

    def __init__(self, block):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(float(block + 1)))
        self.register_buffer('own', torch.eye(1 + BLOCKS)[1 + block].view(-1, 1, 1), persistent=False)

    def forward(self, x):
        return x[:, :1] * (self.own * self.weight)


class Block(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.branch = Branch(block)
        self.drop_path = DropPath(0.0)

    def forward(self, x):
        return x + self.drop_path(self.branch(x))


class Once(nn.Module):
    """A stem, or a projection, that changes nothing."""

    def forward(self, x):
        return x * 1


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Once()
        self.blocks = nn.Sequential(*(Block(index) for index in range(BLOCKS)))

    def forward(self, x):
        return self.blocks(self.stem(x)).mean((2, 3))


def own(mode, rescale='train'):
    """`sd_resnet18` with such branches, and nothing else; some of its blocks keep a projection."""
    model = timm.create_model(
        'sd_resnet18',
        layers=(2, 2, 1, 1),
        drop_path_mode=mode,
        drop_path_schedule=PROBS * 2,
        drop_path_rescale=rescale,
        **NARROW,
    )
    model.conv1, model.bn1, model.act1, model.maxpool = (nn.Identity() for _ in range(4))
    model.fc = nn.Identity()
    for index, block in enumerate(model.blocks()):
        block.conv1 = Branch(index)
        block.bn1, block.act1, block.conv2, block.bn2 = (nn.Identity() for _ in range(4))
        if block.downsample is not None:
            block.downsample = Once()
    return model.train()


def converted(mode):
    model = Network()
    sd_resnet.convert(model, None, PROBS * 2, mode, input_size=(1 + BLOCKS, 4, 4))
    return model.train()


NETWORKS = {'own': own, 'converted': converted}


def start(batch):
    """Images whose only channel of ones is the first."""
    x = torch.zeros(batch, 1 + BLOCKS, 4, 4)
    x[:, 0] = 1
    return x


def record(forward, batch, steps, seed=0):
    """What every block added, in units of its branch: (steps, batch, blocks)."""
    torch.manual_seed(seed)
    x = start(batch)
    with torch.no_grad():
        outs = torch.stack([forward(x) for _ in range(steps)])
    assert (outs[..., 0] == 1).all()
    return outs[..., 1:] / torch.arange(1.0, 1 + BLOCKS)


def check_odds(added, mode, rescale='train'):
    """Each row survives with p_l, the mean is that of the undropped branch, and nothing else is ever added."""
    batch = added.shape[1]
    for index, p in enumerate(PROBS):
        both = torch.cat([added[..., index], added[..., index + len(PROBS)]])  # (draws, batch)
        draws = len(both)
        factor = 1 / p if rescale == 'train' else 1.0
        survived = both != 0
        torch.testing.assert_close(both, survived * factor, msg=f'p_l {p}: another factor')
        error = math.sqrt(p * (1 - p) / draws)
        share = survived.double().mean(0)
        assert ((share - p).abs() <= 4 * error).all(), f'p_l {p}: {share.tolist()}'
        mean = both.double().mean(0)
        whole = 1.0 if rescale == 'train' else p  # what evaluation adds
        assert ((mean - whole).abs() <= 4 * error * factor + 1e-6).all(), f'p_l {p}: {mean.tolist()}'
        counts = set(survived.sum(1).tolist())
        if mode == 'subset':
            assert counts <= {math.floor(p * batch + 1e-9), math.floor(p * batch + 1e-9) + 1}
            assert abs(survived.sum(1).double().mean() - p * batch) <= 4 * math.sqrt(0.25 / draws)
        elif mode == 'batch':
            assert counts <= {0, batch}


@pytest.mark.parametrize('batch', SIZES)
@pytest.mark.parametrize('build', NETWORKS.values(), ids=NETWORKS)
def test_each_row_survives_with_p_l_in_subset_mode_at_every_batch_size(build, batch):
    check_odds(record(build('subset'), batch, DRAWS // 2), 'subset')


@pytest.mark.parametrize('batch', SIZES)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', NETWORKS)
def test_blocks_of_probability_1_always_survive(kind, mode, batch):
    """Among others that drop, and alone."""
    for probs in ([1.0, 0.5] * 3, [1.0] * 6):
        model = NETWORKS[kind](mode)
        if kind == 'own':
            model.set_drop_path(schedule=probs)
        else:
            sd_resnet.convert(model, None, probs, mode, input_size=(1 + BLOCKS, 4, 4))
        added = record(model.train(), batch, 100)
        assert (added[..., [0, 2, 4]] == 1).all()
        assert bool((added == 1).all()) == (min(probs) == 1)


@pytest.mark.parametrize(('mode', 'batch'), [('batch', 2), ('row', 3)])
@pytest.mark.parametrize('build', NETWORKS.values(), ids=NETWORKS)
def test_each_row_survives_with_p_l_in_the_other_modes(build, mode, batch):
    check_odds(record(build(mode), batch, DRAWS // 8), mode)


@pytest.mark.parametrize(('mode', 'batch'), [('batch', 2), ('subset', 1), ('subset', 7), ('row', 3)])
def test_unscaled_rows_have_the_mean_of_evaluation(mode, batch):
    """Under `drop_path_rescale='test'`: what is trained on average is what is evaluated."""
    model = own(mode, 'test')
    check_odds(record(model, batch, DRAWS // 8), mode, 'test')
    with torch.no_grad():
        evaluated = model.eval()(start(batch))[:, 1:] / torch.arange(1.0, 1 + BLOCKS)
    torch.testing.assert_close(evaluated, torch.tensor(PROBS * 2).expand(batch, -1))


@pytest.mark.parametrize('build', NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize('mode', MODES)
def test_evaluation_is_unscaled_under_train_time_rescaling(mode, build):
    with torch.no_grad():
        evaluated = build(mode).eval()(start(3))[:, 1:] / torch.arange(1.0, 1 + BLOCKS)
    torch.testing.assert_close(evaluated, torch.ones(3, BLOCKS))


@pytest.fixture
def _compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures('_compiler')
@pytest.mark.parametrize(('mode', 'batch'), [('subset', 1), ('subset', 3), ('subset', 16), ('row', 3), ('batch', 2)])
@pytest.mark.parametrize('build', NETWORKS.values(), ids=NETWORKS)
def test_compiled_networks_have_the_same_odds(build, mode, batch):
    """Also where a graph's shapes are fixed, so that the number of rows cannot be drawn."""
    compiled = torch.compile(build(mode), backend='eager')
    check_odds(record(compiled, batch, 500 if mode == 'batch' else 1500), mode)


@pytest.mark.usefixtures('_compiler')
@pytest.mark.parametrize('rescale', ['train', 'test'])
def test_compiled_gradients_have_the_mean_of_the_whole_branch(rescale):
    """Under `'test'` too, where no factor makes up for a masked row."""
    model = own('subset', rescale)
    compiled = torch.compile(model, backend='aot_eager')
    check_gradients(model, compiled, 3, 600, rescale)


@pytest.mark.parametrize('build', NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize('mode', MODES)
def test_gradients_have_the_mean_of_the_whole_branch(mode, build):
    model = build(mode)
    check_gradients(model, model, 3, 600)


def check_gradients(model, forward, batch, steps, rescale='train'):
    """The gradient of a branch's weight is its mean over rows: the same odds, seen from behind. Never None."""
    torch.manual_seed(1)
    x = start(batch)
    weights = [module.weight for module in model.modules() if isinstance(module, Branch)]
    rows = []
    for _ in range(steps):
        model.zero_grad()
        out = forward(x)
        out.sum().backward()
        gradients = torch.stack([weight.grad for weight in weights])
        torch.testing.assert_close(gradients * torch.arange(1.0, 1 + BLOCKS), out.detach()[:, 1:].sum(0))
        rows.append(gradients)
    rows = torch.stack(rows)
    assert (rows == 0).any()
    for index, p in enumerate(PROBS):
        both = torch.cat([rows[:, index], rows[:, index + len(PROBS)]]).double()
        whole = batch if rescale == 'train' else p * batch
        error = (batch / p if rescale == 'train' else batch) * math.sqrt(p * (1 - p) / len(both))
        assert abs(both.mean() - whole) <= 4 * error + 1e-5


@pytest.mark.parametrize('build', NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize('batch', [1, 2, 16])
def test_branches_that_no_row_survives_in_have_zero_gradients(batch, build):
    """Not None: weight decay and momentum act, and DistributedDataParallel would wait."""
    model = build('subset')
    branches = [module for module in model.modules() if isinstance(module, Branch)]
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=True)
        out = model(start(batch))
        out.sum().backward()
        for index, branch in enumerate(branches):
            survived = bool(out[:, 1 + index].any())
            assert branch.weight.grad is not None
            assert bool(branch.weight.grad) == survived
            seen.add(survived)
    assert seen == {True, False}


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('build', NETWORKS.values(), ids=NETWORKS)
def test_blocks_and_steps_are_independent(build, mode):
    """Else some sub-networks would never be trained. Blocks of p_l 0.5 are compared, row by row."""
    survived = (record(build(mode), 3, 3000)[..., [1, 4]] != 0).double()
    steps = len(survived)
    one, other = survived[..., 0], survived[..., 1]
    error = math.sqrt(0.25 * 0.75 / steps)
    for a, b in [(one, other), (one[1:], one[:-1]), (one[1:], other[:-1]), (one[2:], one[:-2])]:
        assert (((a * b).mean(0) - 0.25).abs() <= 4 * error).all()
        rolled = (a * b.roll(1, 1)).mean(0)
        assert ((rolled - 0.25).abs() <= 4 * error).all()


class Normed(nn.Module):
    """A block whose norm would fail on a single value per channel."""

    def __init__(self):
        super().__init__()
        self.f = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.drop_path = DropPath(0.0)

    def forward(self, x):
        return x + self.drop_path(self.f(x))


@pytest.mark.parametrize('kind', ['own', 'converted'])
@pytest.mark.parametrize(('batch', 'p'), [(2, 0.5), (2, 0.2), (3, 0.3), (5, 0.1)])
def test_rows_survive_with_p_l_where_batchnorm_would_see_a_single_value(batch, p, kind):
    """The last stage of a small image, and the last, smaller batch of an epoch."""
    if kind == 'own':
        model = timm.create_model(
            'sd_resnet18',
            drop_path_rate=1 - p,
            drop_path_schedule='uniform',
            drop_path_mode='subset',
            zero_init_last=False,
            **NARROW,
        )
        block = model.layer1[1].train()
        x = torch.rand(batch, 16, 1, 1)
    else:
        model = nn.Sequential(Once(), Normed())
        sd_resnet.convert(model, 1 - p, 'uniform', 'subset', input_size=(4, 1, 1))
        block = model[1].train()
        x = torch.rand(batch, 4, 1, 1)
    draws = 3000
    torch.manual_seed(0)
    with torch.no_grad():
        survived = sum((block(x) != x).flatten(1).any(1).double() for _ in range(draws)) / draws
    assert ((survived - p).abs() <= 4 * math.sqrt(p * (1 - p) / draws)).all()
    assert all(buffer.isfinite().all() for buffer in block.buffers())
