"""Training steps: odds, values, flags, replicas, ranks and recomputation.

Faults 7, 8, 9, 13, 14, 17 and 18 of the first edition, where these tests were seen red (commit 495752d).
"""

import copy
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

import sd_resnet

from ..conftest import images, make
from .observed import (
    MODES,
    NETWORKS,
    RATE,
    Case,
    Residual,
    Tiny,
    all_outcomes,
    check_factors,
    check_rows,
    check_step,
    converted,
    gradients,
    observe,
    own,
    own_end,
    replay,
    tiny,
    vit,
)
from .ranks import SCENARIOS

each_network = pytest.mark.parametrize('kind', NETWORKS)
each_mode = pytest.mark.parametrize('mode', MODES)


# Fault 7


@pytest.mark.parametrize('rescale', ['train', 'test'])
def test_a_small_rate_drops_and_keeps_the_mean_in_subset_mode(rescale):
    """Fault 7: at 16 images and p_l = 0.969, round(p_l N) = 16 rows: nothing ever dropped, and evaluation scaled."""
    p, batch, draws = 0.969, 16, 600
    case = own('subset', drop_path_rate=1 - p, drop_path_rescale=rescale)
    block = case.model.layer1[1]
    x = torch.randn(batch, 16, 4, 4, dtype=torch.float64).relu()
    block.train()
    for module in block.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    with torch.no_grad():
        survived = torch.stack([(block(x) != x).flatten(1).any(1) for _ in range(draws)]).double()
        counts = survived.sum(1)
        assert set(counts.tolist()) == {15, 16}
        error = math.sqrt(p * (1 - p) / draws)
        assert ((survived.mean(0) - p).abs() < 4 * error).all()
        block.act2 = nn.Identity()  # the mean is that of the sum
        x = x[:1].expand(batch, -1, -1, -1).contiguous()
        whole = block.eval()(x)[0]
        block.train()
        for module in block.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        mean = torch.stack([block(x).mean(0) for _ in range(draws)]).mean(0)
    share = p * batch % 1  # how often k is the larger number
    error = (whole - x[0]).abs() / p / batch * math.sqrt(share * (1 - share) / draws)
    assert ((mean - whole).abs() <= 4 * error + 1e-9).all()


# Fault 8


class InPlace(Residual):
    """Adds into what it was given."""

    def forward(self, x):
        x += self.drop_path(self.f(x))
        return x


class InPlaceByMethod(Residual):
    def forward(self, x):
        return x.add_(self.drop_path(self.f(x)))


class InPlaceAfterView(Residual):
    def forward(self, x):
        out = x.view_as(x)
        out += self.drop_path(self.f(x))
        return out


class Twice(Residual):
    """Two branches."""

    def __init__(self, width=8):
        super().__init__(width)
        self.g = nn.Conv2d(width, width, 1)
        self.drop_path2 = DropPath(0.0)

    def forward(self, x):
        x = x + self.drop_path(self.f(x))
        return x + self.drop_path2(self.g(x))


class InPlaceTwice(Twice):
    def forward(self, x):
        x += self.drop_path(self.f(x))
        x += self.drop_path2(self.g(x))
        return x


class ChangedBefore(Residual):
    """Changes its input in another way, too."""

    def forward(self, x):
        x.mul_(0.5)
        return x + self.drop_path(self.f(x))


@each_mode
@pytest.mark.parametrize(
    'block', [InPlace, InPlaceByMethod, InPlaceAfterView, InPlaceTwice, ChangedBefore], ids=lambda block: block.__name__
)
def test_a_branch_that_is_added_into_its_input_is_scaled_or_refused(block, mode):
    """Fault 8: batch mode took the shortcut for what it had become, and trained unscaled."""
    model = Tiny(block)
    try:
        done = sd_resnet.convert(model, RATE, 'uniform', mode, input_size=(3, 32, 32))
    except ValueError as error:
        if 'blocks.0' not in str(error):
            raise
        return
    twin = {InPlaceTwice: Twice, ChangedBefore: ChangedBefore}.get(block, Residual)  # of which all can be trained
    (plain := Tiny(twin)).load_state_dict(model.state_dict())
    slots = ['drop_path', 'drop_path2'] if twin is Twice else ['drop_path']
    whole = [name for name in ('blocks.0', 'blocks.1', 'blocks.2') if name not in done.survival_probs]
    try:
        dropped, _ = check_step(Case(model, plain, twin, slots, whole), seeds=range(8))
    except RuntimeError as error:  # torch's own, that the network gets as it was
        if mode != 'row' or 'modified by an inplace operation' not in str(error):
            raise
        sd_resnet.unconvert(model)
        with pytest.raises(RuntimeError, match='modified by an inplace operation'):
            model(images(2, dtype=torch.float64)).sum().backward()
        return
    assert dropped or len(whole) == 3


