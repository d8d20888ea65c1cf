"""Branches where something is unusual around them: broken graphs, failing steps, empty batches, arguments, names."""

import copy

import pytest
import timm
import torch
from timm.layers import DropPath, set_reentrant_ckpt, use_reentrant_ckpt
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import sd_resnet

from ..families import build
from .conftest import branch_drop_paths


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def vit(rate=0.5):
    model, x = build('test_vit')
    sd_resnet.convert(model, rate, 'uniform', input_size=tuple(x.shape[1:]))
    return model.train(), x


@pytest.mark.parametrize('reentrant', [True, False])
def test_gradients_are_right_where_a_compiled_graph_breaks_under_checkpointing(reentrant):
    """The region runs again without the compiler; other rows than in its first pass gave another gradient."""
    before = use_reentrant_ckpt()
    set_reentrant_ckpt(reentrant)
    try:
        model, x = vit()
        model, x = model.double(), x.double()
        model.blocks[1].norm2.register_forward_hook(lambda *_: torch._dynamo.graph_break())
        model.set_grad_checkpointing()
        compiled = torch.compile(model, backend=aot_eager)

        def loss():
            torch.manual_seed(3)
            return compiled(x.clone().requires_grad_()).square().mean()

        loss().backward()
        weight = model.blocks[2].mlp.fc1.weight
        direction, data = torch.randn_like(weight), weight.data.clone()
        along = []
        for sign in (1, -1):
            weight.data = data + sign * 1e-5 * direction
            along.append(loss().item())
        slope = (along[0] - along[1]) / 2e-5
        assert slope == pytest.approx((weight.grad * direction).sum().item(), rel=1e-4, abs=1e-9)
    finally:
        set_reentrant_ckpt(before)


def test_a_compiled_step_that_fails_leaves_no_rows_behind():
    """Who goes on after an exception, out of memory say, would train on the same rows for ever."""
    model, x = vit()
    calls = []

    def fail(*_):
        calls.append(0)
        torch._dynamo.graph_break()
        if len(calls) == 2:
            raise RuntimeError('out of memory')

    model.blocks[1].register_forward_hook(fail)
    compiled = torch.compile(model, backend=aot_eager)
    compiled(x)
    with pytest.raises(RuntimeError, match='out of memory'):
        compiled(x)
    block, tokens = model.blocks[0], torch.ones(5, 4, 64)
    assert block.norm1(tokens).shape == block.drop_path1(tokens).shape == tokens.shape  # called alone
    assert model(x[:3]).shape[0] == 3
    assert len({model(x).sum().item() for _ in range(6)}) > 3


class Biased(nn.Module):
    """A block that is not given the images first, in a network."""

    def __init__(self):
        super().__init__()
        self.norm, self.f, self.drop_path = nn.LayerNorm(8), nn.Linear(8, 8), DropPath(0.5)

    def forward(self, bias, x):
        return x + self.drop_path(self.f(self.norm(x)) + bias)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.bias = Biased(), nn.Parameter(torch.ones(1, 1, 8))

    def forward(self, x):
        return self.block(self.bias, x.mean(1))


def test_rows_are_counted_where_the_branch_begins():
    """By the block's first argument, a bias for all images, they survived all or none."""
    model, x = Net(), torch.randn(8, 3, 8, 8)
    assert set(sd_resnet.convert(model, input_size=(3, 8, 8)).drop_paths.values()) == {'branch'}
    rows = []
    model.block.f.register_forward_hook(lambda module, args, out: rows.append(out.shape[0]))
    for _ in range(5):
        model.train()(x)
    assert rows == [4] * 5


def test_an_empty_mini_batch_is_as_under_timm():
    model = timm.create_model('vit_tiny_patch16_224', img_size=32, depth=1, drop_path_rate=0.5, num_classes=5)
    sd_resnet.convert(model, 0.5, 'uniform')
    assert model.train()(torch.randn(0, 3, 32, 32)).shape == (0, 5)


def test_a_network_in_another_default_type_converts():
    torch.set_default_dtype(torch.float64)
    try:
        model, x = build('test_vit')
        assert sd_resnet.convert(model, 0.4, input_size=tuple(x.shape[1:])).drop_paths
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_network_keeps_its_name():
    """transformers writes it into a configuration, and pipelines look for it."""
    model, _ = vit()
    assert type(model).__name__ == 'VisionTransformer'


def test_nothing_is_left_where_somebody_has_replaced_a_drop_path():
    model, _ = vit()
    copied = copy.deepcopy(model)
    copied.blocks[0].drop_path1 = nn.Identity()
    sd_resnet.unconvert(copied)
    assert not branch_drop_paths(copied)
    assert not any(module._forward_pre_hooks for module in copied.modules())


@pytest.mark.parametrize(('argument', 'value'), [('drop_path', 'DropPath'), ('input_size', 224)])
def test_arguments_of_another_kind_are_named(argument, value):
    with pytest.raises(ValueError, match=f'{argument} must be .* got {value!r}'):
        sd_resnet.convert(timm.create_model('test_vit'), 0.1, **{argument: value})


@pytest.mark.skipif(not timm.is_model('hrnet_w18_small'), reason='this timm has no HRNet')
def test_a_name_whose_network_takes_no_rate_builds_and_drops():
    with torch.device('meta'):
        model = timm.create_model('sd_hrnet_w18_small')
    assert max(each.drop_prob for each in branch_drop_paths(model).values()) == pytest.approx(0.1)
