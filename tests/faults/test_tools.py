"""Tools that set attributes, script, convert back, count and copy functions.

Faults 19, 20 and 21 of the first edition, where these tests were seen red (commit 495752d).
"""

import copy
import functools
import inspect

import pytest
import timm
import torch
from torch import nn

import sd_resnet
from sd_resnet.analysis.costs import model_cost

from ..conftest import NARROW, images, make
from .observed import MODES, NETWORKS, RATE, Case, Residual, Tiny, check_step, own

each_network = pytest.mark.parametrize('kind', NETWORKS)
each_mode = pytest.mark.parametrize('mode', MODES)


# Fault 19


def set_back(module, among):
    """What copying and sharding tools do with whatever they find; methods they leave."""
    for name in among:
        if name.startswith('__'):
            continue
        try:
            value = getattr(module, name)
        except AttributeError:
            continue
        if not inspect.isroutine(value):
            setattr(module, name, value)


@each_mode
@each_network
@pytest.mark.parametrize('found', ['dir', 'vars'])
def test_every_attribute_can_be_set_to_what_it_is(found, kind, mode):
    """Fault 19: `expected_depth` had no setter."""
    case = NETWORKS[kind](mode)
    keys = list(case.model.state_dict())
    for module in case.model.modules():
        set_back(module, dir(module) if found == 'dir' else list(vars(module)))
    dropped, _ = check_step(case.train())
    assert dropped
    x = images(2, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(case.model.eval()(x), case.plain(x))
    assert list(case.model.state_dict()) == keys


@pytest.mark.parametrize('rescale', ['train', 'test'])
def test_every_attribute_can_be_set_under_both_rescalings_and_with_a_ramp(rescale):
    """Fault 19."""
    ramp = {'drop_path_ramp': ('early', 5)} if rescale == 'train' else {}
    model, x = make('sd_resnet18', drop_path_rescale=rescale, drop_path_rate=0.5, **ramp), images(2)
    with torch.no_grad():
        expected = model(x)
    probs, state = model.survival_probs, copy.deepcopy(model.state_dict())
    for module in model.modules():
        set_back(module, dir(module))
    assert model.survival_probs == probs
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model.eval()(x), expected)


# Fault 20


class Encoder(nn.Module):
    """As segmentation libraries wrap a network."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return [x] + self.model(x)


@pytest.mark.parametrize('rescale', [None, 'test'])
@each_mode
def test_features_are_scripted(mode, rescale):
    """Fault 20: an f-string in `forward_intermediates`. timm's `resnet18` is scripted so."""
    options = dict(features_only=True, **NARROW)
    rescale = {} if rescale is None else {'drop_path_rescale': rescale}
    model = timm.create_model('sd_resnet18', drop_path_mode=mode, **options, **rescale).eval()
    x = images(2)
    scripted = torch.jit.script(Encoder(model))
    for found, expected in zip(scripted(x), [x, *model(x)], strict=True):
        torch.testing.assert_close(found, expected)
    plain = torch.jit.script(Encoder(timm.create_model('resnet18', **options).eval()))
    assert [f.shape for f in plain(x)] == [f.shape for f in scripted(x)]


@each_network
def test_networks_are_scripted_in_evaluation(kind):
    """Fault 20's neighbours, to be kept."""
    case = NETWORKS[kind]('batch')
    model, x = case.model.eval(), images(2, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(model)(x), case.plain(x))


# Fault 21


WRAPPERS = {
    'module': Encoder,
    'sequential': lambda model: nn.Sequential(nn.Identity(), model),
    'parallel': nn.DataParallel,
    'compiled': lambda model: torch.compile(model, backend='eager'),
    'twice': lambda model: Encoder(nn.ModuleDict({'a': model, 'b': copy.deepcopy(model)})),
}


@each_mode
@pytest.mark.parametrize('ramp', [None, ('warmup', 3)], ids=['', 'ramp'])
@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_converting_back_through_a_wrapper_leaves_no_trace(wrap, ramp, mode):
    """Fault 21: the ramp's key and a hook stayed on the network inside."""
    plain = Tiny()
    model = copy.deepcopy(plain)
    untouched = _traces(wrap(copy.deepcopy(plain)))
    sd_resnet.convert(model, RATE, 'uniform', mode, input_size=(3, 32, 32), ramp=ramp)
    wrapper = wrap(model)
    sd_resnet.unconvert(wrapper)
    assert _traces(wrapper) == untouched
    x = images(3)
    assert torch.equal(model.train()(x), plain.train()(x))
    model.load_state_dict(plain.state_dict())


