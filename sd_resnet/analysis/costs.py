"""Parameters and floating-point operations of a network's blocks, and what stochastic depth leaves of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_pretrained_cfg, is_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..converted.convert import converted_blocks
from ..converted.converted_models import register
from ..converted.search import copy_without_data
from ..core.drop_path import StochasticDepth
from ..core.schedules import Schedule
from ..errors import one_line
from ..figures import DROPPED, KEPT, OTHER, PROBABILITY, new_figure, save_figure
from ..resnets.checkpoints import architectures
from ..resnets.network import StochasticDepthNet


@dataclass(frozen=True)
class BlockCost:
    """One residual block, for one image and one forward pass; a multiplication and its addition are two FLOPs.

    Attributes:
        name: As in the state dict, e.g. `layer1.0`.
        survival_prob: p_l.
        parameters: Number of trainable values, shortcut included.
        branch_flops: What a dropped block saves.
        shortcut_flops: What is always computed: the projection, if there is one.
    """

    name: str
    survival_prob: float
    parameters: int
    branch_flops: int
    shortcut_flops: int


@dataclass(frozen=True)
class NetworkCost:
    """A network's blocks, and the FLOPs and parameters of its stem and head."""

    architecture: str
    image_size: int
    blocks: tuple[BlockCost, ...]
    other_flops: int
    other_parameters: int

    @property
    def flops(self) -> int:
        """One forward pass with every block active."""
        return self.other_flops + sum(b.branch_flops + b.shortcut_flops for b in self.blocks)

    @property
    def parameters(self) -> int:
        """Trainable values."""
        return self.other_parameters + sum(b.parameters for b in self.blocks)

    @property
    def expected_depth(self) -> float:
        """Mean number of active blocks, the sum of p_l."""
        return sum(b.survival_prob for b in self.blocks)

    @property
    def expected_share(self) -> float:
        """Share of the FLOPs that a training step computes on average: the bound of what can be saved."""
        return self.share([block.survival_prob for block in self.blocks])

    def share(self, ran: Sequence[float]) -> float:
        """Share of the FLOPs that is computed where that share of each block's branch is."""
        return 1 - sum((1 - r) * block.branch_flops for r, block in zip(ran, self.blocks)) / self.flops


def network_cost(
    architecture: str,
    image_size: int | None = None,
    drop_path_rate: float | None = None,
    schedule: Schedule | None = None,
) -> NetworkCost:
    """Count a network's parameters and FLOPs, without computing anything.

    Args:
        architecture: A model of this package, or any of timm's under a `sd_` name, which is registered if need be.
        image_size: Height and width in pixels; None is the architecture's own.
        drop_path_rate: 1 - p_L; None is the model's default.
        schedule: See `survival_probs`; None is the model's default.

    Raises:
        ValueError: An argument is outside what is allowed.
    """
    name = architecture.split('.')[0]
    plain = name.removeprefix('sd_')
    if plain != name and is_model(plain) and not is_model(name):
        register(plain)
    names = [*architectures(), *timm.list_models(module='converted_models')]
    if name not in names:
        raise ValueError(f'model must be sd_ before a name of timm, or one of {", ".join(names)}, got {architecture!r}')
    with torch.device('meta'):
        size = size_args(architecture, image_size)
        given = {'drop_path_rate': drop_path_rate, 'drop_path_schedule': schedule, **size}
        try:
            model: Any = timm.create_model(architecture, **given)
        except TypeError as error:  # of timm's network: it has no drop path
            raise ValueError(
                f'model must be a network with a drop path, got {architecture!r}: {one_line(error)}'
            ) from error
    return model_cost(model, image_size or model.default_cfg['input_size'][-1])


def size_args(architecture: str, image_size: int | None) -> dict[str, Any]:
    """What builds a network for images of `image_size`, where it takes those of one size only."""
    cfg = get_pretrained_cfg(architecture)
    return {'img_size': image_size} if image_size and cfg and cfg.fixed_input_size else {}


def model_cost(model: Any, image_size: int) -> NetworkCost:
    """The same of a network that is there already.

    Args:
        model: Of this package; it is not touched.
        image_size: Height and width in pixels.

    Raises:
        ValueError: `image_size` is not positive.
    """
    if image_size < 1:
        raise ValueError(f'image size must be at least 1 pixel, got {image_size}')
    shape = (1, model.pretrained_cfg['input_size'][0], image_size, image_size)
    model = copy_without_data(model).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(shape, device='meta'))
    return _collect(model.pretrained_cfg['architecture'], image_size, model, counter)


