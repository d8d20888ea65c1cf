"""Finds the residual blocks of any network, by a trial run of a copy without data.

A residual block is the smallest module around a drop path that returns a tensor of its input's shape, and has a
shortcut: in autograd's graph, a path of additions, products with constants and parameters, and changes of layout.
"""

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..core.private_api import children_of, version_of

BATCH = 13  # of the trial run; a size that no network has elsewhere

NEVER_USED = 'its drop path is never used: it has no shortcut there'
NOT_CALLED = 'it is not called as a module'
NO_SHORTCUT = 'its input does not reach its output by a shortcut'

# Autograd's names of what may lie between a block's input and its output, beside a branch that is added; and of pooling
_KIND = re.compile(
    r'(?:(?P<layout>Alias|AsStrided|Clone|Expand|Permute|ReshapeAlias|Squeeze|ToCopy|Transpose|UnsafeView|Unsqueeze|View)'
    r'|(?P<sum>Add|Sub|AddAlpha)|(?P<product>Mul|Div)|(?P<relu>Relu|Threshold)|(?P<max_pool>MaxPool\w*))Backward\d'
)


class Slot(NamedTuple):
    """The attribute `name` of the module `holder`, where a drop path is, or would be if its rate were not 0."""

    holder: str
    name: str
    rate: float


@dataclass
class Found:
    """A residual block, by the name of its module, with the drop paths inside in the order of their modules."""

    name: str
    slots: list[Slot] = field(default_factory=list)
    activation: str | None = None  # after the addition a ReLU: its module's name in the block, or '' for a function
    identity: bool = True  # without its branches, each of which runs once, is it the identity, or that ReLU?

    @property
    def rate(self) -> float:
        """The rate that the network's own rule gives the block."""
        return max(slot.rate for slot in self.slots)


_Call = tuple[Any, Any, bool, tuple[Any, ...], Any]  # input, its node, was it changed in place, further ones, output


