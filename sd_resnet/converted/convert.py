"""Stochastic depth that skips work for any residual network of timm, in place."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.draws import check_sync
from ..core.drop_path import StochasticDepth, check_settings
from ..core.private_api import remove_loading_hook
from ..core.ramp import as_ramp
from ..core.schedules import Schedule, survival_probs
from ..resnets.paper_rescaling import fold_all
from .blocks import BlockDropPath, ConvertedBlock, Draws, converted_class
from .search import NEVER_USED, Found, copy_without_data, find_slots, search

RAMP = 'drop_path_ramp'  # the ramp's name in a network


@dataclass(frozen=True)
class Conversion:
    """What `convert` has done.

    Attributes:
        survival_probs: p_1 .. p_L of the converted blocks by their names, in the order in which they run.
        left_alone: Why the other modules with a drop path keep theirs, by their names.
    """

    survival_probs: dict[str, float]
    left_alone: dict[str, str]


def convert(
    model: nn.Module,
    drop_path_rate: float | None = None,
    schedule: Schedule = 'timm',
    mode: str = 'subset',
    sync: bool = True,
    ramp: tuple[str, int] | None = None,
    input_size: tuple[int, int, int] | None = None,
) -> Conversion:
    """Let a network's residual blocks skip the work that they drop, in place.

    The blocks are found through their drop paths, which are taken over. Each drops as one unit, with both branches
    where it has two. As in timm, the branch is divided by p_l in training and evaluation is unscaled, so state dict and
    evaluation stay as they are, bit for bit. A network that is converted already is converted anew.
    `torch.jit.script` puts plain blocks with timm's drop path in the place of the converted ones.

    Args:
        model: A network of timm, or one with timm's `DropPath` in its blocks.
        drop_path_rate: The highest rate, 1 - p_L, in [0, 1). None keeps the rates that the network was built with.
        schedule: `'timm'`: the network's own rule, l-1 over L-1 where it was built at rate 0; or see `survival_probs`.
        mode: `'subset'`, `'batch'` or `'row'`; see `StochasticDepth`.
        sync: In batch mode all ranks of a distributed training drop the same blocks.
        ramp: (kind, steps), see `DropPathRamp`; adds one key to the state dict.
        input_size: (C, H, W) of the images; None is the network's own.

    Returns:
        What was converted, and what was left alone.

    Raises:
        ValueError: An argument is not allowed, or there is no block to convert.
        RuntimeError: The network does not run on images of `input_size`.
    """
    check_settings(1.0, mode)
    check_sync(sync)
    if any(isinstance(m, StochasticDepth) and not isinstance(m, BlockDropPath) for m in model.modules()):
        raise ValueError(f"model must be timm's, got {type(model).__name__}, which skips already: use set_drop_path")
    first = next(model.parameters(), None)
    new_ramp = as_ramp(ramp, None if first is None else first.device)
    plain = copy_without_data(model)  # a model that is converted already stays so if anything fails
    unconvert(plain)
    rates = {slot.holder: slot.rate for slot in find_slots(plain)}
    found, left_alone = search(plain, own_input_size(model) if input_size is None else input_size)
    name = type(model).__name__
    if not found:
        reasons = '; '.join(f'{name}: {reason}' for name, reason in list(left_alone.items())[:3])
        raise ValueError(f'{name} has no residual block that can be skipped ({reasons or "it holds no drop path"})')
    probs = _survival_probs(found, drop_path_rate, schedule)

    unconvert(model)
    draws = Draws(sync, new_ramp)
    modules = dict(model.named_modules())
    drop_paths = []
    for block, p_l in zip(found, probs):
        module: Any = modules[block.name]
        drop_path = BlockDropPath(p_l, mode).train(module.training)
        drop_path.network_drops = min(probs) < 1
        drop_path.ramped = new_ramp is not None
        slots = [(slot.holder.removeprefix(block.name).removeprefix('.'), slot.name) for slot in block.slots]
        # Not through nn.Module's __setattr__: nothing here is one more child of the block
        module.__dict__.update(
            draws=draws,
            last_relu=block.activation,
            scales_inside=block.identity and len(block.slots) == 1,
            plain_forward=module.__dict__.pop('forward', None),
            plain_slots=[(holder, slot, getattr(module.get_submodule(holder), slot)) for holder, slot in slots],
        )
        for place, (holder, slot) in enumerate(slots):
            setattr(module.get_submodule(holder), slot, nn.Identity() if place else drop_path)
        own_class: Any = type(module)
        module.__class__ = converted_class(own_class)
        drop_paths.append(drop_path)
    if new_ramp is not None:
        new_ramp.govern(drop_paths)
        draws.counting = [modules[block.name] for block in found]
        model.add_module(RAMP, new_ramp)
    model.register_load_state_dict_pre_hook(_before_loading)
    computing = {
        name: rate for name, rate in rates.items() if left_alone.get(name, NEVER_USED) != NEVER_USED and rate > 0
    }
    if computing:
        listed = ', '.join(f'{name} (rate {rate:g}): {left_alone[name]}' for name, rate in list(computing.items())[:3])
        warnings.warn(
            f'{type(model).__name__}: {len(computing)} drop paths are left as they are and save no work: {listed}',
            stacklevel=2,
        )
    return Conversion({block.name: p_l for block, p_l in zip(found, probs)}, left_alone)


def unconvert(model: nn.Module) -> None:
    """Undo `convert`, in place: the blocks' own classes, and the drop paths with the rates that they had.

    Args:
        model: A converted network, or a module around one.
    """
    for module in list(model.modules()):
        if isinstance(module, ConvertedBlock):
            module.restore()
        if remove_loading_hook(module, _before_loading) and hasattr(module, RAMP):
            delattr(module, RAMP)


def converted_blocks(model: nn.Module) -> dict[str, ConvertedBlock]:
    """The converted blocks of a network by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ConvertedBlock)}


def _before_loading(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """A network loads what one with a ramp, or one of the first edition, has saved."""
    if getattr(model, RAMP, None) is None:
        state_dict.pop(f'{prefix}{RAMP}.step', None)
    fold_all(model, state_dict, prefix, local_metadata, error_msgs)


def _survival_probs(found: Sequence[Found], rate: float | None, schedule: Schedule) -> tuple[float, ...]:
    own = [block.rate for block in found]
    if schedule != 'timm' or not any(own):
        if rate is None and isinstance(schedule, str):
            rate = max(own)
        return survival_probs(len(found), rate, schedule)
    if rate is not None:
        survival_probs(1, rate)  # checks it
        own = [rate * r / max(own) for r in own]
    return tuple(1 - r for r in own)


def own_input_size(model: Any) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network is built for."""
    config = getattr(model, 'pretrained_cfg', None)
    if not config or 'input_size' not in config:
        raise ValueError(f'input_size must be given for {type(model).__name__}, which does not state its own')
    channels, *size = config['input_size']
    own = getattr(getattr(model, 'patch_embed', None), 'img_size', None) or size
    return getattr(model, 'in_chans', None) or channels, own[0], own[1]