@each_mode
def test_a_branch_that_is_added_in_place_keeps_the_network_in_evaluation_and_at_rate_0(mode):
    """Fault 8."""
    plain = Tiny(InPlace)
    model = copy.deepcopy(plain)
    x = images(4)
    try:
        sd_resnet.convert(model, RATE, 'uniform', mode, input_size=(3, 32, 32))
    except ValueError as error:
        if 'blocks.0' not in str(error):
            raise
    assert torch.equal(model.eval()(x), plain.eval()(x))
    sd_resnet.unconvert(model)
    assert torch.equal(model.train()(x), plain.train()(x))


# Fault 9


def drop_paths(model):
    return [module for module in model.modules() if isinstance(module, DropPath)]


@each_mode
@each_network
def test_drop_paths_alone_in_training_drop(kind, mode):
    """Fault 9: Monte Carlo dropout puts a network in evaluation, and only what draws in training."""
    case = NETWORKS[kind](mode)
    for module in case.model.modules():
        module.training = isinstance(module, DropPath)
    dropped, total = check_step(case, seeds=range(8))
    assert 0.2 < dropped / total < 0.6
    case.model.eval()
    x = images(3, dtype=torch.float64)
    assert torch.equal(case.model(x), case.plain(x))


@each_mode
@each_network
@pytest.mark.parametrize('norms', ['in evaluation', 'in training'])
def test_drop_paths_in_evaluation_drop_nothing(norms, kind, mode):
    """Fault 9: who fine-tunes without dropping sets `drop_path.eval()` in a network that trains."""
    case = NETWORKS[kind](mode)
    if norms == 'in training':
        case.model.train(), case.plain.train()
    assert drop_paths(case.model)
    for module in drop_paths(case.model):
        module.eval()
    x = images(4, dtype=torch.float64)
    for seed in range(4):
        torch.manual_seed(seed)
        out, expected = case.model(x), case.plain(x)
        torch.testing.assert_close(out, expected)
        found, wanted = gradients(case.model, out), gradients(case.plain, expected)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, wanted[name])
    for name, value in case.plain.named_buffers():
        torch.testing.assert_close(dict(case.model.named_buffers())[name], value)


@each_mode
@pytest.mark.parametrize('build', [own, converted, tiny], ids=['own', 'converted', 'tiny'])
def test_one_drop_path_in_evaluation_keeps_its_block_and_no_other(build, mode):
    """Fault 9, block by block."""
    case = build(mode)
    name = case.blocks[1]
    case.model.get_submodule(name).drop_path.eval()
    case.whole.add(name)
    dropped, _ = check_step(case, seeds=range(6))
    assert dropped


@each_mode
def test_a_frozen_stage_of_an_own_network_does_not_drop(mode):
    """Fault 9: `model.layer1.eval()` while the rest trains, as detectors freeze stages."""
    case = own(mode)
    case.model.layer1.eval()
    case.whole |= {'layer1.0', 'layer1.1'}
    dropped, _ = check_step(case)
    assert dropped


# Fault 13: on two ranks, in ranks.py


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory):
    """What each of two gloo ranks saw, by scenario; one that failed fails alone."""
    folder = tmp_path_factory.mktemp('ranks')
    outs = [folder / f'{rank}.json' for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, '-m', 'tests.faults.ranks', folder / 'store', str(rank), outs[rank]],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [rank.communicate(timeout=250)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], '\n'.join(said)[-3000:]
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.parametrize('scenario', SCENARIOS)
def test_an_extra_pass_on_one_rank_shifts_nothing(two_ranks, scenario):
    """Fault 13: one rank looks at its images once more, and from then on the ranks drop different blocks for ever."""
    first, second = (rank[scenario] for rank in two_ranks)
    assert 'error' not in first, first['error']
    assert 'error' not in second, second['error']
    assert first['dropped'] == second['dropped']
    drawn = [step for step in first['dropped'] if any(step)]
    assert drawn
    assert len({tuple(step) for step in first['dropped']}) > 1


