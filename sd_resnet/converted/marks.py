"""A trial run in which every module's input is marked in autograd's graph."""

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from ..core.private_api import version_of
from .private_api import size_before_view, tree_leaves
from .trial import BATCH, Slot, kind_of, parents, run


@dataclass(eq=False)
class Run:
    """One pass through a module, or through a drop path."""

    name: str
    number: int  # in the order in which they begin
    around: tuple['Run', ...] = ()  # passes that it is part of
    positions: dict[int | str, bool] = field(default_factory=dict)  # of inputs that are marked: several rows an image?
    gives: Any = None  # the node of its output
    heavy: bool = False  # does it multiply by a matrix?
    marked: list[tuple[Tensor, int]] = field(default_factory=list)  # its inputs, and how often they had been changed
    changes: bool = False  # its input, in place
    given: list[tuple[Tensor, int]] = field(default_factory=list)  # its arguments, and their versions


Input = tuple[Run, int | str]  # of a module: the pass, and which argument


@dataclass(eq=False)
class Use(Run):
    """One pass through a drop path, with the node of what it gives."""

    node: Any = None
    shape: tuple[int, ...] = ()


class _Mark(Function):
    """The identity, as a node that says whose argument it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: Any) -> Tensor:
        ctx.key = key
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None


@dataclass
class Trial:
    """What a trial run shows."""

    runs: dict[str, list[Run]] = field(default_factory=lambda: defaultdict(list))
    uses: dict[Slot, list[Use]] = field(default_factory=dict)
    children: dict[Any, set[Any]] = field(default_factory=lambda: defaultdict(set))  # of each node: what uses it


def trial_run(tried: nn.Module, input_size: tuple[int, ...], slots: Iterable[Slot]) -> Trial:
    trial, running, count = Trial(), list[Run](), itertools.count()
    modules = dict(tried.named_modules())

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        heavy = any(parameter.dim() > 1 for parameter in module.parameters())
        now = Run(name, next(count), tuple(running), heavy=heavy)
        trial.runs[name].append(now)
        running.append(now)

        def mark(position: int | str, value: Any) -> Any:
            if not (isinstance(value, Tensor) and value.requires_grad and value.dim()):
                return value
            rows = value.shape[0]
            by_image = rows == BATCH or (rows % BATCH == 0 and _is_by_image(value.grad_fn))
            now.given.append((value, version_of(value)))
            if not by_image:
                return value
            now.positions[position] = rows != BATCH
            return _Mark.apply(value, (now, position))

        args = tuple(mark(position, value) for position, value in enumerate(args))
        now.marked = [(value, version_of(value)) for value in args if isinstance(value, Tensor)]
        return args, {position: mark(position, value) for position, value in kwargs.items()}

    def after(module: nn.Module, args: Any, out: Any) -> None:
        now = running.pop()
        now.changes = any(version_of(value) != version for value, version in now.marked)
        now.marked.clear()
        first = out[0] if isinstance(out, tuple) and out else out
        now.gives = first.grad_fn if isinstance(first, Tensor) and first.dim() else None

    def use(slot: Slot, module: nn.Module, args: Any, out: Tensor) -> Tensor:
        out = _Mark.apply(out, None)
        now = Use(slot.path, next(count), tuple(running), node=out.grad_fn, shape=tuple(out.shape))
        trial.uses[slot].append(now)
        return out

    closed = set()
    for slot in slots:
        setattr(modules[slot.holder], slot.name, drop_path := nn.Identity())
        drop_path.register_forward_hook(partial(use, slot))
        trial.uses[slot] = []
        closed.add(slot.path)
    for name, module in modules.items():
        if name not in closed:
            module.register_forward_pre_hook(partial(before, name), with_kwargs=True)
            module.register_forward_hook(after)
    out = run(tried.eval(), input_size)
    nodes = [leaf.grad_fn for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    for node in nodes:
        trial.children[node].add('output')
    seen: set[Any] = set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            for parent in parents(node):
                trial.children[parent].add(node)
                nodes.append(parent)
    return trial


def input_of(node: Any) -> Any:
    """Of a mark, which input of which pass through a module it is."""
    return getattr(node, 'key', None)


def _is_by_image(node: Any) -> bool:
    """Do the rows of a node's value, some for each image, follow the order of the images? Of a view one can tell."""
    while kind_of(node) == 'layout':
        sizes = size_before_view(node)
        if sizes is not None and sizes[:1] == (BATCH,):
            return True
        if sizes is None and not node.name().startswith(('Clone', 'Alias')):
            return False
        (node,) = parents(node)
    return False
