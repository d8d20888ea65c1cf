"""Finds where the branch of each drop path begins, in any network: the border of its exclusive ancestors.

In a trial run every module's input is marked in autograd's graph. Going back from what a drop path is given, a node
belongs to the branch as long as all that uses it does. Where the border of that set runs through inputs of modules
alone, these are the branch's entries: on some rows of these inputs, the branch is computed for these rows.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..core.private_api import version_of
from .marks import Input, Run, Trial, Use, input_of, trial_run
from .trial import BATCH, NEVER_USED, Slot, kind_of, parents, product

_LAYOUT = ('layout', 'piece', 'shift')  # of nodes that leave zeros what they are
NO_ADDITION = 'what it gives is not added to a shortcut'


Entry = tuple[str, int | str, bool]  # a module, which of its arguments is rows, and are these several for an image?


@dataclass(frozen=True)
class Branch:
    """What one drop path closes. It begins and ends in one pass through `block`, a module by its name."""

    block: str
    slot: Slot
    entries: tuple[Entry, ...]
    added: bool  # is what it gives an operand of an addition, as it is?
    once: bool  # is it used once in a pass?
    whole: bool  # is all that is computed for it alone behind the entries?
    end: str | None = None  # a module after which nothing but the layout changes
    end_entries: tuple[Entry, ...] = ()  # its inputs
    early: bool = False  # are the rows put back there?

    def otherwise(self) -> 'Branch | None':
        """The next way to take it where this one fails: put back earlier, and then begun later, too."""
        if self.end and not self.early:
            return replace(self, early=True)
        if self.early and self.end_entries not in ((), self.entries):
            return replace(self, entries=self.end_entries)
        return None


def find_branches(tried: nn.Module, input_size: tuple[int, ...], slots: Iterable[Slot]) -> Any:
    """The branch of each drop path of a copy without data, in the order in which they run, or why there is none.

    Returns:
        A dict of a `Branch` for each slot, or of the reason. The copy is of no further use.
    """
    trial = trial_run(tried, input_size, slots)
    found: dict[Slot, Any] = {}
    for slot, uses in trial.uses.items():
        tried_both = [_branch(trial, slot, uses, inside) for inside in (False, True)]
        found[slot] = next((each for each in tried_both if isinstance(each, Branch)), tried_both[0])
    owners: dict[str, set[Slot]] = defaultdict(set)
    for slot, branch in found.items():
        for name, *_ in branch.entries if isinstance(branch, Branch) else ():
            owners[name].add(slot)
    for slot, branch in found.items():
        if isinstance(branch, Branch) and (shared := [n for n, *_ in branch.entries if len(owners[n]) > 1]):
            found[slot] = f'{shared[0]} begins another branch too'
    first = {slot: uses[0].number if uses else 0 for slot, uses in trial.uses.items()}
    return {slot: found[slot] for slot in sorted(found, key=lambda slot: first[slot])}


def _branch(trial: Trial, slot: Slot, uses: list[Use], inside: bool) -> Branch | str:
    """The branch of one drop path, or why it cannot be taken by itself; `inside` the modules around the drop path."""
    uses = [use for use in uses if use.node in trial.children]
    if not uses:
        return NEVER_USED
    entries: dict[Entry, None] = {}
    begun: list[Run] = []
    blocks: list[Run] = []
    last, whole = -1, True
    for use in uses:
        if use.shape[:1] != (BATCH,):
            return f'its rows are not images: it is given {product(use.shape)} for {BATCH} images'
        if not _is_added(trial, use.node):
            return NO_ADDITION
        inputs, all_of_it = _cut(trial, use, inside)
        if not inputs:
            return 'its branch begins with an operation that is no module'
        whole = whole and all_of_it
        for now, position in inputs:
            if now.changes:
                return f'{now.name} changes its input in place'
            if any(version_of(value) != version for value, version in now.given):
                return f'what {now.name} is given is changed in place'
            if not last < now.number < use.number:
                return f'{now.name} runs before another use of the drop path'
            entries[now.name, position, now.positions[position]] = None
            begun.append(now)
        around = [each for each in use.around if all(each in now.around for now, _ in inputs)]
        if not around:
            return 'no module is around all of it'
        blocks.append(around[-1])
        last = use.number
    names = {block.name for block in blocks}
    if len(names) > 1:
        return f'it is used in several modules, {" and ".join(sorted(names))}'
    for name, *_ in entries:
        if any(now not in begun for now in trial.runs[name]):
            return f'{name} runs elsewhere too'
    children = [trial.children[use.node] for use in uses]
    added = all(len(own) == 1 and kind_of(child) == 'sum' for own in children for child in own)
    if names == {''}:
        return 'no module but the whole network is around all of it'
    end = _end(trial, uses[0]) if len(uses) == 1 else None
    # How many images rows are of, the block's first argument tells
    told = all(block.positions.get(0) is False for block in blocks)
    if any(inner for *_, inner in entries) and not told:
        return 'its block is not given the images first'
    inputs_of_end: tuple[Entry, ...] = ()
    if end and end.heavy and (told or not any(end.positions.values())):
        inputs_of_end = tuple((end.name, position, inner) for position, inner in end.positions.items())
    return Branch(
        names.pop(), slot, tuple(entries), added, len(uses) == 1, whole, end.name if end else None, inputs_of_end
    )


def _cut(trial: Trial, use: Use, inside: bool) -> tuple[list[Input], bool]:
    """Inputs of modules that a use is computed from, as early among its exclusive ancestors as can be; else none.

    And whether all of the ancestors but changes of layout are behind them.
    """
    node = use.node
    ancestors, waiting = {node}, [node]
    while waiting:
        each = waiting.pop()
        for parent in parents(each):  # one whose last user comes in later is looked at again then
            border = inside and input_of(parent) and input_of(parent)[0] in use.around
            if parent not in ancestors and not border and trial.children[parent] <= ancestors:
                ancestors.add(parent)
                waiting.append(parent)
    computed: dict[Any, bool] = {}  # from inputs of modules alone
    waiting = [node]
    while waiting:
        each = waiting[-1]
        own = [parent for parent in parents(each) if parent in ancestors]
        if missing := [parent for parent in own if parent not in computed]:
            waiting += missing
            continue
        waiting.pop()
        whole = len(own) == len(parents(each)) and all(computed[parent] for parent in own)
        computed[each] = whole or input_of(each) is not None
    if not computed[node]:
        return [], False
    entries: dict[Any, None] = {}
    behind, waiting = {node}, [node]
    while waiting:
        each = waiting.pop()
        if input_of(each) and not all(parent in ancestors and computed[parent] for parent in parents(each)):
            entries[each] = None
            continue
        new = [parent for parent in parents(each) if parent not in behind]
        behind.update(new)
        waiting += new
    inputs = sorted((each.key for each in entries), key=lambda key: key[0].number)
    return inputs, all(kind_of(each) == 'layout' or input_of(each) for each in ancestors - behind)


def _end(trial: Trial, use: Use) -> Run | None:
    """The module whose output comes to a use by changes of layout alone, which leave zeros what they are."""
    (node,) = parents(use.node)
    inside = [runs[0] for runs in trial.runs.values() if len(runs) == 1 and use.around[-1] in runs[0].around]
    ends = {run.gives: run for run in reversed(inside) if run not in use.around}  # the outermost of several
    while node not in ends and len(parents(node)) == 1 and (input_of(node) or kind_of(node) in _LAYOUT):
        (node,) = parents(node)
    return ends.get(node)


def _is_added(trial: Trial, node: Any) -> bool:
    """Does it come to an addition to something else, after changes of layout and scale, slices and stacks?"""
    seen, waiting = {node}, [node]
    while waiting:
        for child in trial.children[waiting.pop()]:
            if kind_of(child) == 'sum':
                return True
            if (kind_of(child) in ('layout', 'product', 'piece') or input_of(child)) and child not in seen:
                seen.add(child)
                waiting.append(child)
    return False
