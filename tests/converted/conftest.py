"""What the tests of branches share: a network converted, and timm's own step with the same rows as masks."""

import copy
import warnings
from typing import Any, NamedTuple

import pytest
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

import sd_resnet
from sd_resnet.converted.by_branch import BranchDropPath, Take
from sd_resnet.core.draws import Window

from ..families import build


class Case(NamedTuple):
    """A network as timm builds it, and the same converted at rate 0.5; tests copy what they change."""

    name: str
    plain: nn.Module
    model: nn.Module
    conversion: Any
    x: torch.Tensor


def converted(name, rate=0.5, **kwargs):
    model, x = build(name, rate=0.3, **kwargs)
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of row mode, which `test_what_drops_how` lists
        conversion = sd_resnet.convert(model, rate, 'uniform', input_size=tuple(x.shape[1:]))
    return Case(name, plain, model, conversion, x)


def branch_drop_paths(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, BranchDropPath)}


def entries(model):
    """Of each drop path, its entries: (module, position)."""
    found = {drop_path: [] for drop_path in branch_drop_paths(model).values()}
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, Take):
                found[hook.drop_path].append((module, hook.position))
    return found


def quiet(model):
    """In training, without any other chance than drop paths; norms in evaluation."""
    for module in model.train().modules():
        if isinstance(module, _BatchNorm):
            module.eval()
        elif isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def loss(out):
    return sum(leaf.square().mean() for leaf in tree_leaves(out) if leaf.is_floating_point())


class Masked(nn.Module):
    """Recorded masks, one after another, in a drop path's place."""

    def __init__(self, masks):
        super().__init__()
        self.masks = list(masks)

    def forward(self, x):
        return x * self.masks.pop(0).to(x).view(-1, *[1] * (x.dim() - 1))


@pytest.fixture
def recorded(monkeypatch):
    """The mask over p_l, (N,), of each pass through each drop path, in the order in which they run."""
    masks, forward, mask = {}, BranchDropPath.forward, BranchDropPath.mask

    def drawn(self, x, p_l=None):
        drawn.last = mask(self, x, p_l)
        return drawn.last

    def record(self, x):
        b_l = getattr(self.branch, 'b_l', None)
        batch = getattr(self.branch, 'batch', None)
        out = forward(self, x)
        if self.is_dropping() and not x.is_meta:  # as in the trial runs of `convert`
            if isinstance(b_l, Window):
                b_l = ((torch.arange(batch) - b_l.start) % batch < b_l.alive).double()
            elif isinstance(b_l, bool):
                b_l = torch.full((batch,), float(b_l))
            b_l = drawn.last.flatten() if b_l is None else b_l.flatten()
            masks.setdefault(self, []).append(b_l.double() / self.p_l)
        return out

    monkeypatch.setattr(BranchDropPath, 'mask', drawn)
    monkeypatch.setattr(BranchDropPath, 'forward', record)
    return masks


def assert_a_step_is_timms(model, plain, x, masks, tolerance=1e-6):
    """With the recorded masks in its drop paths' places, loss and gradients of timm's own modules are the same."""
    names = {module: name for name, module in model.named_modules()}
    for module in [*model.modules(), *plain.modules()]:
        if type(module) is DropPath:  # timm's own, in the converted network where it was left alone
            module.drop_prob = 0.0
    out = model(x)
    loss(out).backward()
    for drop_path, drawn in masks.items():
        holder, _, attribute = names[drop_path].rpartition('.')
        setattr(plain.get_submodule(holder), attribute, Masked(drawn))
    expected = plain(x)
    loss(expected).backward()
    for a, b in zip(tree_leaves(out), tree_leaves(expected)):
        assert (a - b).abs().max() <= tolerance * b.abs().max()
    theirs = dict(plain.named_parameters())
    largest = max(p.grad.abs().max() for p in theirs.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        grad, other = (torch.zeros_like(p) if p.grad is None else p.grad for p in (parameter, theirs[name]))
        # Of a bias that cannot change the loss, before a norm say, gradients are noise of another size than the others
        assert (grad - other).abs().max() <= tolerance * max(other.abs().max(), 1e-6 * largest), name