def search(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[list[Found], dict[str, str]]:
    """The residual blocks, in the order in which they run, and why other modules that hold a drop path are none.

    The network is not touched. Raises a RuntimeError where it does not run on images of `input_size`, (C, H, W).
    """
    calls, passes = _trial_run(model, input_size)
    judged = {name: _judge(name, calls[name]) for name in calls}
    left: dict[str, str] = {}
    for slot, count in passes.items():
        if not count:
            left.setdefault(slot.holder, NEVER_USED)
            continue
        outwards = [judged.get(name, NOT_CALLED) for name in _outwards(slot.holder)]
        # A part of a block is none: the first module that is more than that decides
        block = next((each for each in outwards if each not in (NOT_CALLED, NO_SHORTCUT)), NO_SHORTCUT)
        if isinstance(block, Found):
            block.slots.append(slot)
            # Called once in a pass; else one branch lies inside another, or after it
            block.identity = block.identity and count == len(calls[block.name])
        else:
            left[slot.holder] = str(outwards[0]) if outwards else NOT_CALLED
    found = {name: each for name, each in judged.items() if isinstance(each, Found) and each.slots}
    for name in list(found):
        if outer := [each for each in _outwards(name) if each in found][1:]:
            found[outer[0]].slots += found.pop(name).slots
    return list(found.values()), left


def find_slots(model: nn.Module) -> Iterator[Slot]:
    """Every drop path, of timm or of such a name; at rate 0 also None or an `Identity` that is named like one."""
    for holder, module in model.named_modules():
        nothing = {name: None for name, value in vars(module).items() if value is None}
        for name, child in {**nothing, **children_of(module)}.items():
            rate: Any = None
            if isinstance(child, DropPath) or type(child).__name__.endswith(('DropPath', 'StochasticDepth')):
                rate = getattr(child, 'drop_prob', getattr(child, 'p', None)) or 0.0
            elif re.search(r'(^|_)drop_path\d*$', name) and (child is None or isinstance(child, nn.Identity)):
                rate = 0.0
            if isinstance(rate, Real):
                yield Slot(holder, name, round(float(rate), 6))  # timm computes them in float32


def _outwards(name: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`."""
    while name:
        yield name
        name = name.rpartition('.')[0]


def _trial_run(model: nn.Module, input_size: tuple[int, ...]) -> tuple[dict[str, list[_Call]], dict[Slot, int]]:
    """The calls of all modules around a slot, in the order in which they end, and how often each slot was used."""
    tried = copy_without_data(model)
    modules = dict(tried.named_modules())
    passes = dict.fromkeys(find_slots(model), 0)
    calls: dict[str, list[_Call]] = {}
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
        calls.setdefault(name, []).append((x, node, changed, (*args[1:], *kwargs.values()), out))

    def after_relu(name: str, module: nn.Module, args: Any, out: Any) -> None:
        if getattr(out, 'grad_fn', None) is not None:
            out.grad_fn.metadata['module'] = name

    for slot in passes:
        setattr(modules[slot.holder], slot.name, closed := nn.Identity())
        closed.register_forward_hook(partial(drop_all, slot))
    for name, module in modules.items():
        if 'ReLU' in type(module).__name__:
            module.register_forward_hook(partial(after_relu, name))
    for name in {outer for slot in passes for outer in _outwards(slot.holder)}:
        modules[name].register_forward_pre_hook(before)
        modules[name].register_forward_hook(partial(after, name), with_kwargs=True)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            tried.eval()(torch.zeros(BATCH, *input_size, device='meta', requires_grad=True))
    except Exception as error:
        failed = f'{type(model).__name__} could not be tried on images of {_product(input_size)}, so no block was found'
        raise RuntimeError(f'{failed}; a whole network is needed, and the size of its images: {error}') from error
    return calls, passes


def copy_without_data(model: nn.Module) -> nn.Module:
    """A float32 copy on the `meta` device, without a copy of the data on the way; its parameters take no gradient."""
    attributes = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {}
    with torch.inference_mode(False):
        for tensor in (*model.parameters(), *model.buffers(), *attributes):
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            like = torch.empty_like(tensor, device='meta', dtype=dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(like, requires_grad=False) if is_parameter else like
        return copy.deepcopy(model, memo)


def _judge(name: str, calls: list[_Call]) -> Found | str:
    """The module as a residual block, or the reason why it is none."""
    found = Found(name)
    for x, x_node, changes_x, further, out in calls:
        if not isinstance(x, Tensor) or not isinstance(out, Tensor):
            return 'it takes or returns something else than one tensor'
        if out.shape != x.shape:
            return f'it changes the shape from {_product(x.shape[1:])} to {_product(out.shape[1:])}'
        if changes_x:
            return 'it changes its input in place'
        if x.shape[:1] != (BATCH,):
            return f'its rows are not images: it takes {_product(x.shape) or "a number"} for {BATCH} images'
        if any(isinstance(value, Tensor) and value.shape[:1] == (BATCH,) for value in further):
            return 'it takes a further argument for each image'
        path = _shortcut(out.grad_fn, x_node)
        if path is None:
            return NO_SHORTCUT
        kinds = [_kind(node) for node in path]
        # A branch whose drop path is closed has no node: its addition has one parent
        one_way = all(len(_parents(node)) == 1 for node in path)
        found.identity = found.identity and one_way and kinds.count('sum') == 1 and 'product' not in kinds
        if 'relu' in kinds:
            relu = path[kinds.index('relu')].metadata.get('module', '')
            found.activation = relu.removeprefix(f'{name}.') if relu.startswith(f'{name}.') else ''
            while _kind(x_node) in ('max_pool', 'layout'):
                x_node = next(iter(_parents(x_node)), None)
            if not found.identity and _kind(x_node) != 'relu':
                return 'it ends in a ReLU, and its input does not come out of one'
    return found


def _shortcut(node: Any, goal: Any) -> list[Any] | None:
    """The nodes from an output back to an input, without the input's own, if a shortcut reaches it."""
    seen = set()
    paths: list[tuple[Any, list[Any]]] = [(node, [])]
    while goal is not None and paths:
        node, path = paths.pop()
        if node is goal:
            return path
        parents, kind = _parents(node), _kind(node)
        passable = kind in ('sum', 'layout', 'relu') or (kind == 'product' and len(parents) == 1)
        if passable and node not in seen:
            seen.add(node)
            paths += [(parent, [*path, node]) for parent in parents]
    return None


def _kind(node: Any) -> str | None:
    match = None if node is None else _KIND.match(node.name())
    return match and match.lastgroup


def _parents(node: Any) -> list[Any]:
    return [] if node is None else [parent for parent, _ in node.next_functions if parent is not None]


def _product(sizes: Iterable[int]) -> str:
    return ' x '.join(map(str, sizes))
