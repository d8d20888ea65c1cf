"""The operations that make a dropped branch cost nothing, in forward and in backward.

`skip` is for a branch that nothing of survives. The others are subset mode's, where the branch runs on a window of k
neighbouring rows of the mini-batch: `fork` in front of it and `join` behind it, or `fork_in_graph` and `join_in_graph`
in a compiled graph, which knows a window by an index. Under `torch.func` and forward-mode differentiation ordinary
operations stand in their place.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from .draws import Window, positions
from .private_api import transforming

_threshold = torch.ops.aten.threshold_backward


@torch.compiler.disable
def skip(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """`x` itself, with zero gradients for `parameters`.

    Zero, not absent: weight decay and momentum still act, as in the paper's code, and DistributedDataParallel sees
    every parameter become ready, so it needs no `find_unused_parameters`.
    """
    if transforming():
        return x
    return _Skip.apply(x, *(p for p in parameters if p.requires_grad))


@torch.compiler.disable
def fork(x: Tensor, window: Window, replaced: bool = False) -> tuple[Tensor, Tensor]:
    """`x`, (N, ...), for the shortcut, and the 1 to N rows of the window, for the branch; the memory format stays.

    If the window is `replaced`, by a `join` with `x`, no gradient of these rows comes from the shortcut.
    """
    if transforming():
        return x, x.index_select(0, _index(x, window))
    return _Fork.apply(x, window, replaced)


@torch.compiler.disable
def join(shortcut: Tensor, rows: Tensor, window: Window, factor: float | None, relu: bool) -> Tensor:
    """`shortcut`, (N, ...), and in the window `factor * rows`, (k, ...), added, or the ReLU of all of that.

    If the factor is None, the rows in place of the window, or their ReLU: on the way, so that no copy is kept for it.
    """
    dtype = torch.promote_types(shortcut.dtype, rows.dtype)  # autocast may have made them different
    shortcut, rows = shortcut.to(dtype), rows.to(dtype)
    if not transforming():
        return _Join.apply(shortcut, rows, window, factor, relu)
    index = _index(shortcut, window)
    if factor is None:
        return shortcut.index_copy(0, index, rows.relu() if relu else rows)
    out = shortcut.index_add(0, index, rows, alpha=factor)
    return out.relu() if relu else out


def fork_in_graph(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """`fork`, in a compiled graph: the window is of tensors."""
    return _ForkByIndex.apply(x, window.start, window.rows)


def join_in_graph(shortcut: Tensor, branch: Tensor, window: Window, factor: float) -> Tensor:
    """`join`, in a compiled graph: to the rows that are alive, and without a ReLU, which is fused anyway."""
    dtype = torch.promote_types(shortcut.dtype, branch.dtype)
    return _JoinByIndex.apply(shortcut.to(dtype), branch.to(dtype), window.start, window.alive, factor)


class _Skip(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        # Sizes and strides only: keeping the weights for backward would cost memory and tie it to their version.
        ctx.layouts = [(p.shape, p.stride(), p.dtype, p.device) for p in parameters]
        return x.detach()  # not a view for autograd: compiled code is specialised on whether its input is one

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, *(torch.empty_strided(s, stride, dtype=t, device=d).zero_() for s, stride, t, d in ctx.layouts)


class _Fork(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, window: Window, replaced: bool) -> tuple[Tensor, Tensor]:
        ctx.window, ctx.replaced = window, replaced
        ctx.save_for_backward(x)  # for who takes the rows again
        return x.view_as(x), rows_in(x, window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> Any:
        return _changed(grad, grad_rows, ctx.window, None if ctx.replaced else 1.0), None, None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, window: Window, factor: float | None, relu: bool) -> Tensor:
        ctx.window, ctx.factor, ctx.relu = window, factor, relu
        out = _changed(x, rows, window, factor, relu and factor is None)
        if relu:
            out = out if factor is None else out.clamp_min_(0)
            ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        out = ctx.saved_tensors[0] if ctx.relu else None
        if ctx.factor is None:  # fork will replace the window in grad
            rows = rows_in(grad, ctx.window)
            mask = None if out is None else rows_in(out, ctx.window)
            return grad, rows if mask is None else _threshold(rows, mask, 0), None, None, None
        grad = grad if out is None else _threshold(grad, out, 0)
        rows = rows_in(grad, ctx.window)
        return grad, rows if ctx.factor == 1 else rows * ctx.factor, None, None, None


def _pieces(batch: int, start: int, rows: int) -> list[tuple[int, int, int]]:
    """The window's pieces: (first row of the batch, first row of the window, number of rows); two where it wraps."""
    wrapped = max(0, start + rows - batch)
    first = (start, 0, rows - wrapped)
    return [first, (0, rows - wrapped, wrapped)] if wrapped else [first]


def rows_in(x: Tensor, window: Any) -> Tensor:
    """Slices, not an index: they keep any memory format. A view where the window does not wrap."""
    pieces = [x.narrow(0, first, length) for first, _, length in _pieces(x.shape[0], window.start, window.rows)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _changed(x: Tensor, rows: Tensor, window: Any, factor: float | None, relu: bool = False) -> Tensor:
    """A new tensor, every element of which is written once: `x`, and in the window x + factor * rows.

    If the factor is None, the rows themselves, or their ReLU.
    """
    batch, start, count = x.shape[0], window.start, window.rows
    out = torch.empty_like(x)
    for first, begin, length in _pieces(batch, start, count):
        old, new, written = (t.narrow(0, at, length) for t, at in ((x, first), (rows, begin), (out, first)))
        if relu:
            torch.clamp_min(new, 0, out=written)
        elif factor is None:
            written.copy_(new)
        elif torch.is_grad_enabled():  # in a backward pass that is itself differentiated, which `out=` is not
            written.copy_(torch.add(old, new, alpha=factor))
        else:
            torch.add(old, new, alpha=factor, out=written)
    for first, _, length in _pieces(batch, (start + count) % batch, batch - count):
        out.narrow(0, first, length).copy_(x.narrow(0, first, length))
    return out


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
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, start: Tensor, alive: Any, factor: float) -> Tensor:
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
