"""Stochastic depth that skips work for any residual network, in place."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from timm.models import is_model
from torch import nn

from ..core.drop_path import StochasticDepth
from ..core.ramp import as_ramp
from ..core.refusals import check_settings, check_sync
from ..core.schedules import Schedule, survival_probs
from ..resnets.paper_rescaling import fold_all
from .blocks import BlockDropPath, Converted, ConvertedBlock, change_class
from .by_branch import BranchDropPath, BranchedNetwork
from .draws import Draws
from .plans import Plan, carry_out, make_plans
from .private_api import remove_hooks
from .trial import NEVER_USED, copy_without_data, find_slots, is_drop_path, product, stated_rate, why_unfit


@dataclass(frozen=True)
class Conversion:
    """What `convert` has done, by the names of modules."""

    survival_probs: dict[str, float]  # p_1 .. p_L of the converted blocks, in the order in which they run
    drop_paths: dict[str, str]  # how each drop path of theirs drops: 'branch', 'block' or 'row', and why not by branch
    left_alone: dict[str, str]  # why the others stay as they are


def convert(
    model: nn.Module,
    drop_path_rate: float | None = None,
    schedule: Schedule = 'timm',
    mode: str = 'subset',
    sync: bool = True,
    ramp: tuple[str, int] | None = None,
    input_size: tuple[int, int, int] | None = None,
    drop_path: type | tuple[type, ...] = (),
) -> Conversion:
    """Let a network skip the work that its drop paths drop, in place.

    The drop paths are found, by timm's class or by name, and taken over. In subset mode each drops for itself, as
    timm's does: its branch, which a trial run without data finds, runs on the rows that survive; a block of which that
    is not possible drops as one. In batch mode every block drops as one, with whatever it adds; in the other modes each
    image has draws of its own, also where torchvision's `StochasticDepth(p, 'batch')` had one for all. State dict and
    evaluation stay as they are, bit for bit: as in timm, a branch is divided by p_l in training. A converted network is
    converted anew. TorchScript sees plain blocks with timm's drop path. A warning names what keeps computing all.

    Args:
        model: A network of timm, torchvision or transformers, or any other with a drop path in its blocks.
        drop_path_rate: The highest rate, 1 - p_L, in [0, 1). None keeps the rates that the network was built with.
        schedule: `'timm'`: the network's own rule, l-1 over L-1 where it was built at rate 0; or see `survival_probs`.
        mode: `'subset'`, `'batch'` or `'row'`; see `StochasticDepth`.
        sync: In batch mode all ranks of a distributed training drop the same blocks.
        ramp: (kind, steps), see `DropPathRamp`; adds one key to the state dict.
        input_size: (C, H, W) of the images; None is the network's own, which timm's and transformers' state.
        drop_path: Further classes of drop paths, with their rate in `drop_prob` or `p`.

    Raises:
        ValueError: An argument is not allowed, or there is no block to convert.
        RuntimeError: The network does not run on images of `input_size`.
    """
    check_settings(1.0, mode)
    check_sync(sync)
    kind = type(model).__name__
    if any(isinstance(m, StochasticDepth) and not isinstance(m, _OURS) for m in model.modules()):
        raise ValueError(f"model must be timm's, got {kind}, which skips already: use set_drop_path")
    size = own_input_size(model) if input_size is None else input_size
    if not (isinstance(size, list | tuple) and len(size) == 3):
        raise ValueError(f'input_size must be None or (channels, height, width), got {size!r}')
    if not all(isinstance(each, type) for each in (drop_path if isinstance(drop_path, tuple) else (drop_path,))):
        raise ValueError(f'drop_path must be a class, or a tuple of classes, got {drop_path!r}')
    draws = Draws(sync, as_ramp(ramp, next((p.device for p in model.parameters()), None)), size)
    plain = copy_without_data(model)  # a model that is converted already stays so if anything fails
    _restored(plain)
    kinds = drop_path if isinstance(drop_path, tuple) else (drop_path,)
    unfit = _unfit(model, kinds)
    try:
        plans, left_alone = make_plans(plain, list(find_slots(plain, kinds)), size, mode)
    except Exception as error:
        failed = f'{kind} could not be tried on images of {product(size)}, so no block was found'
        raise RuntimeError(f'{failed}; a whole network is needed, and the size of its images: {error}') from error
    how = {slot: plan.way(slot, mode) for plan in plans for slot in plan.slots}
    if not how or (mode != 'row' and all(why.startswith('row') for why in how.values())):
        reasons = '; '.join(f'{slot.path}: {reason}' for slot, reason in [*how.items(), *left_alone.items()][:3])
        raise ValueError(f'{kind} has no residual block that can be skipped ({reasons or "it holds no drop path"})')
    probs = _survival_probs(plans, drop_path_rate, schedule)

    _restored(model)
    drop_paths = [d for plan, own in zip(plans, probs) for d in carry_out(model, plan, own, mode, draws)]
    for each in drop_paths:
        each.network_drops, each.ramped = any(d.drops for d in drop_paths), draws.ramp is not None
    if draws.ramp is not None:
        draws.ramp.govern(drop_paths)
        draws.counting = [model.get_submodule(plan.name) for plan in plans]
        model.drop_path_ramp = draws.ramp
    model.register_load_state_dict_pre_hook(_before_loading)
    if by_branch := [drop_path for drop_path in drop_paths if isinstance(drop_path, BranchDropPath)]:
        change_class(model, BranchedNetwork, by_branch=by_branch)

    conversion = Conversion(
        {plan.name: min(own) for plan, own in zip(plans, probs)},
        {slot.path: why for slot, why in how.items()},
        {slot.path: why for slot, why in left_alone.items()} | unfit,
    )
    rates = {path: stated_rate(model.get_submodule(path)) for path in unfit} | {s.path: s.rate for s in left_alone}
    rates |= {slot.path: 1 - p_l for plan, own in zip(plans, probs) for slot, p_l in zip(plan.slots, own)}
    saving_nothing = {path: why for path, why in conversion.left_alone.items() if why != NEVER_USED}
    if mode != 'row':
        saving_nothing |= {path: why for path, why in conversion.drop_paths.items() if why.startswith('row')}
    by_reason: dict[str, list[str]] = {}
    for path, why in saving_nothing.items():
        if rates[path] != 0:
            rate = f'{rates[path]:.4g}' if isinstance(rates[path], float) else rates[path]
            by_reason.setdefault(why, []).append(f'{path} (rate {rate})')
    if by_reason:
        named = '; '.join(f'{", ".join(paths)}: {why}' for why, paths in by_reason.items())
        warnings.warn(f'{kind}: {sum(map(len, by_reason.values()))} drop paths save no work: {named}', stacklevel=2)
    return conversion


_OURS = (BlockDropPath, BranchDropPath)


def unconvert(model: nn.Module) -> None:
    """Undo `convert`, in place: the blocks' own classes, drop paths and rates are back, and timm's name of the network.

    Args:
        model: A converted network, a part of one, or a module around one; anything else stays as it is.
    """
    for network in _restored(model):
        config: Any = getattr(network, 'pretrained_cfg', None)
        name = str(config.get('architecture')) if isinstance(config, dict) else ''
        if name.startswith('sd_') and is_model(name.removeprefix('sd_')):
            network.pretrained_cfg = network.default_cfg = {**config, 'architecture': name.removeprefix('sd_')}


def _restored(model: nn.Module) -> list[Any]:
    """The networks in it that were converted, and are no more."""
    networks = []
    for module in list(model.modules()):
        if isinstance(module, Converted):
            module.restore()
        if remove_hooks(module, lambda hook: hook is _before_loading):
            networks.append(module)
            if hasattr(module, 'drop_path_ramp'):
                del module.drop_path_ramp
    return networks


def converted_blocks(model: nn.Module) -> dict[str, ConvertedBlock]:
    """The converted blocks of a network, by their names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ConvertedBlock)}


