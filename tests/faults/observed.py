"""Which rows survived a training step, found from outside, and the same step of timm's own network.

Nothing here knows how the package draws. A block's output is compared with what timm's block of the same weights gives
for every outcome of its drop paths; then timm's whole network runs with those outcomes as masks in the places of its
drop paths. What a user gets must be that, forward and backward.

Norms are in evaluation, so that a row depends on its own outcome alone; all is in float64.
"""

import copy
import itertools
import re

import timm
import torch
from timm.layers import DropPath
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import sd_resnet

from ..conftest import images, make

RATE = 0.4  # of every block
P = 1 - RATE
ROWS = 5  # subset mode runs on three of them; test_odds.py has the sizes where that number is drawn
CLOSE = 1e-8
MODES = ('batch', 'subset', 'row')
VIT = dict(img_size=32, embed_dim=24, depth=3, num_heads=2, num_classes=10)


class Times(nn.Module):
    """In a drop path's place: each row times a number."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        factor = torch.as_tensor(self.factor, dtype=x.dtype)
        return x * factor.view(-1, *[1] * (x.dim() - 1))


class InTurn(nn.Module):
    """The same where a drop path is called several times in a pass."""

    def __init__(self, factors):
        super().__init__()
        self.factors, self.calls = factors, 0

    def forward(self, x):
        factor = self.factors[self.calls % len(self.factors)]
        self.calls += 1
        return Times(factor)(x)


def put(block, slots, factors):
    """A factor for each branch in the places of its drop paths; one that is called twice is named twice."""
    for slot in dict.fromkeys(slots):
        its = [factor for other, factor in zip(slots, factors) if other == slot]
        setattr(block, slot, InTurn(its) if len(its) > 1 else Times(its[0]))


class Residual(nn.Module):
    """A hand-written block, as in anybody's repository."""

    def __init__(self, width=8):
        super().__init__()
        self.f = nn.Conv2d(width, width, 3, padding=1)
        self.drop_path = DropPath(0.0)

    def forward(self, x):
        return x + self.drop_path(self.f(x))


class Tiny(nn.Module):
    """Three hand-written blocks between a stem and a head."""

    def __init__(self, block=Residual):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, 8)
        self.blocks = nn.Sequential(block(), block(), block())
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Case:
    """A network that drops, and timm's own one of the same weights.

    Attributes:
        model: Drops each block at `RATE`; in training, its norms in evaluation.
        plain: timm's, or the hand-written one, without dropping; in evaluation.
        blocks: Names of the blocks in both.
        whole: Those of them that never drop.
        slots: Names of a block's drop paths.
    """

    def __init__(self, model, plain, kind, slots, whole=()):
        self.model, self.plain = model.double(), plain.double().eval()
        self.kind, self.slots, self.whole = kind, slots, set(whole)
        self.train()

    @property
    def blocks(self):
        return [name for name, module in self.plain.named_modules() if isinstance(module, self.kind)]

    def train(self):
        self.model.train()
        for module in self.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


def plain_resnet(**kwargs):
    return make('resnet18', **kwargs)


def own(mode='batch', layers=(2, 2, 2, 2), **kwargs):
    """`sd_resnet18`, narrow."""
    return own_kind('resnet18', {'layers': layers}, mode, **kwargs)


def own_kind(name, shape, mode='batch', **kwargs):
    """Any of timm's ResNets, narrow."""
    plain = make(name, **shape)
    options = {'drop_path_rate': RATE, 'drop_path_schedule': 'uniform', 'drop_path_rescale': 'train', **kwargs}
    model = make(f'sd_{name}', drop_path_mode=mode, **shape, **options)
    model.load_state_dict(plain.state_dict(), strict='drop_path_ramp' not in kwargs)
    return Case(model, plain, (BasicBlock, Bottleneck), ['drop_path'])


def own_end(mode='batch'):
    """The same, whose last three blocks alone drop: it has fewer outcomes."""
    case = own(mode, drop_path_rate=None, drop_path_schedule=[1.0] * 5 + [P] * 3)
    case.whole = set(case.blocks[:5])
    return case


def converted(mode='subset', layers=(2, 2, 2, 2), **kwargs):
    """timm's `resnet18`, narrow, converted."""
    plain = plain_resnet(layers=layers)
    return _convert(plain, mode, timm.models.resnet.BasicBlock, ['drop_path'], **kwargs)


