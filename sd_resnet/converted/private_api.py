"""The private names of torch and timm that only this wing uses; see `core/private_api.py`."""

from collections.abc import Callable
from typing import Any

import torch
from timm.models import DefaultCfg, PretrainedCfg, _registry, generate_default_cfgs, get_arch_pretrained_cfgs
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves as tree_leaves  # all tensors in what a module returns
from torch.utils._pytree import tree_map_only as tree_map_only

# What timm knows of pretrained weights. Without it, through timm's functions, which copy: some 50 ms for 1,000 models.
_default_cfgs: dict[str, DefaultCfg] = getattr(_registry, '_model_default_cfgs', {})
_cfgs: dict[str, PretrainedCfg] = getattr(_registry, '_model_pretrained_cfgs', {}) if _default_cfgs else {}


def as_kind(kind: Any, tensor: Tensor) -> Any:
    """The same tensor as one of this class: `as_subclass` fails in torch 2.5 while operations are counted."""
    return Tensor._make_subclass(kind, tensor)


def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """By their names, with those that are None, which `named_children` leaves out."""
    return module._modules


def size_before_view(node: Any) -> Any:
    """Of a node of autograd's graph, the shape that its view is of; None where it does not tell."""
    return getattr(node, '_saved_self_sym_sizes', None)


def share_hooks(module: nn.Module, other: nn.Module) -> None:
    """What is registered on a module is from now on on the other, too, and so is what is removed."""
    hooks = {name: value for name, value in vars(module).items() if name.startswith(('_forward', '_backward'))}
    other.__dict__.update(hooks, _is_full_backward_hook=module._is_full_backward_hook)


def remove_hooks(module: nn.Module, wanted: Callable[[Any], bool]) -> bool:
    """Forward hooks, and hooks before forward or loading, that are `wanted`: a copy of a module has no handles."""
    found = False
    for hooks in (module._forward_pre_hooks, module._forward_hooks, module._load_state_dict_pre_hooks):
        for key in [key for key, hook in hooks.items() if wanted(getattr(hook, 'hook', hook))]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
            found = True
    return found


def pretrained_cfgs(architecture: str) -> DefaultCfg:
    """timm's own configurations by tag, the default tag first, with repositories named in full; to be read only."""
    cfgs: Any = _cfgs or get_arch_pretrained_cfgs(architecture)
    known = _default_cfgs.get(architecture) if _cfgs else generate_default_cfgs(cfgs).get(architecture)
    if known is None:
        return DefaultCfg()
    named = {tag: cfgs[f'{architecture}.{tag}' if tag else architecture] for tag in known.tags}
    return DefaultCfg(known.tags, named, known.is_pretrained)


@torch.compiler.disable
def keep_shape(x: Any) -> None:
    """Let no length of this tensor, (N, ...), but N become a symbol in the compiler around this frame, which it skips.

    Frames of a network between blocks share their code, so several shapes of `x` would be one of symbols, which torch's
    code generator cannot compile in some networks (ConvNeXt).
    """
    if isinstance(x, Tensor):
        torch._dynamo.mark_static(x, [*range(1, x.dim())])