# Fault 14


def replicas(network, count=2):
    """As `torch.nn.parallel.replicate` makes them in every step, but on one CPU."""
    modules = list(network.modules())
    index = {module: place for place, module in enumerate(modules)}
    made = []
    for number in range(count):
        copies = [module._replicate_for_data_parallel() for module in modules]
        for module, replica in zip(modules, copies):
            replica._former_parameters = {}
            for name, child in module._modules.items():
                if child is None:
                    replica._modules[name] = None
                else:
                    setattr(replica, name, copies[index[child]])
            for name, parameter in module._parameters.items():
                if parameter is None:
                    replica._parameters[name] = None
                else:
                    taken = parameter.view_as(parameter)
                    setattr(replica, name, taken)
                    replica._former_parameters[name] = taken
            for name, buffer in module._buffers.items():
                # The first replica is on the network's own device, and has its own buffers
                replica._buffers[name] = buffer if buffer is None or number == 0 else buffer.clone()
        made.append(copies[0])
    return made


@each_mode
@each_network
def test_replicas_drop_and_their_gradients_arrive(kind, mode):
    """Fault 14: what `DataParallel` trains are copies without parameters, made anew in every step."""
    case = NETWORKS[kind](mode)
    x = images(10, dtype=torch.float64)
    dropped = 0
    for seed in range(3):
        torch.manual_seed(seed)
        case.model.zero_grad()
        expected = {}
        for part, replica in zip(x.chunk(2), replicas(case.model)):
            step = observe(Case(replica, case.plain, case.kind, case.slots, case.whole), part)
            check_factors(case, step)
            step.out.square().mean().backward()
            dropped += step.dropped
            for name, gradient in replay(case, step.factors, part)[1].items():
                expected[name] = expected.get(name, 0) + gradient
        for name, parameter in case.model.named_parameters():
            if parameter.grad is None:  # `DataParallel` itself makes zeros of it
                assert not expected[name].any()
            else:
                torch.testing.assert_close(parameter.grad, expected[name])
    assert dropped


@each_mode
@each_network
def test_replicas_run_beside_each_other(kind, mode):
    """Fault 14: `DataParallel` runs them in threads, and what one has drawn is nothing to the other."""
    case = {**NETWORKS, 'own': own_end}[kind](mode)
    x = images(10, dtype=torch.float64)
    outcomes, drawn, errors = all_outcomes(case, x), set(), []

    def run(replica, part, whole):
        try:
            for _ in range(8):
                drawn.add(tuple(check_rows(replica(part), whole)))
        except Exception as error:
            errors.append(error)

    often = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        parts = zip(replicas(case.model), x.chunk(2), outcomes.chunk(2, dim=1))
        threads = [threading.Thread(target=run, args=part) for part in parts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(often)
    assert not errors, errors
    assert len(drawn) > 1


@each_mode
@pytest.mark.parametrize('build', [own, converted, vit], ids=['own', 'converted', 'vit'])
def test_a_ramp_is_refused_in_replicas_which_cannot_count_steps(build, mode):
    """Fault 14: the step was counted in a copy and lost with it, so that a warm-up stayed at 0 for ever."""
    ramp = {'ramp' if build is converted else 'drop_path_ramp': ('warmup', 4)}
    case = build(mode, **ramp)
    for replica in replicas(case.model, 2):
        with pytest.raises(RuntimeError, match='drop_path_ramp must be None under DataParallel'):
            replica(images(5, dtype=torch.float64))


# Fault 17


@pytest.mark.parametrize('build', ['own', 'own, test', 'converted'])
@each_mode
def test_statistics_are_estimated_without_dropping_and_the_rate_comes_back(mode, build):
    """Fault 17: `update_bn` over a network that drops leaves blocks that never ran with fresh statistics."""
    plain = make('resnet18', dtype=torch.float64)
    batches = [images(4, dtype=torch.float64) for _ in range(3)]
    if build == 'converted':
        model = copy.deepcopy(plain)

        def set_rate(rate):
            sd_resnet.convert(model, rate, 'uniform', mode, input_size=(3, 32, 32))

        set_rate(0.5)
    else:
        options = dict(drop_path_rate=0.5, drop_path_schedule='uniform')
        options.update({'drop_path_rescale': 'test'} if 'test' in build else {})
        model = make('sd_resnet18', dtype=torch.float64, drop_path_mode=mode, **options)
        model.load_state_dict(plain.state_dict())

        def set_rate(rate):
            model.set_drop_path(rate=rate)

    before = {k: v.clone() for k, v in model.state_dict().items()}
    set_rate(0)
    update_bn(batches, model.train())
    set_rate(0.5)
    update_bn(batches, plain.train())
    after, wanted = model.state_dict(), plain.state_dict()
    assert after.keys() == before.keys()
    for name, value in wanted.items():
        if 'running' in name or 'tracked' in name:
            torch.testing.assert_close(after[name], value)
        elif 'test' not in build:
            assert torch.equal(after[name], value)  # bit for bit
    x = images(4, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))
    assert len({model.train()(x).sum().item() for _ in range(8)}) > 1