def vit(mode='subset', **kwargs):
    """`sd_vit_tiny_patch16_224`, small."""
    plain = timm.create_model('vit_tiny_patch16_224', **VIT)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.normal_(0, 0.2)
    options = {'drop_path_rate': RATE, 'drop_path_schedule': 'uniform', **kwargs}
    model = timm.create_model('sd_vit_tiny_patch16_224', drop_path_mode=mode, **VIT, **options)
    model.load_state_dict(plain.state_dict(), strict='drop_path_ramp' not in kwargs)
    return Case(model, plain, timm.models.vision_transformer.Block, ['drop_path1', 'drop_path2'])


def tiny(mode='subset', block=Residual, **kwargs):
    """Hand-written blocks, converted."""
    return _convert(Tiny(block), mode, block, ['drop_path'], **kwargs)


def _convert(plain, mode, kind, slots, **kwargs):
    model = copy.deepcopy(plain)
    done = sd_resnet.convert(model, RATE, 'uniform', mode, input_size=(3, 32, 32), **kwargs)
    blocks = [name for name, module in plain.named_modules() if isinstance(module, kind)]
    whole = [name for name in blocks if not any(re.match(rf'{name}(\.|$)', found) for found in done.survival_probs)]
    return Case(model, plain, kind, slots, whole)


NETWORKS = {'own': own, 'converted': converted, 'vit': vit, 'tiny': tiny}


class Step:
    """One forward pass.

    Attributes:
        out: What the network gave.
        factors: By the name of a block what each row of each of its branches was multiplied by, (N, branches).
    """

    def __init__(self, out, factors):
        self.out, self.factors = out, factors

    @property
    def dropped(self):
        """Number of rows and branches that did not survive."""
        return sum(int((f == 0).sum()) for f in self.factors.values())


def observe(case, x, kept=1 / P, model=None):
    """Run the network, and find what survived. Raises where a row is not what timm's block could give.

    Args:
        case: See `Case`.
        x: Images.
        kept: What a surviving branch is multiplied by.
        model: Called in the place of `case.model`, whose blocks it runs.
    """
    seen, hooks = {}, []
    for name in case.blocks:
        block = case.model.get_submodule(name.removesuffix('._orig_mod'))
        hooks.append(
            block.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: (
                    seen.setdefault(name, [args[0].detach().clone(), args[1:], plain_kwargs(kwargs)]) and None
                ),
                prepend=True,  # other hooks belong to the block
                with_kwargs=True,
            )
        )
        hooks.append(
            block.register_forward_hook(
                lambda m, args, out, name=name: (
                    seen[name].append(first(out).detach().clone()) if len(seen[name]) == 3 else None
                )
            )
        )
    try:
        out = (case.model if model is None else model)(x)
    finally:
        for hook in hooks:
            hook.remove()
    factors = {
        name: factors_of(case.plain.get_submodule(name.removesuffix('._orig_mod')), case.slots, *seen[name], kept)
        for name in case.blocks
        if name in seen
    }
    return Step(out, factors)


def plain_kwargs(kwargs):
    """Without what an own network hands its blocks."""
    return {name: value for name, value in kwargs.items() if name not in ('drawn', 'after_relu')}


def first(out):
    """Of a block that returns a tuple, what the next one takes."""
    return out[0] if isinstance(out, tuple) else out


def factors_of(block, slots, x, args, kwargs, out, kept=1 / P):
    """What each row of each branch was multiplied by, (N, branches); (N, 1) where all drop as one."""
    inner = getattr(block, '_orig_mod', block)
    before = {slot: getattr(inner, slot) for slot in slots}
    choices = list(itertools.product(sorted({0.0, kept, 1.0}), repeat=len(slots)))
    distances = []
    try:
        with torch.no_grad():
            for choice in choices:
                put(inner, slots, choice)
                distances.append((first(inner(x.clone(), *args, **kwargs)) - out).flatten(1).abs().amax(1))
    finally:
        for slot, module in before.items():
            setattr(inner, slot, module)
    best = torch.stack(distances).min(0)
    if best.values.max() < CLOSE:
        return torch.tensor(choices, dtype=x.dtype)[best.indices]
    with torch.no_grad():  # several branches that drop as one
        branches = first(inner(x.clone(), *args, **kwargs)) - x
        distances = [(x + factor * branches - out).flatten(1).abs().amax(1) for factor in (0.0, kept)]
    best = torch.stack(distances).min(0)
    assert best.values.max() < CLOSE, 'a row is neither the shortcut nor the shortcut and the scaled branch'
    return torch.tensor([[0.0], [kept]], dtype=x.dtype)[best.indices]