def own_input_size(model: Any, built_with: Mapping[str, Any] | None = None) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network is built for; `built_with` are the arguments, where it is wrapped."""
    given, config = built_with or {}, getattr(model, 'config', None)  # of transformers
    stated = (getattr(model, 'pretrained_cfg', None) or {}).get('input_size')
    if not stated and (converted := list(converted_blocks(model).values())):
        return converted[0].draws.input_size
    if not stated and (size := getattr(config, 'image_size', None)):
        stated = (getattr(config, 'num_channels', 3), *(size if isinstance(size, list | tuple) else (size, size)))
    if not stated:
        raise ValueError(f'input_size must be given for {type(model).__name__}, which does not state its own')
    channels, *size = stated
    size = given.get('img_size') or getattr(getattr(model, 'patch_embed', None), 'img_size', None) or size
    height, width = (size, size) if isinstance(size, int) else size
    return given.get('in_chans') or getattr(model, 'in_chans', None) or channels, height, width


def _unfit(model: nn.Module, kinds: tuple[type, ...]) -> dict[str, str]:
    """Why drop paths in whose places no other can stand stay; a ValueError for those that were named."""
    unfit: dict[str, str] = {}
    for path, module in model.named_modules():
        if is_drop_path(module, kinds) and (why := why_unfit(module)):
            if isinstance(module, kinds):
                raise ValueError(f'drop_path must be a class with its rate in drop_prob or p, got one of which {why}')
            unfit[path] = why
    return unfit


def _before_loading(model: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
    """A network loads what one with a ramp, or one of the first edition, has saved."""
    if getattr(model, 'drop_path_ramp', None) is None:
        state_dict.pop(f'{prefix}drop_path_ramp.step', None)
    fold_all(model, state_dict, prefix, metadata, args[-1])  # where errors are collected


def _survival_probs(plans: Sequence[Plan], rate: float | None, schedule: Schedule) -> list[list[float]]:
    """p_l of each drop path of each block."""
    highest = max(plan.rate for plan in plans)
    if rate is None and isinstance(schedule, str):
        rate = highest
    if schedule != 'timm' or not highest:
        return [[p_l] * len(plan.slots) for plan, p_l in zip(plans, survival_probs(len(plans), rate, schedule))]
    (p_last,) = survival_probs(1, rate)  # checks it
    return [[1 - (1 - p_last) * slot.rate / highest for slot in plan.slots] for plan in plans]
