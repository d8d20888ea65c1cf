"""Stochastic depth that skips work for any residual network of timm, in place."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..core.drop_path import StochasticDepth
from ..core.private_api import remove_loading_hook
from ..core.ramp import as_ramp
from ..core.refusals import check_settings, check_sync
from ..core.schedules import Schedule, survival_probs
from ..resnets.paper_rescaling import fold_all
from .blocks import BlockDropPath, ConvertedBlock, Draws, take_over
from .search import NEVER_USED, Found, copy_without_data, find_slots, search


@dataclass(frozen=True)
class Conversion:
    """What `convert` has done, by the names of modules."""

    survival_probs: dict[str, float]  # p_1 .. p_L of the converted blocks, in the order in which they run
    left_alone: dict[str, str]  # why the others with a drop path keep it


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
    where it has two. State dict and evaluation stay as they are, bit for bit: as in timm, the branch is divided by p_l
    in training. A converted network is converted anew. TorchScript sees plain blocks with timm's drop path.

    Args:
        model: A network of timm, or one with timm's `DropPath` in its blocks.
        drop_path_rate: The highest rate, 1 - p_L, in [0, 1). None keeps the rates that the network was built with.
        schedule: `'timm'`: the network's own rule, l-1 over L-1 where it was built at rate 0; or see `survival_probs`.
        mode: `'subset'`, `'batch'` or `'row'`; see `StochasticDepth`.
        sync: In batch mode all ranks of a distributed training drop the same blocks.
        ramp: (kind, steps), see `DropPathRamp`; adds one key to the state dict.
        input_size: (C, H, W) of the images; None is the network's own.

    Raises:
        ValueError: An argument is not allowed, or there is no block to convert.
        RuntimeError: The network does not run on images of `input_size`.
    """
    check_settings(1.0, mode)
    check_sync(sync)
    kind = type(model).__name__
    if any(isinstance(m, StochasticDepth) and not isinstance(m, BlockDropPath) for m in model.modules()):
        raise ValueError(f"model must be timm's, got {kind}, which skips already: use set_drop_path")
    draws = Draws(sync, as_ramp(ramp, next((p.device for p in model.parameters()), None)))
    plain = copy_without_data(model)  # a model that is converted already stays so if anything fails
    unconvert(plain)
    found, left_alone = search(plain, own_input_size(model) if input_size is None else input_size)
    if not found:
        reasons = '; '.join(f'{name}: {reason}' for name, reason in list(left_alone.items())[:3])
        raise ValueError(f'{kind} has no residual block that can be skipped ({reasons or "it holds no drop path"})')
    probs = _survival_probs(found, drop_path_rate, schedule)

    unconvert(model)
    blocks: list[Any] = [model.get_submodule(each.name) for each in found]
    for block, each, p_l in zip(blocks, found, probs):
        drop_path = BlockDropPath(p_l, mode).train(block.training)
        drop_path.network_drops, drop_path.ramped = min(probs) < 1, draws.ramp is not None
        take_over(block, each, drop_path, draws)
    if draws.ramp is not None:
        draws.ramp.govern([block.block_drop_path for block in blocks])
        draws.counting = blocks
        model.drop_path_ramp = draws.ramp
    model.register_load_state_dict_pre_hook(_before_loading)

    rates = {slot.holder: slot.rate for slot in find_slots(plain)}
    save_nothing = [name for name, reason in left_alone.items() if reason != NEVER_USED and rates[name] > 0]
    if save_nothing:
        few = ', '.join(f'{name} (rate {rates[name]:g}): {left_alone[name]}' for name in save_nothing[:3])
        warnings.warn(f'{kind}: {len(save_nothing)} drop paths are left and save no work: {few}', stacklevel=2)
    return Conversion({block.name: p_l for block, p_l in zip(found, probs)}, left_alone)


def unconvert(model: nn.Module) -> None:
    """Undo `convert`, in a network or a module around one: the blocks' own classes, drop paths and rates are back."""
    for module in list(model.modules()):
        if isinstance(module, ConvertedBlock):
            module.restore()
        if remove_loading_hook(module, _before_loading) and hasattr(module, 'drop_path_ramp'):
            del module.drop_path_ramp


def converted_blocks(model: nn.Module) -> dict[str, ConvertedBlock]:
    """The converted blocks of a network, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ConvertedBlock)}


def own_input_size(model: Any, built_with: Mapping[str, Any] | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network is built for; `built_with` are the arguments, where it is wrapped."""
    config, given = getattr(model, 'pretrained_cfg', None), built_with or {}
    if not config or 'input_size' not in config:
        raise ValueError(f'input_size must be given for {type(model).__name__}, which does not state its own')
    channels, *size = config['input_size']
    size = given.get('img_size') or getattr(getattr(model, 'patch_embed', None), 'img_size', None) or size
    height, width = (size, size) if isinstance(size, int) else size
    return given.get('in_chans') or getattr(model, 'in_chans', None) or channels, height, width


def _before_loading(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
    """A network loads what one with a ramp, or one of the first edition, has saved."""
    if getattr(model, 'drop_path_ramp', None) is None:
        state_dict.pop(f'{prefix}drop_path_ramp.step', None)
    fold_all(model, state_dict, prefix, metadata, args[-1])  # where errors are collected


def _survival_probs(found: Sequence[Found], rate: float | None, schedule: Schedule) -> tuple[float, ...]:
    own = [block.rate for block in found]
    if rate is None and isinstance(schedule, str):
        rate = max(own)
    if schedule != 'timm' or not any(own):
        return survival_probs(len(found), rate, schedule)
    (p_last,) = survival_probs(1, rate)  # checks it
    return tuple(1 - (1 - p_last) * r / max(own) for r in own)
