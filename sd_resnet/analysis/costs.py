"""Parameters and floating-point operations of a network's blocks, and what stochastic depth leaves of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models import get_pretrained_cfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..converted.convert import own_input_size
from ..converted.search import copy_without_data
from ..errors import one_line
from ..figures import DROPPED, KEPT, OTHER, PROBABILITY, new_figure, save_figure
from .networks import check_name, network_of


@dataclass(frozen=True)
class BlockCost:
    """One residual block, for one image and one forward pass; a multiplication and its addition are two FLOPs."""

    name: str  # as in the state dict, e.g. `layer1.0`
    survival_prob: float  # p_l
    parameters: int  # number of values, shortcut included
    branch_flops: int  # what a dropped block saves
    shortcut_flops: int  # what is always computed: the projection, if there is one


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
    flops = count_flops(model, (channels, image_size or height, image_size or width))

    def cost(name: str, p_l: float) -> BlockCost:
        shortcut = flops[f'{name}.downsample']
        return BlockCost(name, p_l, _size(model.get_submodule(name)), flops[name] - shortcut, shortcut)

    blocks = tuple(cost(name, drop_path.p_l) for name, drop_path in network_of(model).drop_paths.items())
    return NetworkCost(model.pretrained_cfg['architecture'], image_size or width, blocks, flops[''], _size(model))


def count_flops(model: nn.Module, input_size: tuple[int, ...]) -> Counter[str]:
    """FLOPs of one image's forward pass in evaluation, by the modules' names; those of the whole network by ''."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy_without_data(model).eval()(torch.empty(1, *input_size, device='meta'))
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
