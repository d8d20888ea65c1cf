"""Parameters and floating-point operations of a network's blocks, and what stochastic depth leaves of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..converted.blocks import UnitBlock
from ..converted.convert import converted_blocks, own_input_size
from ..converted.trial import copy_without_data
from ..core.drop_path import StochasticDepth
from ..errors import one_line
from ..figures import DROPPED, KEPT, OTHER, PROBABILITY, new_figure, save_figure
from ..resnets.network import StochasticDepthNet
from .networks import check_name, network_of

_IMAGES = 4  # of which half is two: where one was left, BatchNorm would take all of them


@dataclass(frozen=True)
class BlockCost:
    """One residual block, for one image and one forward pass; a multiplication and its addition are two FLOPs."""

    name: str  # as in the state dict, e.g. `layer1.0`
    survival_prob: float  # p_l, the mean over its branches
    parameters: int  # number of values, shortcut included
    branch_flops: int  # what a dropped block saves
    shortcut_flops: int  # what is always computed: a projection, and whatever lies outside of its branches


@dataclass(frozen=True)
class NetworkCost:
    """A network's blocks, and the FLOPs and parameters of the whole, every block active."""

    architecture: str
    image_size: int
    blocks: tuple[BlockCost, ...]
    flops: int
    parameters: int

    @property
    def other_flops(self) -> int:
        """Of the stem and the head."""
        return self.flops - sum(block.branch_flops + block.shortcut_flops for block in self.blocks)

    @property
    def expected_depth(self) -> float:
        """Mean number of active blocks, the sum of p_l."""
        return sum(block.survival_prob for block in self.blocks)

    @property
    def expected_share(self) -> float:
        """Share of the FLOPs that a training step computes on average: the bound of what can be saved."""
        return self.share([block.survival_prob for block in self.blocks])

    def share(self, ran: Sequence[float]) -> float:
        """Share of the FLOPs that is computed where that share of each block's branch is."""
        return 1 - sum((1 - r) * block.branch_flops for r, block in zip(ran, self.blocks)) / self.flops


def network_cost(
    architecture: str, image_size: int | None = None, drop_path_rate: float | None = None, schedule: Any = None
) -> NetworkCost:
    """Count the parameters and FLOPs of a model of this package, or of timm's under a `sd_` name; None is its own.

    `image_size` is height and width in pixels, `drop_path_rate` 1 - p_L; see `survival_probs` for `schedule`. A
    ValueError says which argument is outside what is allowed.
    """
    check_name(architecture)
    given = {'drop_path_rate': drop_path_rate, 'drop_path_schedule': schedule, **size_args(architecture, image_size)}
    try:
        with torch.device('meta'):
            model = timm.create_model(architecture, **given)
    except TypeError as error:  # of timm's network: it has no drop path
        reason = one_line(error)
        raise ValueError(f'model must be a network with a drop path, got {architecture!r}: {reason}') from error
    return model_cost(model, image_size)


def size_args(architecture: str, image_size: int | None) -> dict[str, Any]:
    """What builds a network for images of `image_size`, where it takes those of one size only."""
    cfg = get_pretrained_cfg(architecture)
    return {'img_size': image_size} if image_size and cfg and cfg.fixed_input_size else {}


def model_cost(model: Any, image_size: int | None = None) -> NetworkCost:
    """The same of a network that is there already, of this package or converted; a `None` size is its own."""
    if image_size is not None and image_size < 1:
        raise ValueError(f'image size must be at least 1 pixel, got {image_size}')
    channels, height, width = own_input_size(model)
    size, network = (channels, image_size or height, image_size or width), network_of(model)
    flops, always = count_flops(model, size), _always_computed(model, size)

    def cost(name: str, drop_paths: Sequence[StochasticDepth]) -> BlockCost:
        p_l = fmean([drop_path.p_l for drop_path in drop_paths] or [1.0])
        return BlockCost(name, p_l, _size(model.get_submodule(name)), flops[name] - always[name], always[name])

    blocks = tuple(cost(name, drop_paths) for name, drop_paths in network.drop_paths.items())
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    architecture = cfg.get('architecture', getattr(model, 'plain_class', type(model)).__name__)
    return NetworkCost(architecture, image_size or width, blocks, flops[''], _size(model))


def count_flops(model: nn.Module, input_size: tuple[int, ...]) -> Counter[str]:
    """FLOPs of one image's forward pass in evaluation, by the modules' names; those of the whole network by ''."""
    return _count(copy_without_data(model).eval(), 1, input_size)