# Fault 18


class Ahead(nn.Module):
    """A network that recomputes in a way of its own, as training loops do."""

    def __init__(self, network, **options):
        super().__init__()
        self.network, self.options = network, options

    def forward(self, x):
        return checkpoint(self.network.blocks, self.network.stem(x), use_reentrant=False, **self.options).mean((2, 3))


def _right_or_refused(model, x, options, between, seed=3):
    """Gradients with recomputation are those without, or the backward pass raises."""
    twin = copy.deepcopy(model)
    torch.manual_seed(seed)
    twin.blocks(twin.stem(x)).mean((2, 3)).square().sum().backward()
    wanted = [p.grad for p in twin.blocks.parameters()]
    torch.manual_seed(seed)
    out = Ahead(model, **options)(x)
    between()
    try:
        out.square().sum().backward()
    except RuntimeError:
        return 'refused'
    for parameter, gradient in zip(model.blocks.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, gradient)
    return 'right'


@each_mode
def test_a_recomputation_from_another_state_of_the_generator_raises(mode):
    """Fault 18: with `preserve_rng_state=False` a step was recomputed with other draws, and gradients were wrong."""
    for seed in range(6):
        case = tiny(mode, ramp=('early', 1000))
        _right_or_refused(
            case.model, images(4, dtype=torch.float64), {'preserve_rng_state': False}, lambda: torch.rand(7), seed
        )


@each_mode
def test_a_recomputation_long_after_its_step_has_the_rates_of_the_step_or_raises(mode):
    """Fault 18: what a step had drawn was forgotten after some thousands of others."""
    case = tiny(mode, ramp=('warmup', 6))
    other, x = images(1, dtype=torch.float64), images(5, dtype=torch.float64)
    for _ in range(4):
        case.model(x)

    def later():
        blocks, small = case.model.blocks, case.model.stem(other)
        with torch.no_grad():
            for _ in range(6000):  # of three blocks
                blocks(small)

    _right_or_refused(case.model, x, {}, later)


@each_mode
@each_network
def test_checkpointed_steps_have_the_gradients_of_what_they_drew(kind, mode):
    """Fault 18: and where nothing is amiss, nothing raises; two passes before either is sent back, too."""
    case = NETWORKS[kind](mode)
    x = images(5, dtype=torch.float64)
    model, plain = case.model, case.plain
    if kind == 'tiny':
        wrapped = lambda x: model.head(checkpoint(model.blocks, model.stem(x), use_reentrant=False).mean((2, 3)))  # noqa: E731
    else:
        model.set_grad_checkpointing(True)
        wrapped = model
    steps = []
    for seed in range(2):
        torch.manual_seed(seed)
        steps.append(observe(case, x, model=wrapped))
    for step in reversed(steps):
        out, expected = replay(case, step.factors, x)
        torch.testing.assert_close(step.out.detach(), out)
        for name, gradient in gradients(model, step.out).items():
            torch.testing.assert_close(gradient, expected[name])
    assert plain is case.plain
