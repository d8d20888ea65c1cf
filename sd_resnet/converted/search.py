"""Finds the residual blocks of a network that is not of this package, by a trial run of a copy without data.

A residual block is the smallest module around a drop path that returns a tensor of its input's shape, which the input
reaches by a shortcut. The shortcut is found in the graph that autograd records: a path of additions, of products with
constants and parameters, and of changes of layout.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ..core.private_api import children_of, version_of

BATCH = 13  # of the trial run; a size that no network has elsewhere

NEVER_USED = 'its drop path is never used: it has no shortcut there'
NOT_CALLED = 'it is not called as a module'
NO_SHORTCUT = 'its input does not reach its output by a shortcut'

# Autograd's names of what may lie between a block's input and its output, beside a branch that is added
_LAYOUT = re.compile(
    r'(Alias|AsStrided|Clone|Expand|Permute|ReshapeAlias|Squeeze|ToCopy|Transpose|UnsafeView|Unsqueeze|View)Backward\d'
)
_SUM = re.compile(r'(Add|Sub|AddAlpha)Backward\d')
_PRODUCT = re.compile(r'(Mul|Div)Backward\d')
_RELU = re.compile(r'(Relu|Threshold)Backward\d')
_MAX_POOL = re.compile(r'MaxPool\w*Backward\d')


@dataclass(frozen=True)
class Slot:
    """Where a drop path is, or would be if the rate were not 0.

    Attributes:
        holder: Name of the module that holds it.
        name: Name of the attribute.
        rate: Its rate.
    """

    holder: str
    name: str
    rate: float


@dataclass
class Found:
    """A residual block.

    Attributes:
        name: Of the module.
        slots: The drop paths inside, in the order of their modules.
        activation: After the addition a ReLU: the name of its module in the block, or '' for a function; None for none.
        identity: Without its branches, each of which runs once, is it the identity, or that ReLU, and nothing else?
    """

    name: str
    slots: list[Slot] = field(default_factory=list)
    activation: str | None = None
    identity: bool = False

    @property
    def rate(self) -> float:
        """The rate that the network's own rule gives the block."""
        return max(slot.rate for slot in self.slots)


@dataclass
class _Call:
    """One call of a module in the trial run."""

    order: int
    x: Any
    x_node: Any
    changes_x: bool
    out: Any
    further: tuple[Any, ...]
    relu_module: str  # inside, that gave `out`


def search(model: nn.Module, input_size: tuple[int, int, int]) -> tuple[list[Found], dict[str, str]]:
    """The residual blocks, in the order in which they run, and the modules that hold a drop path but are none.

    Args:
        model: Any network; it is not touched.
        input_size: (C, H, W) of its images.

    Returns:
        The blocks, and a reason by the name of every other module that holds a drop path.

    Raises:
        RuntimeError: The trial run failed.
    """
    slots = list(find_slots(model))
    calls, used = _trial_run(model, slots, input_size)
    found: dict[str, Found] = {}
    left: dict[str, str] = {}
    for slot in slots:
        if (slot.holder, slot.name) not in used:
            left.setdefault(slot.holder, NEVER_USED)
            continue
        reason = ''
        for name in _outwards(slot.holder):
            judged = _judge(name, calls.get(name, []))
            if isinstance(judged, Found):
                block = found.setdefault(name, judged)
                block.slots.append(slot)
                # Called once in a pass; else one branch lies inside another, or after it
                block.identity = block.identity and used[slot.holder, slot.name] == len(calls[name])
                break
            reason = reason or judged
            if judged not in (NOT_CALLED, NO_SHORTCUT):  # else perhaps a part of a block
                left[slot.holder] = reason
                break
        else:
            left[slot.holder] = reason
    for name in [name for name in found if any(outer in found for outer in list(_outwards(name))[1:])]:
        outer = next(outer for outer in list(_outwards(name))[1:] if outer in found)
        found[outer].slots += found.pop(name).slots
    return sorted(found.values(), key=lambda block: calls[block.name][0].order), left


def find_slots(model: nn.Module) -> Iterator[Slot]:
    """Every drop path, and everything of its name that is an `Identity` or None because the rate is 0."""
    for holder, module in model.named_modules():
        held = {**{k: v for k, v in vars(module).items() if v is None}, **children_of(module)}
        for name, child in held.items():
            rate = _rate_of(child)
            if rate is None and re.search(r'(^|_)drop_path\d*$', name):
                rate = 0.0 if child is None or isinstance(child, nn.Identity) else None
            if rate is not None:
                yield Slot(holder, name, round(rate, 6))  # timm computes them in float32


def _rate_of(module: Any) -> float | None:
    """Of a drop path: timm's, torchvision's `StochasticDepth`, transformers' classes, or one of such a name."""
    kind = type(module).__name__
    if not isinstance(module, DropPath) and not kind.endswith(('DropPath', 'StochasticDepth')):
        return None
    rate = getattr(module, 'drop_prob', getattr(module, 'p', None))
    return float(rate or 0) if rate is None or isinstance(rate, Real) else None


def _outwards(name: str) -> Iterator[str]:
    """`a.b.c`, `a.b`, `a`."""
    while name:
        yield name
        name = name.rpartition('.')[0]


class _Closed(nn.Module):
    """A drop path that drops everything, and says that it was used."""

    def __init__(self, used: Counter[tuple[str, str]], key: tuple[str, str]) -> None:
        super().__init__()
        self.used = used
        self.key = key

    def forward(self, x: Tensor) -> Tensor:
        self.used[self.key] += 1
        return torch.zeros_like(x)