def _always_computed(model: nn.Module, input_size: tuple[int, ...]) -> Counter[str]:
    """Of each block the FLOPs for one image that no drop saves."""
    if isinstance(model, StochasticDepthNet):
        flops = count_flops(model, input_size)
        return Counter({name: flops[f'{name}.downsample'] for name in network_of(model).drop_paths})
    tried = copy_without_data(model).eval()
    whole, always = _count(tried, _IMAGES, input_size), Counter[str]()
    blocks = converted_blocks(tried)
    for block in blocks.values():
        for drop_path in block.drop_paths():
            drop_path.configure(*((1e-12, 'batch') if isinstance(block, UnitBlock) else (0.5, 'subset')))
            drop_path.train()
    ran = _count(tried, _IMAGES, input_size)
    for name, block in blocks.items():  # of one all was dropped, of another half of the images
        saved = (whole[name] - ran[name]) * (1 if isinstance(block, UnitBlock) else 2)
        always[name] = (whole[name] - saved) // _IMAGES
    return always


def _count(tried: nn.Module, images: int, input_size: tuple[int, ...]) -> Counter[str]:
    with FlopCounterMode(display=False) as counter, torch.no_grad(), torch.random.fork_rng(devices=[]):
        tried(torch.empty(images, *input_size, device='meta'))
    return Counter({name.partition('.')[2]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()})


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def cost_table(cost: NetworkCost) -> str:
    """The table that `sd-resnet info` prints."""
    width = max([12, *(len(block.name) + 1 for block in cost.blocks)])
    others = cost.parameters - sum(block.parameters for block in cost.blocks)
    lines = [
        f'{cost.architecture}, {cost.image_size} x {cost.image_size} px, one image, one forward pass\n',
        f'{"block":<{width}}{"p_l":>8}{"parameters":>14}{"branch MFLOPs":>16}{"shortcut MFLOPs":>18}',
        *(
            f'{b.name:<{width}}{b.survival_prob:>8.4f}{b.parameters:>14,}'
            f'{b.branch_flops / 1e6:>16,.1f}{b.shortcut_flops / 1e6:>18,.1f}'
            for b in cost.blocks
        ),
        f'{"stem, head":<{width}}{others:>22,}{cost.other_flops / 1e6:>34,.1f}',
        f'{"all":<{width}}{cost.parameters:>22,}{cost.flops / 1e6:>34,.1f}\n',
        f'blocks                    {len(cost.blocks)}',
        f'expected depth            {cost.expected_depth:.2f} blocks',
        f'expected share of FLOPs   {cost.expected_share:.3f}',
    ]
    return '\n'.join(lines)


def plot_costs(cost: NetworkCost, path: Path) -> None:
    """Draw p_l and, per block, the FLOPs that a training step computes on average and those it saves."""
    figure, ((axis,),) = new_figure(1)
    numbers, probs = range(1, len(cost.blocks) + 1), np.array([block.survival_prob for block in cost.blocks])
    shortcut, branch = np.array([(b.shortcut_flops / 1e6, b.branch_flops / 1e6) for b in cost.blocks]).T
    kept = shortcut + probs * branch
    axis.bar(numbers, shortcut, color=OTHER, label='shortcut, always computed')
    axis.bar(numbers, probs * branch, bottom=shortcut, color=KEPT, label='branch, computed on average')
    axis.bar(numbers, (1 - probs) * branch, bottom=kept, color=DROPPED, label='branch, skipped on average')
    highest = (shortcut + branch).max()
    axis.set(xlabel='block l', ylabel='FLOPs per image and forward pass (millions)', ylim=(0, highest * 1.28))
    left = f'{cost.expected_depth:.2f} of {len(probs)} blocks and {cost.expected_share:.1%} of the FLOPs'
    axis.set_title(f'{cost.architecture}, {cost.image_size} px: {left} remain on average', fontsize=11)
    right = axis.twinx()
    right.spines['top'].set_visible(False)
    marker = 'o' if len(probs) <= 60 else None
    right.plot(numbers, probs, color=PROBABILITY, marker=marker, markersize=4, label='survival probability p_l')
    right.set(ylim=(0, 1.28), yticks=[0, 0.25, 0.5, 0.75, 1])
    right.set_ylabel('survival probability', color=PROBABILITY)
    place = dict(loc='upper center', bbox_to_anchor=(0.5, 1), bbox_transform=axis.transAxes)
    figure.legend(ncols=2, fontsize=8, frameon=False, **place)
    save_figure(figure, path)