def drop_paths(model: nn.Module) -> dict[str, StochasticDepth]:
    """The blocks' `StochasticDepth` modules by the names of the blocks, in order."""
    if isinstance(model, StochasticDepthNet):
        names = {module: name for name, module in model.named_modules()}
        return {names[block]: block.drop_path for block in model.blocks()}
    return {name: block.block_drop_path for name, block in converted_blocks(model).items()}


def _collect(architecture: str, size: int, model: nn.Module, counter: FlopCounterMode) -> NetworkCost:
    root = type(model).__name__
    flops = {name.removeprefix(f'{root}.'): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    blocks = []
    for name, drop_path in drop_paths(model).items():
        shortcut = flops.get(f'{name}.downsample', 0)
        parameters = sum(p.numel() for p in model.get_submodule(name).parameters())
        blocks.append(BlockCost(name, drop_path.p_l, parameters, flops.get(name, 0) - shortcut, shortcut))
    return NetworkCost(
        architecture,
        size,
        tuple(blocks),
        counter.get_total_flops() - sum(b.branch_flops + b.shortcut_flops for b in blocks),
        sum(p.numel() for p in model.parameters()) - sum(b.parameters for b in blocks),
    )


def cost_table(cost: NetworkCost) -> str:
    """The table that `sd-resnet info` prints."""
    width = max([12, *(len(block.name) + 1 for block in cost.blocks)])
    lines = [
        f'{cost.architecture}, {cost.image_size} x {cost.image_size} px, one image, one forward pass',
        '',
        f'{"block":<{width}}{"p_l":>8}{"parameters":>14}{"branch MFLOPs":>16}{"shortcut MFLOPs":>18}',
    ]
    for block in cost.blocks:
        lines.append(
            f'{block.name:<{width}}{block.survival_prob:>8.4f}{block.parameters:>14,}'
            f'{block.branch_flops / 1e6:>16,.1f}{block.shortcut_flops / 1e6:>18,.1f}'
        )
    lines += [
        f'{"stem, head":<{width}}{"":>8}{cost.other_parameters:>14,}{"":>16}{cost.other_flops / 1e6:>18,.1f}',
        f'{"all":<{width}}{"":>8}{cost.parameters:>14,}{cost.flops / 1e6:>34,.1f}',
        '',
        f'blocks                    {len(cost.blocks)}',
        f'expected depth            {cost.expected_depth:.2f} blocks',
        f'expected share of FLOPs   {cost.expected_share:.3f}',
    ]
    return '\n'.join(lines)


def plot_costs(cost: NetworkCost, path: Path) -> None:
    """Draw p_l and, per block, the FLOPs that a training step computes on average and those it saves."""
    figure, ((axis,),) = new_figure(1)
    blocks = range(1, len(cost.blocks) + 1)
    always = [b.shortcut_flops / 1e6 for b in cost.blocks]
    kept = [b.survival_prob * b.branch_flops / 1e6 for b in cost.blocks]
    saved = [(1 - b.survival_prob) * b.branch_flops / 1e6 for b in cost.blocks]
    axis.bar(blocks, always, 0.8, color=OTHER, label='shortcut, always computed')
    axis.bar(blocks, kept, 0.8, bottom=always, color=KEPT, label='branch, computed on average')
    bottom = [a + k for a, k in zip(always, kept)]
    axis.bar(blocks, saved, 0.8, bottom=bottom, color=DROPPED, label='branch, skipped on average')
    axis.set_xlabel('block l')
    axis.set_ylabel('FLOPs per image and forward pass (millions)')
    top = max(a + k + s for a, k, s in zip(always, kept, saved))
    axis.set_ylim(0, top * 1.28)
    axis.set_title(
        f'{cost.architecture}, {cost.image_size} px: {cost.expected_depth:.2f} of {len(cost.blocks)} blocks and '
        f'{cost.expected_share:.1%} of the FLOPs remain on average',
        fontsize=11,
    )
    right = axis.twinx()
    right.spines['top'].set_visible(False)
    marker = 'o' if len(cost.blocks) <= 60 else None
    right.plot(
        blocks,
        [b.survival_prob for b in cost.blocks],
        color=PROBABILITY,
        marker=marker,
        markersize=4,
        label='survival probability p_l',
    )
    right.set_ylim(0, 1.28)
    right.set_yticks([0, 0.25, 0.5, 0.75, 1])
    right.set_ylabel('survival probability', color=PROBABILITY)
    handles, labels = axis.get_legend_handles_labels()
    extra_handles, extra_labels = right.get_legend_handles_labels()
    right.legend(handles + extra_handles, labels + extra_labels, ncols=2, fontsize=8, loc='upper center', frameon=False)
    save_figure(figure, path)
