"""The operations that make a dropped branch cost nothing, in forward and in backward.

`skip` is for a branch that nothing of survives. The others are subset mode's, where the branch runs on a window of k
neighbouring rows of the mini-batch. They come in pairs: `take_rows` and `put_rows` around a block with an identity
shortcut, which is replaced as a whole on the window's rows; `fork` and `join` around a projection. In a compiled graph,
which knows a window by an index, `fork_in_graph` and `join_in_graph` are around every block. Under `torch.func` and
forward-mode differentiation ordinary operations stand in their place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from .draws import Window, positions
from .private_api import hooks_on_saved_tensors, transforming, version_of


@torch.compiler.disable
def skip(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """`x` itself, with zero gradients for `parameters`.

    A zero gradient is not an absent one: weight decay and momentum still act, as in the paper's code, and
    DistributedDataParallel sees every parameter become ready, so it needs no `find_unused_parameters`.
    """
    if transforming():
        return x
    return _Skip.apply(x, *(p for p in parameters if p.requires_grad))


@torch.compiler.disable
def take_rows(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """`x`, for `put_rows` and nothing else, and its rows in the window, which keep the memory format.

    Args:
        x: (N, ...).
        window: 1 to N rows.
    """
    if transforming():
        return x, x.index_select(0, _index(x, window))
    return _Take.apply(x, window)


@torch.compiler.disable
def put_rows(x: Tensor, rows: Tensor, window: Window, relu: bool) -> Tensor:
    """`x` with `rows`, or with their ReLU, in place of the window that `take_rows` has taken.

    The ReLU is applied on the way, so that no second copy of the rows is kept for backward.

    Args:
        x: (N, ...), from `take_rows`.
        rows: (k, ...).
        window: The same.
        relu: Apply it?
    """
    if transforming():
        return x.index_copy(0, _index(x, window), rows.relu() if relu else rows)
    return _Put.apply(x, rows, window, relu)


@torch.compiler.disable
def fork(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """`x`, for the shortcut, and its rows in the window, for the branch, which keep the memory format.

    Args:
        x: (N, ...).
        window: 1 to N rows.
    """
    if transforming():
        return x, x.index_select(0, _index(x, window))
    return _Fork.apply(x, window)


@torch.compiler.disable
def join(shortcut: Tensor, branch: Tensor, window: Window, factor: float, relu: bool) -> Tensor:
    """Add `factor * branch` to the window's rows of the shortcut. The result is a new tensor.

    Args:
        shortcut: (N, ...).
        branch: (k, ...).
        window: What `fork` was given.
        factor: Of the branch.
        relu: Apply it to all rows of the sum?
    """
    dtype = torch.promote_types(shortcut.dtype, branch.dtype)  # autocast may have made them different
    shortcut, branch = shortcut.to(dtype), branch.to(dtype)
    if transforming():
        out = shortcut.index_add(0, _index(shortcut, window), branch, alpha=factor)
        return out.relu() if relu else out
    return _Join.apply(shortcut, branch, window, factor, relu)


def fork_in_graph(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """`fork`, in a compiled graph: the window is of tensors."""
    return _ForkByIndex.apply(x, window.start, window.rows)


def join_in_graph(shortcut: Tensor, branch: Tensor, window: Window, factor: float) -> Tensor:
    """`join`, in a compiled graph: to the rows that are alive, and without a ReLU, which is fused anyway."""
    dtype = torch.promote_types(shortcut.dtype, branch.dtype)
    return _JoinByIndex.apply(shortcut.to(dtype), branch.to(dtype), window.start, window.alive, factor)


class gathered_again(saved_tensors_hooks):
    """While active, an operation on `rows`, taken by `take_rows` or `fork`, keeps no copy of them for backward.

    Those keep their input, which other operations keep anyway; the rows are taken from it again in backward. What else
    the operation keeps goes to the hooks that were active before.

    Raises:
        LookupError: This version of torch does not tell which hooks are active.
    """

    @torch.compiler.disable
    def __init__(self, rows: Tensor) -> None:
        taken: Any = rows.grad_fn
        address, layout = rows.data_ptr(), (rows.shape, rows.stride(), rows.dtype)
        outer_pack, outer_unpack = hooks_on_saved_tensors() or (_pack, _unpack)

        @torch.compiler.disable
        def pack(tensor: Tensor) -> Any:
            if tensor.data_ptr() == address and (tensor.shape, tensor.stride(), tensor.dtype) == layout:
                return None
            return (outer_pack(tensor),)

        @torch.compiler.disable
        def unpack(kept: Any) -> Tensor:
            if kept is not None:
                return outer_unpack(*kept)
            (x,) = taken.saved_tensors
            return _rows(x, taken.window)

        super().__init__(pack, unpack)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, version_of(tensor)


def _unpack(kept: tuple[Tensor, int]) -> Tensor:
    """As torch does where no hooks are active."""
    tensor, version = kept
    if version_of(tensor) != version:
        raise RuntimeError('a tensor needed for gradient computation has been modified by an inplace operation')
    return tensor


class _Skip(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        # Sizes and strides only: keeping the weights for backward would cost memory and tie it to their version.
        ctx.layouts = [(p.shape, p.stride(), p.dtype, p.device) for p in parameters]
        return x.detach()  # not a view for autograd: compiled code is specialised on whether its input is one

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        zeros = (
            torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
            for shape, stride, dtype, device in ctx.layouts
        )
        return grad, *zeros


class _Take(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
        ctx.window = window
        ctx.save_for_backward(x)  # for gathered_again
        return x.view_as(x), _rows(x, window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> Any:
        return _changed(grad, grad_rows, ctx.window, _replace), None


class _Put(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, window: Window, relu: bool) -> Tensor:
        ctx.window, ctx.relu = window, relu
        out = _changed(x, rows, window, _replace_by_relu if relu else _replace)
        if relu:
            ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_rows = _rows(grad, ctx.window)
        if ctx.relu:
            (out,) = ctx.saved_tensors
            grad_rows = torch.ops.aten.threshold_backward(grad_rows, _rows(out, ctx.window), 0)
        return grad, grad_rows, None, None  # take_rows will replace the window in the first


class _Fork(Function):
    forward = _Take.forward

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> Any:
        return _changed(grad, grad_rows, ctx.window, _add), None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, window: Window, factor: float, relu: bool) -> Tensor:
        ctx.window, ctx.factor, ctx.relu = window, factor, relu
        out = _changed(shortcut, branch, window, _add, factor)
        if relu:
            out.clamp_min_(0)
            ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if ctx.relu:
            (out,) = ctx.saved_tensors
            grad = torch.ops.aten.threshold_backward(grad, out, 0)
        rows = _rows(grad, ctx.window)
        return grad, rows if ctx.factor == 1 else rows * ctx.factor, None, None, None


def _pieces(batch: int, start: int, rows: int) -> list[tuple[int, int, int]]:
    """The window's pieces: (first row of the batch, first row of the window, number of rows); two where it wraps."""
    wrapped = max(0, start + rows - batch)
    first = (start, 0, rows - wrapped)
    return [first, (0, rows - wrapped, wrapped)] if wrapped else [first]


