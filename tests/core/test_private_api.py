"""Private names of torch and timm: in which version one is gone, and that nothing else reaches for one."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from sd_resnet.core import private_api

PACKAGE = Path(private_api.__file__).parents[1]
_PRIVATE = r'(?:torch|timm)(?:\.\w+)*\._(?!_)\w+|\._(?:is_replica|version|modules|buffers|parameters|\w+_hooks)\b'
NEWER = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)


def test_every_private_name_is_there():
    assert callable(torch._C._current_graph_task_id)
    assert callable(torch._C._functorch.get_interpreter_stack)
    assert torch._C._functorch.TransformType.Vmap
    assert isinstance(torch.autograd.forward_ad._current_level, int)
    assert (private_api._top_hooks is not None) == NEWER
    assert callable(private_api.adapt_model_from_file)
    assert callable(private_api._skip_code)
    module = nn.Module()
    assert all(hasattr(module, name) for name in private_api._HOOKS)
    assert module._replicate_for_data_parallel()._is_replica


def test_no_other_module_reaches_for_one():
    """Whoever looks for what a new version of torch may break looks in one place."""
    for path in PACKAGE.rglob('*.py'):
        if path.name != 'private_api.py':
            found = re.findall(_PRIVATE, path.read_text(encoding='utf-8'))
            assert not found, (path.name, found)


def test_a_recomputation_is_told_from_a_forward_pass():
    seen = []

    def region(x):
        seen.append(private_api.recomputing())
        return x.sin()

    checkpoint(region, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert seen == [False, True]


@pytest.mark.skipif(not NEWER, reason='torch 2.5 does not tell which hooks are active')
def test_the_innermost_hooks_on_saved_tensors_are_found():
    assert private_api.hooks_on_saved_tensors() is None
    pack = lambda tensor: tensor  # noqa: E731
    with saved_tensors_hooks(pack, pack):
        assert private_api.hooks_on_saved_tensors()[0] is pack


def test_transforms_are_told_apart():
    seen = []

    def look(x):
        seen.append((private_api.transforming(), private_api.vmapping()))
        return x.sum()

    look(torch.ones(2))
    torch.func.grad(look)(torch.ones(2))
    torch.func.vmap(look)(torch.ones(2, 2))
    torch.func.jvp(look, (torch.ones(2),), (torch.ones(2),))
    with torch.autograd.forward_ad.dual_level():
        look(torch.ones(2))
    assert seen == [(False, False), (True, False), (True, True), (True, False), (True, False)]


def test_hooks_are_seen():
    module = nn.ReLU()
    assert not private_api.is_hooked(module)
    handle = module.register_full_backward_hook(lambda *args: None)
    assert private_api.is_hooked(module)
    handle.remove()
    assert not private_api.is_hooked(module)
