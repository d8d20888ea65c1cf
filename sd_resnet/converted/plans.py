"""What is to become of each drop path of a network, and the change itself, block by block."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import one_line
from .blocks import BlockDropPath, UnitBlock, take_over
from .branches import NO_ADDITION, Branch, find_branches
from .by_branch import BranchDropPath, BranchedBlock, BranchFailed, PutBack, Take
from .draws import Draws
from .trial import NEVER_USED, Slot, copy_without_data, run
from .units import Unit, find_units


@dataclass
class Plan:
    """What is to become of one block."""

    name: str
    slots: list[Slot]
    branches: list[Branch]  # of these slots, or none: the block drops as one, or its rows are masked
    unit: Unit | None
    why: str = ''  # not by branch

    @property
    def rate(self) -> float:
        """The rate that the network's own rule gives the block."""
        return max(slot.rate for slot in self.slots)

    def way(self, slot: Slot, mode: str) -> str:
        """How a drop path of it drops, and why not by branch."""
        if mode == 'batch':
            return 'block'
        if self.unit is not None:
            return f'block: {self.why}'
        by_branch = any(branch.slot == slot for branch in self.branches)
        return ('branch' if mode == 'subset' else 'row') if by_branch else f'row: {self.why}'


def make_plans(
    plain: nn.Module, slots: list[Slot], size: tuple[int, int, int], mode: str
) -> tuple[list[Plan], dict[Slot, str]]:
    """What is to become of the blocks, in the order in which they run, and why other drop paths stay."""
    if mode == 'batch':
        units, left = find_units(copy_without_data(plain), size, slots)
        return [Plan(unit.name, unit.slots, [], unit) for unit in units], left
    found = _that_run(plain, find_branches(copy_without_data(plain), size, slots), size)
    left = {slot: why for slot, why in found.items() if why in (NEVER_USED, NO_ADDITION)}
    failed = {slot: why for slot, why in found.items() if isinstance(why, str) and slot not in left}
    # A block with one drop path may compute more for it than its branch is; dropped as one it has the same odds
    partial = {slot for slot, branch in found.items() if isinstance(branch, Branch) and not branch.whole}
    units = find_units(copy_without_data(plain), size, slots)[0] if (failed or partial) and mode == 'subset' else []
    units = [unit for unit in units if unit.closed and not unit.projection]
    alone = [unit for unit in units if unit.identity and len(unit.slots) == 1 and partial.issuperset(unit.slots)]
    unit_of = {slot: unit for unit in units if unit in alone or failed.keys() & unit.slots for slot in unit.slots}
    plans: dict[str, Plan] = {}
    for slot, branch in found.items():
        if slot in left:
            continue
        why = failed.get(slot, '')
        if unit := unit_of.get(slot):
            why = next(
                (failed[each] for each in unit.slots if each in failed),
                'its branch begins with an operation that is no module',
            )
            plans[unit.name] = Plan(unit.name, unit.slots, [], unit, why)
            continue
        name = slot.holder if why else branch.block
        plan = plans.setdefault(name, Plan(name, [], [], None))
        plan.slots.append(slot)
        plan.branches += [] if why else [branch]
        plan.why = plan.why or why
    return list(plans.values()), left


def _that_run(plain: nn.Module, found: dict[Slot, Any], size: tuple[int, int, int]) -> dict[Slot, Any]:
    """The branches without those that fail on a part of the rows, in another trial run."""
    while branches := [branch for branch in found.values() if isinstance(branch, Branch)]:
        tried = copy_without_data(plain).eval()
        plans: dict[str, Plan] = {}
        for branch in branches:
            plan = plans.setdefault(branch.block, Plan(branch.block, [], [], None))
            plan.slots.append(branch.slot)
            plan.branches.append(branch)
        drop_paths: dict[Slot, Any] = {}
        for plan in plans.values():
            taken = carry_out(tried, plan, [0.5] * len(plan.slots), 'subset', Draws(False, None, size))
            drop_paths.update(zip(plan.slots, (drop_path.train() for drop_path in taken)))
        try:
            run(tried, size)
            break
        except BranchFailed as error:
            slot = next(slot for slot, drop_path in drop_paths.items() if drop_path is error.drop_path)
            kind = type(plain.get_submodule(slot.holder))
            for other in drop_paths:
                if type(plain.get_submodule(other.holder)) is not kind or other.name != slot.name:
                    continue
                why = f'on a part of the rows {kind.__name__} fails: {one_line(error.cause)}'
                found[other] = found[other].otherwise() or why
    return found


def carry_out(model: nn.Module, plan: Plan, probs: Sequence[float], mode: str, draws: Draws) -> list[Any]:
    """Convert one block; the drop paths that it has then."""
    block: Any = model.get_submodule(plan.name)
    places = [(slot.holder.removeprefix(plan.name).removeprefix('.'), slot.name) for slot in plan.slots]
    if plan.unit is not None:
        drop_path: Any = BlockDropPath(min(probs), mode).train(block.training)
        unit, inside = plan.unit, plan.unit.identity and len(places) == 1
        own = {'last_relu': unit.activation, 'projection': unit.projection, 'further': unit.further}
        others = [nn.Identity() for _ in places[1:]]
        take_over(block, UnitBlock, places, [drop_path, *others], draws, scales_inside=inside, **own)
        return [drop_path]
    branches = {branch.slot: branch for branch in plan.branches}
    drop_paths = []
    for slot, p_l in zip(plan.slots, probs):
        branch = branches.get(slot)
        if branch is None:
            drop_path = BranchDropPath(p_l, 'row')
        else:
            has_norm = any(isinstance(module, _BatchNorm) for module in block.modules())
            drop_path = BranchDropPath(p_l, mode, branch.added, branch.once, has_norm, branch.early)
        drop_paths.append(drop_path.train(block.training))
        for name, position, inner in branch.entries if branch else ():
            model.get_submodule(name).register_forward_pre_hook(Take(drop_path, position, inner), with_kwargs=True)
        if branch and branch.early:
            model.get_submodule(str(branch.end)).register_forward_hook(PutBack(drop_path))
    take_over(block, BranchedBlock, places, drop_paths, draws, taken=drop_paths)
    return drop_paths
