"""Finds the residual blocks of any network that can drop as one, by a trial run of a copy without data.

Such a block is the smallest module around a drop path that returns a tensor of its input's shape, and has a shortcut:
in autograd's graph, a path of additions, products with constants and parameters, and changes of layout. Or its shortcut
is a projection: modules, one after another.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.private_api import version_of
from .trial import BATCH, NEVER_USED, Slot, kind_of, parents, product, run

NOT_CALLED = 'it is not called as a module'
NO_SHORTCUT = 'its input does not reach its output by a shortcut'


@dataclass
class Unit:
    """A residual block, by the name of its module, with the drop paths inside in the order of their modules."""

    name: str
    slots: list[Slot] = field(default_factory=list)
    activation: str | None = None  # after the addition a ReLU: its module's name in the block, or '' for a function
    identity: bool = True  # without its branches, each of which runs once, is it the identity, or that ReLU?
    projection: tuple[str, ...] = ()  # modules in the block through which its input goes as the shortcut
    further: tuple[Any, ...] | None = None  # where it returns a tuple: the Nones after the tensor
    closed: bool = True  # does all that it adds end in its drop paths?


class _Call(NamedTuple):
    """One pass through a module."""

    x: Any
    x_node: Any
    changes_x: bool  # in place
    further: tuple[Any, ...]  # arguments
    out: Any
    further_out: tuple[Any, ...] | None  # where that is the first of a tuple of which all others are None: these

    def gives(self, node: Any) -> bool:
        """Is it this node's value, out of one other than that?"""
        return isinstance(self.out, Tensor) and self.out.grad_fn is node and self.x_node not in (None, node)


_Calls = dict[str, list[_Call]]


def find_units(tried: nn.Module, input_size: tuple[int, ...], slots: Iterable[Slot]) -> Any:
    """The blocks of a copy without data, in the order in which they run, and why other drop paths are in none.

    Returns:
        A list of `Unit`, and a dict of the reason for each slot. The copy is of no further use.
    """
    calls, passes = _trial_run(tried, input_size, slots)
    judged = {name: _judge(name, calls) for name in calls}
    left: dict[Slot, str] = {}
    for slot, count in passes.items():
        if not count:
            left[slot] = NEVER_USED
            continue
        outwards = [judged.get(name, NOT_CALLED) for name in _outwards(slot.holder)]
        # A part of a block is none: the first module that is more than that decides
        block = next((each for each in outwards if each not in (NOT_CALLED, NO_SHORTCUT)), NO_SHORTCUT)
        if isinstance(block, Unit):
            block.slots.append(slot)
            # Called once in a pass; else one branch lies inside another, or after it
            block.identity = block.identity and count == len(calls[block.name])
        else:
            left[slot] = str(outwards[0]) if outwards else NOT_CALLED
    found = {name: each for name, each in judged.items() if isinstance(each, Unit) and each.slots}
    for name in list(found):
        if outer := [each for each in _outwards(name) if each in found][1:]:
            found[outer[0]].slots += found.pop(name).slots
    for name, each in list(found.items()):
        if each.projection and not (each.identity and len(each.slots) == 1):
            left.update(dict.fromkeys(found.pop(name).slots, 'it has a projection beside several branches'))
    return list(found.values()), left