def with_masks(case, factors):
    """timm's network with the outcomes as masks."""
    plain = copy.deepcopy(case.plain)
    for name, drawn in factors.items():
        block = plain.get_submodule(name)
        if drawn.shape[1] < len(case.slots):
            block.forward = _as_one(block.forward, drawn[:, 0])
            continue
        put(block, case.slots, drawn.unbind(1))
    return plain


def replay(case, factors, x):
    """What that network gives, and the gradients of `loss` by name."""
    plain = with_masks(case, factors)
    out = plain(x.clone())
    return out.detach(), gradients(plain, out)


def _as_one(forward, factor):
    def scaled(x, *args, **kwargs):
        out = forward(x, *args, **kwargs)
        y = x + Times(factor)(first(out) - x)
        return (y, *out[1:]) if isinstance(out, tuple) else y

    return scaled


def loss(out):
    return out.square().mean()


def gradients(model, out):
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    return dict(zip(names, torch.autograd.grad(loss(out), parameters, allow_unused=True)))


def check_factors(case, step):
    """A branch is dropped or scaled, and left alone where it never drops."""
    for name, drawn in step.factors.items():
        allowed = {1.0} if name in case.whole else {0.0, 1 / P}
        assert set(drawn.flatten().tolist()) <= allowed, name


def check_step(case, x=None, seeds=range(3), model=None):
    """Outcomes, output and gradients of some steps are timm's; the number of dropped branches, and of all."""
    x = images(ROWS, dtype=torch.float64) if x is None else x
    dropped = total = 0
    for seed in seeds:
        torch.manual_seed(seed)
        step = observe(case, x, model=model)
        check_factors(case, step)
        out, expected = replay(case, step.factors, x)
        torch.testing.assert_close(step.out.detach(), out, rtol=1e-8, atol=1e-8)
        found = gradients(case.model, step.out)
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            if expected[name] is None:
                assert gradient is None or not gradient.any(), name
            else:
                assert gradient is not None, name
                torch.testing.assert_close(gradient, expected[name], rtol=1e-7, atol=1e-9)
        dropped += step.dropped
        total += sum(f.numel() for name, f in step.factors.items() if name not in case.whole)
    return dropped, total


def all_outcomes(case, x):
    """What timm's network gives for each outcome of all its drop paths, (outcomes, N, classes)."""
    plain = copy.deepcopy(case.plain)
    drawn = [name for name in case.blocks if name not in case.whole]
    outs = []
    with torch.no_grad():
        for choice in itertools.product((0.0, 1 / P), repeat=len(drawn) * len(case.slots)):
            factors = iter(choice)
            for name in drawn:
                put(plain.get_submodule(name), case.slots, [next(factors) for _ in case.slots])
            outs.append(plain(x.clone()))
        if len(case.slots) > 1:  # a block may drop as one
            for choice in itertools.product((0.0, 1 / P), repeat=len(drawn)):
                as_one = copy.deepcopy(case.plain)
                for name, factor in zip(drawn, choice):
                    block = as_one.get_submodule(name)
                    block.forward = _as_one(block.forward, torch.tensor([factor], dtype=x.dtype))
                outs.append(as_one(x.clone()))
    return torch.stack(outs)


def check_rows(out, outcomes):
    """Each row is one of the outcomes; which. Raises else."""
    best = (out - outcomes).abs().amax(2).min(0)
    assert best.values.max() < CLOSE, 'a row is no outcome of any draw'
    return best.indices.tolist()


def works_or_names_a_mode_that_does(run, mode):
    """`run(mode)` passes; or it raises, one line of which names `drop_path_mode` and a mode with which it passes."""
    try:
        run(mode)
    except Exception as error:
        lines = [line for line in str(error).splitlines() if 'drop_path_mode' in line]
        others = [other for other in MODES if other != mode and any(f"'{other}'" in line for line in lines)]
        if not others:
            raise
        for other in others:
            run(other)