def _traces(model):
    hooks = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_load_state_dict_pre_hooks')
    return [
        (name, type(module), sorted(vars(module)), [len(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    ], list(model.state_dict())


def test_a_part_is_converted_back_without_the_rest():
    """Fault 21, from the other side: a ramp counts on for what is still converted."""
    model = Tiny()
    sd_resnet.convert(model, RATE, 'uniform', input_size=(3, 32, 32))
    sd_resnet.unconvert(model.blocks[1])
    plain = copy.deepcopy(model)
    sd_resnet.unconvert(plain)
    case = Case(model, plain, Residual, ['drop_path'], ['blocks.1'])
    dropped, _ = check_step(case, seeds=range(6))
    assert dropped


class Pooled(nn.Module):
    """A block whose branch no counter of FLOPs sees."""

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1)
        self.drop_path = nn.Identity()

    def forward(self, x):
        return x + self.drop_path(self.pool(x) - x)


def test_a_block_without_counted_operations_costs_nothing():
    """Fault 21: KeyError in `info` and `bench`."""
    model = Tiny(Pooled)
    model.pretrained_cfg = {'input_size': (3, 32, 32), 'architecture': 'tiny'}
    done = sd_resnet.convert(model, RATE, 'uniform', input_size=(3, 32, 32))
    assert len(done.survival_probs) == 3
    cost = model_cost(model, 32)
    assert [block.branch_flops for block in cost.blocks] == [0, 0, 0]
    assert cost.other_flops == cost.flops > 0
    assert cost.expected_share == pytest.approx(1)


class KeywordOnly(Residual):
    def forward(self, x, *, scale=2.0):
        return x + self.drop_path(self.f(x) * scale)


class Positional(Residual):
    def forward(self, x, scale=2.0, shift=0.5):
        return x + self.drop_path(self.f(x) * scale + shift)


def _doubled(forward):
    @functools.wraps(forward)
    def doubled(self, *args, **kwargs):
        return forward(self, *args, **{'scale': 2.0, **kwargs})

    return doubled


class Decorated(Residual):
    @_doubled
    def forward(self, x, scale):
        return x + self.drop_path(self.f(x) * scale)


class Partial(Residual):
    def scaled(self, scale, x):
        return x + self.drop_path(self.f(x) * scale)

    forward = functools.partialmethod(scaled, 2.0)


class Inherited(KeywordOnly):
    def forward(self, x):
        return super().forward(x, scale=3.0)


SIGNATURES = [KeywordOnly, Positional, Decorated, Partial, Inherited]


@each_mode
@pytest.mark.parametrize(
    ('block', 'compiled'),
    [*((block, False) for block in SIGNATURES), *((block, True) for block in SIGNATURES if block is not Partial)],
)  # torch does not compile a partial method
def test_a_block_keeps_its_defaults(block, compiled, mode):
    """Fault 21: the twin of a function for the compiler had lost its keyword-only defaults."""
    torch._dynamo.reset()
    plain = Tiny(block)
    model = copy.deepcopy(plain)
    sd_resnet.convert(model, RATE, 'uniform', mode, input_size=(3, 32, 32))
    case = Case(model, plain, block, ['drop_path'])
    if compiled:
        for block in case.model.blocks:
            block.compile(backend='eager')
    dropped, _ = check_step(case, seeds=range(6))
    assert dropped
    torch._dynamo.reset()


@each_mode
def test_a_block_class_derived_from_ours_keeps_its_defaults(mode):
    """Fault 21, in an own network: methods with keyword-only arguments."""
    case = own(mode)
    kind = type(case.model.layer1[0])

    class Derived(kind):
        def shortcut(self, x, *, scale=1.0):
            return super().shortcut(x) * scale

        def branch(self, x, *, scale=1.0):
            return super().branch(x) * scale

    for block in case.model.modules():
        if type(block) is kind:
            block.__class__ = Derived
    dropped, _ = check_step(case, seeds=range(5))
    assert dropped