def _outwards(name: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`."""
    while name:
        yield name
        name = name.rpartition('.')[0]


def _trial_run(tried: nn.Module, input_size: tuple[int, ...], slots: Iterable[Slot]) -> tuple[_Calls, dict[Slot, int]]:
    """The calls of all modules, in the order in which they end, and how often each slot was used."""
    modules = dict(tried.named_modules())
    passes = dict.fromkeys(slots, 0)
    calls: _Calls = {}
    began: list[tuple[Any, int]] = []

    def drop_all(slot: Slot, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        passes[slot] += 1
        return torch.zeros_like(out)

    def before(module: nn.Module, args: Any) -> None:
        x = next(iter(args), None)
        began.append((x.grad_fn, version_of(x)) if isinstance(x, Tensor) else (None, 0))

    def after(name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        x, (node, version) = next(iter(args), None), began.pop()
        changed = isinstance(x, Tensor) and version_of(x) != version
        further_out = None
        if type(out) is tuple and out and all(each is None for each in out[1:]):
            out, further_out = out[0], out[1:]
        calls.setdefault(name, []).append(_Call(x, node, changed, (*args[1:], *kwargs.values()), out, further_out))

    for slot in passes:
        setattr(modules[slot.holder], slot.name, closed := nn.Identity())
        closed.register_forward_hook(partial(drop_all, slot))
    for name, module in modules.items():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(partial(after, name), with_kwargs=True)
    run(tried.eval(), input_size)
    return calls, passes


def _judge(name: str, calls: _Calls) -> Unit | str:
    """The module as a residual block, or the reason why it is none."""
    unit = Unit(name)
    for x, x_node, changes_x, further, out, unit.further in calls[name]:
        if not isinstance(x, Tensor) or not isinstance(out, Tensor):
            return 'it takes or returns something else than one tensor'
        if changes_x:
            return 'it changes its input in place'
        if x.shape[:1] != (BATCH,):
            return f'its rows are not images: it takes {product(x.shape) or "a number"} for {BATCH} images'
        if any(isinstance(value, Tensor) and value.shape[:1] == (BATCH,) for value in further):
            return 'it takes a further argument for each image'
        path = _shortcut(out.grad_fn, x_node) if out.shape == x.shape else None
        if path is None:
            path, unit.projection = _projection(name, calls, out.grad_fn, x_node)
            if not unit.projection and out.shape != x.shape:
                return f'it changes the shape from {product(x.shape[1:])} to {product(out.shape[1:])}'
            if not unit.projection:
                return NO_SHORTCUT
        kinds = [kind_of(node) for node in path]
        # A branch whose drop path is closed has no node: its addition has one parent
        one_way = all(len(parents(node)) == 1 for node in path)
        unit.closed = unit.closed and one_way
        unit.identity = unit.identity and one_way and kinds.count('sum') == 1 and 'product' not in kinds
        if 'relu' in kinds:
            unit.activation = _relu(name, calls, path[kinds.index('relu')])
            while kind_of(x_node) in ('max_pool', 'layout'):
                x_node = next(iter(parents(x_node)), None)
            if not unit.identity and kind_of(x_node) != 'relu':
                return 'it ends in a ReLU, and its input does not come out of one'
    return unit


def _shortcut(node: Any, goal: Any) -> list[Any] | None:
    """The nodes from an output back to an input, without the input's own, if a shortcut reaches it."""
    seen = set()
    paths: list[tuple[Any, list[Any]]] = [(node, [])]
    while goal is not None and paths:
        node, path = paths.pop()
        if node is goal:
            return path
        kind = kind_of(node)
        passable = kind in ('sum', 'layout', 'relu') or (kind == 'product' and len(parents(node)) == 1)
        if passable and node not in seen:
            seen.add(node)
            paths += [(parent, [*path, node]) for parent in parents(node)]
    return None


def _projection(block: str, calls: _Calls, node: Any, goal: Any) -> tuple[list[Any], tuple[str, ...]]:
    """The nodes from an output back to its addition, and the modules, in order, through which the input comes there."""
    path: list[Any] = []
    while kind_of(node) in ('relu', 'sum') and len(parents(node)) == 1 and 'sum' not in map(kind_of, path):
        path.append(node)
        (node,) = parents(node)
    modules: list[str] = []
    while goal is not None and 'sum' in map(kind_of, path):
        if node is goal:
            return path, tuple(modules)
        inside = [
            (name, call[0].x_node)
            for name, call in calls.items()
            if name.startswith(f'{block}.') and len(call) == len(calls[block]) and call[0].gives(node)
        ]
        if not inside:
            break
        name, node = min(inside, key=lambda each: len(each[0]))  # the outermost
        modules.insert(0, name.removeprefix(f'{block}.'))
    return path, ()


def _relu(block: str, calls: _Calls, node: Any) -> str:
    """The name in the block of the module that a ReLU's node is of, or '' for a function."""
    names = [name for name, runs in calls.items() if any(call.gives(node) for call in runs)]
    inside = [name.removeprefix(f'{block}.') for name in names if name.startswith(f'{block}.')]
    return min(inside, key=len, default='')
