"""Smaller ordinary networks cut out of one that was trained with stochastic depth: blocks removed, the rest as it is.

Every draw of stochastic depth trains one of 2^L sub-networks (Huang et al., section 3); these are such.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from timm.layers import DropPath
from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..converted.convert import converted_blocks, unconvert
from ..resnets.checkpoints import fold
from ..resnets.network import StochasticDepthNet
from ..resnets.resnet_cifar import StochasticCifarResNet


@dataclass(frozen=True)
class Removable:
    """A network's residual blocks.

    Attributes:
        names: Of all that can drop, in order; `keep` counts them from 0.
        fixed: Those of them that change the shape, which every sub-network keeps.
    """

    names: tuple[str, ...]
    fixed: frozenset[int]


def blocks_of(model: nn.Module) -> Removable:
    """The blocks that sub-networks are made of.

    Args:
        model: A model of this package, or a converted one.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(model, StochasticDepthNet):
        names = {module: name for name, module in model.named_modules()}
        blocks = list(model.blocks())
        fixed = frozenset(index for index, block in enumerate(blocks) if block.downsample is not None)
        return Removable(tuple(names[block] for block in blocks), fixed)
    names_of_converted = tuple(converted_blocks(model))
    if not names_of_converted:
        raise TypeError(
            f'model must be a model of sd_resnet or one that sd_resnet.convert has converted, got '
            f'{type(model).__name__}; unwrap DDP (`.module`), EMA (`.module`) and torch.compile (`._orig_mod`) first'
        )
    return Removable(names_of_converted, frozenset())


def subnetwork(model: nn.Module, keep: Sequence[int] | None = None, depth: int | None = None) -> Any:
    """A copy with some of the residual blocks, as an ordinary network that drops nothing.

    Survival probabilities are folded into the blocks that stay. What was timm's ResNet is timm's ResNet again, a
    converted network is timm's own; the CIFAR nets, which timm does not have, stay what they are, at rate 0. The
    statistics of BatchNorm are those of the whole network: estimate them anew where there are any.

    For ResNets, ViT and ConvNeXt, `_model_args` holds what `timm.create_model` builds a network of that size with. Of
    others only the object is there, without it: Swin's blocks, for example, are not alike, and a shorter Swin shifts
    others.

    Args:
        model: A model of this package, or a converted one.
        keep: The blocks that stay, counted from 0 in the order of `blocks_of(model).names`.
        depth: Their number instead: evenly spaced ones, beside those that change the shape.

    Raises:
        TypeError: `model` is neither.
        ValueError: Both or none of `keep` and `depth` are given, or they ask for what cannot be.
    """
    blocks = blocks_of(model)
    kept = _kept(blocks, keep, depth)
    small: Any
    if isinstance(model, StochasticDepthNet):
        small = fold(model)
    else:
        small = copy.deepcopy(model)
        unconvert(small)
        cfg = getattr(small, 'pretrained_cfg', None)
        if cfg:
            small.pretrained_cfg = small.default_cfg = {**cfg, 'architecture': cfg['architecture'].removeprefix('sd_')}
        for module in small.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
    for index in reversed(range(len(blocks.names))):
        if index not in kept:
            holder, _, place = blocks.names[index].rpartition('.')
            parent = small.get_submodule(holder)
            if not (isinstance(parent, nn.Sequential | nn.ModuleList) and place.isdecimal()):
                raise ValueError(f'block {blocks.names[index]} is not one of a sequence and cannot be removed')
            del parent[int(place)]
    args = small.__dict__.pop('_model_args', {})
    size_args = _size_args(small)
    if size_args is not None:
        small._model_args = {**{k: v for k, v in args.items() if not k.startswith('drop_path')}, **size_args}
    return small


def _kept(blocks: Removable, keep: Sequence[int] | None, depth: int | None) -> set[int]:
    count, fixed = len(blocks.names), blocks.fixed
    if (keep is None) == (depth is None):
        raise ValueError(f'give either keep or depth, got keep={keep!r} and depth={depth!r}')
    if keep is not None:
        kept = set(keep)
        if not kept <= set(range(count)) or len(kept) != len(list(keep)):
            raise ValueError(f'keep must hold different numbers of blocks from 0 to {count - 1}, got {keep!r}')
        if missing := sorted(fixed - kept):
            raise ValueError(f'keep must hold the blocks that change the shape, {missing} too, got {keep!r}')
        return kept
    if isinstance(depth, bool) or not isinstance(depth, int) or not max(len(fixed), 1) <= depth <= count:
        raise ValueError(f'depth must be a whole number from {max(len(fixed), 1)} to {count}, got {depth!r}')
    free = [index for index in range(count) if index not in fixed]
    wanted = depth - len(fixed)
    return set(fixed) | {free[(2 * place + 1) * len(free) // (2 * wanted)] for place in range(wanted)}


def _size_args(small: Any) -> dict[str, Any] | None:
    """The arguments that build a network of this size, where timm's architecture takes such and is then the same."""
    if isinstance(small, StochasticCifarResNet):
        return {'blocks_per_stage': [len(getattr(small, name)) for name in small.stage_names], 'drop_path_rate': 0.0}
    if isinstance(small, ResNet):
        return {'layers': [len(getattr(small, f'layer{stage}')) for stage in range(1, 5)]}
    if isinstance(small, VisionTransformer):
        return {'depth': len(small.blocks)}
    if isinstance(small, ConvNeXt):
        return {'depths': [len(stage.blocks) for stage in small.stages]}  # type: ignore[arg-type]
    return None
