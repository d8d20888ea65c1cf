"""Smaller ordinary networks cut out of one that was trained with stochastic depth: blocks removed, the rest as it is.

Every draw of stochastic depth trains one of 2^L sub-networks (Huang et al., section 3); these are such.
"""

from collections.abc import Sequence
from typing import Any

from timm.models.convnext import ConvNeXt
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..resnets.resnet_cifar import StochasticCifarResNet
from ..resnets.resnet_imagenet import ARCHITECTURES
from .networks import Network, network_of


def subnetwork(model: nn.Module, keep: Sequence[int] | None = None, depth: int | None = None) -> Any:
    """A copy with some of the residual blocks, as an ordinary network that drops nothing.

    Every draw trains one of 2^L such (Huang et al., section 3). Survival probabilities are folded into the blocks that
    stay. What was timm's ResNet is timm's ResNet again, a converted network is timm's own; the CIFAR nets, which timm
    does not have, stay what they are, at rate 0. The statistics of BatchNorm are those of the whole network: estimate
    them anew where there are any.

    For ResNets, ViT and ConvNeXt, `_model_args` holds what `timm.create_model` builds a network of that size with. Of
    others only the object is there, without it: a shorter Swin, for example, shifts other windows.

    Args:
        model: A model of this package, or a converted one.
        keep: The blocks that stay, counted from 0 in the order in which they run.
        depth: Their number instead: evenly spaced ones, beside those that change the shape.

    Raises:
        TypeError: `model` is neither.
        ValueError: Both or none of `keep` and `depth` are given, or they ask for what cannot be.
    """
    network = network_of(model)
    kept = _kept(network, keep, depth)
    small = network.plain_copy()
    for index, name in reversed(list(enumerate(network.drop_paths))):
        if index not in kept:
            holder, _, place = name.rpartition('.')
            parent = small.get_submodule(holder)
            if not (isinstance(parent, nn.Sequential | nn.ModuleList) and place.isdecimal()):
                raise ValueError(f'block {name} is not one of a sequence and cannot be removed')
            del parent[int(place)]
    args = small.__dict__.pop('_model_args', {})
    if size := _size_args(small):
        small._model_args = {**{k: v for k, v in args.items() if not k.startswith('drop_path')}, **size}
    return small


def _kept(network: Network, keep: Sequence[int] | None, depth: int | None) -> set[int]:
    count, fixed = len(network.drop_paths), network.fixed
    if (keep is None) == (depth is None):
        raise ValueError(f'give either keep or depth, got keep={keep!r} and depth={depth!r}')
    if keep is not None:
        kept = set(keep)
        if not kept <= set(range(count)) or len(kept) != len(keep):
            raise ValueError(f'keep must hold different numbers of blocks from 0 to {count - 1}, got {keep!r}')
        if missing := sorted(fixed - kept):
            raise ValueError(f'keep must hold the blocks that change the shape, {missing} too, got {keep!r}')
        return kept
    least = max(len(fixed), 1)
    if type(depth) is not int or not least <= depth <= count:
        raise ValueError(f'depth must be a whole number from {least} to {count}, got {depth!r}')
    free = [index for index in range(count) if index not in fixed]
    wanted = depth - len(fixed)
    return {*fixed, *(free[(2 * place + 1) * len(free) // (2 * wanted)] for place in range(wanted))}


def _size_args(small: Any) -> dict[str, Any]:
    """What builds a network of this size, where timm's architecture takes that and is then the same; else nothing."""
    if isinstance(small, StochasticCifarResNet):
        return {'blocks_per_stage': [len(getattr(small, name)) for name in small.stage_names], 'drop_path_rate': 0.0}
    if isinstance(small, ResNet) and not _pruned_by_timm(small):
        return {'layers': [len(getattr(small, f'layer{stage}')) for stage in range(1, 5)]}
    if isinstance(small, VisionTransformer):
        return {'depth': len(small.blocks)}
    if isinstance(small, ConvNeXt):
        return {'depths': [len(stage.blocks) for stage in small.stages]}  # type: ignore[arg-type]
    return {}


def _pruned_by_timm(model: Any) -> bool:
    """Are its widths of a list of timm's, block by block?"""
    name: Any = (getattr(model, 'pretrained_cfg', None) or {}).get('architecture')
    return ARCHITECTURES.get(name, {}).get('pruned', False)