def _trial_run(
    model: nn.Module, slots: list[Slot], input_size: tuple[int, int, int]
) -> tuple[dict[str, list[_Call]], Counter[tuple[str, str]]]:
    used: Counter[tuple[str, str]] = Counter()
    calls: dict[str, list[_Call]] = {}
    began: list[Any] = []
    twin = copy_without_data(model)
    modules = dict(twin.named_modules())
    for slot in slots:
        setattr(modules[slot.holder], slot.name, _Closed(used, (slot.holder, slot.name)))

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else None
        node, version = (x.grad_fn, version_of(x)) if isinstance(x, Tensor) else (None, 0)
        began.append((x, node, version, (*args[1:], *kwargs.values())))

    activated: dict[int, tuple[str, Any]] = {}  # by the tensor that a ReLU's module gave, which is held

    for name, module in modules.items():
        if 'ReLU' in type(module).__name__:

            def activating(module: nn.Module, args: Any, out: Any, name: str = name) -> None:
                activated[id(out)] = name, out

            module.register_forward_hook(activating)

    for name in dict.fromkeys(outer for slot in slots for outer in _outwards(slot.holder)):

        def after(module: nn.Module, args: Any, kwargs: Any, out: Any, name: str = name) -> None:
            x, node, version, further = began.pop()
            order = sum(map(len, calls.values()))
            changed = isinstance(x, Tensor) and version_of(x) != version
            relu = activated.get(id(out), ('', None))[0]
            relu = relu.removeprefix(f'{name}.') if relu.startswith(f'{name}.') else ''
            calls.setdefault(name, []).append(_Call(order, x, node, changed, out, further, relu))

        modules[name].register_forward_pre_hook(before, with_kwargs=True)
        modules[name].register_forward_hook(after, with_kwargs=True)
    try:
        with torch.inference_mode(False), torch.enable_grad():
            twin.eval()(torch.zeros(BATCH, *input_size, device='meta', requires_grad=True))
    except Exception as error:
        size = ' x '.join(map(str, input_size))
        raise RuntimeError(
            f'{type(model).__name__} could not be tried on images of {size}, so its residual blocks were not found; a '
            f'whole network is needed, and the size of its images: {error}'
        ) from error
    return calls, used


def copy_without_data(model: nn.Module) -> nn.Module:
    """A float32 copy on the `meta` device, without a copy of the data on the way; its parameters take no gradient."""

    def like(tensor: Tensor) -> Tensor:
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        return torch.empty_like(tensor, device='meta', dtype=dtype)

    memo: dict[int, Any] = {}
    with torch.inference_mode(False):
        for parameter in model.parameters():
            memo[id(parameter)] = nn.Parameter(like(parameter), requires_grad=False)
        for module in model.modules():
            for tensor in (*module.buffers(recurse=False), *vars(module).values()):
                if isinstance(tensor, Tensor):
                    memo[id(tensor)] = like(tensor)
        return copy.deepcopy(model, memo)


def _judge(name: str, calls: list[_Call]) -> Found | str:
    """The module as a residual block, or the reason why it is none."""
    found = Found(name, identity=True)
    if not calls:
        return NOT_CALLED
    for call in calls:
        if not isinstance(call.x, Tensor) or not isinstance(call.out, Tensor):
            return 'it takes or returns something else than one tensor'
        if call.out.shape != call.x.shape:
            return f'it changes the shape from {_shape(call.x)} to {_shape(call.out)}'
        if call.changes_x:
            return 'it changes its input in place'
        if call.x.shape[0] != BATCH:
            return f'its rows are not images: there are {call.x.shape[0]} of them for {BATCH} images'
        if any(isinstance(value, Tensor) and value.shape[:1] == (BATCH,) for value in call.further):
            return 'it takes a further argument for each image'
        path = _shortcut(call.out.grad_fn, call.x_node)
        if path is None:
            return NO_SHORTCUT
        found.identity = found.identity and _is_identity(call.out.grad_fn, call.x_node)
        if any(_RELU.match(node) for node in path):
            found.activation = call.relu_module
            if not found.identity and not _comes_out_of_relu(call.x_node):
                return 'it ends in a ReLU, and its input does not come out of one'
    return found


def _is_identity(node: Any, goal: Any) -> bool:
    """Does nothing lie between but one addition, changes of layout, and a ReLU?"""
    additions = 0
    while node is not goal:
        name = '' if node is None else node.name()
        before = [parent for parent, _ in node.next_functions if parent is not None] if name else []
        if len(before) != 1 or not (_SUM.match(name) or _LAYOUT.match(name) or _RELU.match(name)):
            return False
        additions += bool(_SUM.match(name))
        node = before[0]
    return additions == 1


def _shortcut(node: Any, goal: Any) -> list[str] | None:
    """The names of the nodes from an output back to an input, if it is reached by a shortcut."""
    seen = set()
    paths: list[tuple[Any, list[str]]] = [(node, [])]
    while paths:
        node, path = paths.pop()
        if node is goal and node is not None:
            return path
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        before = [parent for parent, _ in node.next_functions if parent is not None]
        passes = _SUM.match(name) or _LAYOUT.match(name) or _RELU.match(name)
        if passes or (_PRODUCT.match(name) and len(before) == 1):
            paths += [(parent, [*path, name]) for parent in before]
    return None


def _comes_out_of_relu(node: Any) -> bool:
    while node is not None and (_MAX_POOL.match(node.name()) or _LAYOUT.match(node.name())):
        node = next((parent for parent, _ in node.next_functions if parent is not None), None)
    return node is not None and bool(_RELU.match(node.name()))


def _shape(x: Tensor) -> str:
    """Without the batch."""
    return ' x '.join(map(str, x.shape[1:]))