def _rows(x: Tensor, window: Any) -> Tensor:
    """Slices, not an index: they keep any memory format. A view where the window does not wrap."""
    pieces = [x.narrow(0, first, length) for first, _, length in _pieces(x.shape[0], window.start, window.rows)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _changed(x: Tensor, rows: Tensor, window: Any, write: Callable[..., Any], *factor: float) -> Tensor:
    """A new tensor, every element of which is written once: `x`, and in the window what `write` makes of it."""
    batch, start, count = x.shape[0], window.start, window.rows
    out = torch.empty_like(x)
    for first, begin, length in _pieces(batch, start, count):
        write(out.narrow(0, first, length), x.narrow(0, first, length), rows.narrow(0, begin, length), *factor)
    for first, _, length in _pieces(batch, (start + count) % batch, batch - count):
        out.narrow(0, first, length).copy_(x.narrow(0, first, length))
    return out


def _replace(out: Tensor, x: Tensor, rows: Tensor) -> None:
    out.copy_(rows)


def _replace_by_relu(out: Tensor, x: Tensor, rows: Tensor) -> None:
    torch.clamp_min(rows, 0, out=out)


def _add(out: Tensor, x: Tensor, rows: Tensor, factor: float = 1.0) -> None:
    if torch.is_grad_enabled():  # in a backward pass that is itself differentiated, which `out=` is not
        out.copy_(torch.add(x, rows, alpha=factor))
    else:
        torch.add(x, rows, alpha=factor, out=out)


# With an index instead of slices. All are gathers, in backward too, which a compiler fuses with what is around them.


class _ForkByIndex(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(start)
        return x.view_as(x), x.index_select(0, _index(x, Window(start, rows, rows)))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> Any:
        (start,) = ctx.saved_tensors
        return grad + _placed(grad_rows, start, grad_rows.shape[0], grad), None, None


class _JoinByIndex(Function):
    @staticmethod
    def forward(
        ctx: Any, shortcut: Tensor, branch: Tensor, start: Tensor, alive: int | Tensor, factor: float
    ) -> Tensor:
        ctx.rows, ctx.factor = branch.shape[0], factor
        alive = torch.full_like(start, alive) if isinstance(alive, int) else alive
        ctx.save_for_backward(start, alive)
        return shortcut + _placed(branch, start, alive, shortcut) * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        start, alive = ctx.saved_tensors
        rows = grad.index_select(0, _index(grad, Window(start, ctx.rows, alive))) * ctx.factor
        inside = (torch.arange(ctx.rows, device=grad.device) < alive).view(-1, *[1] * (grad.dim() - 1))
        return grad, torch.where(inside, rows, 0), None, None, None


def _index(x: Tensor, window: Window) -> Tensor:
    """The window's rows, (k,)."""
    return (torch.arange(window.rows, device=x.device) + window.start) % x.shape[0]


def _placed(rows: Tensor, start: Tensor, alive: int | Tensor, like: Tensor) -> Tensor:
    """The first `alive` of the rows in their places in a batch, and zero elsewhere."""
    position = positions(like, start)
    inside = (position < alive).view(-1, *[1] * (rows.dim() - 1))
    return torch.where(inside, rows.index_select(0, position.clamp(max=rows.shape[0] - 1)), 0)
