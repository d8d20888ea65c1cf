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
def fork(x: Tensor, window: Window, replaced: bool = False, kept: bool = True) -> tuple[Tensor, Tensor]:
    """`x`, (N, ...), for the shortcut, and the 1 to N rows of the window, for the branch; the memory format stays.

    If the window is `replaced`, by a `join` with `x`, no gradient of these rows comes from the shortcut. `x` is `kept`
    for backward, where rows may be taken again.
    """
    if transforming():
        return x, x.index_select(0, _index(x.shape[0], window, x.device))
    return _Fork.apply(x, window, replaced, kept)


@torch.compiler.disable
def join(shortcut: Tensor | int, rows: Tensor, window: Window, factor: float | None, relu: bool = False) -> Tensor:
    """`shortcut`, (N, ...), and in the window `factor * rows`, (k, ...), added, or the ReLU of all of that.

    If the factor is None, the rows in place of the window, or their ReLU: on the way, so that no copy is kept for it.
    The number N as a shortcut is that of rows of zeros.
    """
    x, rows, batch = _alike(shortcut, rows)
    if not transforming():
        return _Join.apply(x, rows, window, factor, relu, batch)
    x, index = rows.new_zeros(batch, *rows.shape[1:]) if x is None else x, _index(batch, window, rows.device)
    if factor is None:
        return x.index_copy(0, index, rows.relu() if relu else rows)
    out = x.index_add(0, index, rows, alpha=factor)
    return out.relu() if relu else out


def fork_in_graph(x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """`fork`, in a compiled graph: the window is of tensors."""
    return _ForkByIndex.apply(x, window.start, window.rows)


def join_in_graph(shortcut: Tensor | int, rows: Tensor, window: Window, factor: float, relu: bool = False) -> Tensor:
    """`join`, in a compiled graph: to the rows that are alive."""
    x, rows, batch = _alike(shortcut, rows)
    out = _JoinByIndex.apply(x, rows, window.start, window.alive, factor, batch)
    return relu_in_graph(out) if relu else out


def relu_in_graph(x: Tensor) -> Tensor:
    """A ReLU of which a compiler keeps signs for backward.

    Of torch's own it keeps a Boolean mask where nothing else needs the output; a CPU writes one 20 times as slowly.
    """
    return _ReLUInGraph.apply(x)


def _alike(shortcut: Tensor | int, rows: Tensor) -> tuple[Any, Tensor, int]:
    """Of the same type, which autocast may have made different, and N; None for a shortcut of zeros."""
    if not isinstance(shortcut, Tensor):
        return None, rows, shortcut
    dtype = torch.promote_types(shortcut.dtype, rows.dtype)
    return shortcut.to(dtype), rows.to(dtype), shortcut.shape[0]


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
    def forward(ctx: Any, x: Tensor, window: Window, replaced: bool, kept: bool) -> tuple[Tensor, Tensor]:
        ctx.window, ctx.replaced, ctx.batch = window, replaced, x.shape[0]
        ctx.set_materialize_grads(False)
        if kept:
            ctx.save_for_backward(x)
        return x.view_as(x), rows_in(x, window)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_rows: Tensor | None) -> Any:
        if grad_rows is not None:
            grad = _changed(grad, grad_rows, ctx.window, None if ctx.replaced else 1.0, batch=ctx.batch)
        return grad, None, None, None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, x: Any, rows: Tensor, window: Window, factor: float | None, relu: bool, batch: int) -> Tensor:
        ctx.window, ctx.factor, ctx.relu = window, factor, relu
        out = _changed(x, rows, window, factor, relu and factor is None, batch)
        if relu:
            out = out if factor is None else out.clamp_min_(0)
            ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        out = ctx.saved_tensors[0] if ctx.relu else None
        if ctx.factor is None:  # fork will replace the window in grad
            rows = rows_in(grad, ctx.window) if out is None else _alive_rows_in(grad, out, ctx.window)
            return grad, rows, None, None, None, None
        grad = grad if out is None else _threshold(grad, out, 0)
        rows = rows_in(grad, ctx.window)
        shortcut = grad if ctx.needs_input_grad[0] else None
        return shortcut, rows if ctx.factor == 1 else rows * ctx.factor, None, None, None, None


def rows_in(x: Tensor, window: Any) -> Tensor:
    """Slices, not an index: they keep any memory format. A view where the window does not wrap."""
    wrapped = window.start + window.rows - x.shape[0]
    if wrapped <= 0:
        return x.narrow(0, window.start, window.rows)
    return torch.cat([x.narrow(0, window.start, window.rows - wrapped), x.narrow(0, 0, wrapped)])


def _alive_rows_in(grad: Tensor, out: Tensor, window: Any) -> Tensor:
    """The rows of the window in `grad`, 0 where `out` is, written piece by piece where the window wraps."""
    first = grad.shape[0] - window.start
    if first >= window.rows or torch.is_grad_enabled():
        return _threshold(rows_in(grad, window), rows_in(out, window), 0)
    rows = torch.empty_like(grad.narrow(0, 0, window.rows))
    for piece, start in zip(rows.tensor_split([first]), (window.start, 0)):
        inside = slice(start, start + piece.shape[0])
        _threshold.grad_input(grad[inside], out[inside], 0, grad_input=piece)
    return rows


def _changed(x: Any, rows: Tensor, window: Any, factor: float | None, relu: bool = False, batch: int = 0) -> Tensor:
    """A new tensor, every element of which is written once: `x`, or zeros, and in the window x + factor * rows.

    If the factor is None, the rows themselves, or their ReLU.
    """
    if x is None:
        order = sorted(range(1, rows.dim()), key=rows.stride, reverse=True)
        out = torch.empty_permuted((batch, *rows.shape[1:]), (0, *order), dtype=rows.dtype, device=rows.device)
    else:
        batch, out = x.shape[0], torch.empty_like(x)
    start, wrapped = window.start, max(0, window.start + window.rows - batch)
    outside, first = batch - window.rows, window.rows - wrapped  # rows in the window before it wraps
    # Neighbouring pieces of the batch, and what of the rows comes there
    sizes = [wrapped, outside, first] if wrapped else [start, first, outside - start]
    new = [rows.narrow(0, first, wrapped), None, rows.narrow(0, 0, first)] if wrapped else [None, rows, None]
    if torch.is_grad_enabled():  # a backward pass that is itself differentiated, which writing into views is not
        x = out.zero_() if x is None else x
        parts = [
            (n if factor is None else old + n * factor) if n is not None else old for n, old in zip(new, x.split(sizes))
        ]
        return torch.cat(parts)
    for piece, old, written in zip(new, sizes if x is None else x.split_with_sizes(sizes), out.split_with_sizes(sizes)):
        if piece is None:
            written.zero_() if x is None else written.copy_(old)
        elif relu:
            torch.clamp_min(piece, 0, out=written)
        elif factor is None:
            written.copy_(piece)
        elif x is None:
            torch.mul(piece, factor, out=written)
        else:
            torch.add(old, piece, alpha=factor, out=written)
    return out


# With an index instead of slices. All are gathers, in backward too, which a compiler fuses with what is around them.


class _ForkByIndex(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(start)
        return x.view_as(x), x.index_select(0, _index(x.shape[0], Window(start, rows, rows), x.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> Any:
        (start,) = ctx.saved_tensors
        return grad + _placed(grad_rows, start, grad_rows.shape[0], grad.shape[0]), None, None


class _JoinByIndex(Function):
    @staticmethod
    def forward(
        ctx: Any, shortcut: Any, branch: Tensor, start: Tensor, alive: Any, factor: float, batch: int
    ) -> Tensor:
        ctx.rows, ctx.factor, ctx.batch = branch.shape[0], factor, batch
        alive = torch.full_like(start, alive) if isinstance(alive, int) else alive
        ctx.save_for_backward(start, alive)
        branch = _placed(branch, start, alive, batch) * factor
        return branch if shortcut is None else shortcut + branch

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        start, alive = ctx.saved_tensors
        rows = grad.index_select(0, _index(ctx.batch, Window(start, ctx.rows, alive), grad.device)) * ctx.factor
        inside = (torch.arange(ctx.rows, device=grad.device) < alive).view(-1, *[1] * (grad.dim() - 1))
        return grad if ctx.needs_input_grad[0] else None, torch.where(inside, rows, 0), None, None, None, None


class _ReLUInGraph(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = x.relu()
        ctx.save_for_backward(out.sign().to(torch.int8))  # not out > 0, which would be kept as it is
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].to(grad.dtype)  # of a comparison the Boolean mask would be kept


def _index(batch: int, window: Window, device: torch.device) -> Tensor:
    """The window's rows, (k,)."""
    return (torch.arange(window.rows, device=device) + window.start) % batch


def _placed(rows: Tensor, start: Tensor, alive: int | Tensor, batch: int) -> Tensor:
    """The first `alive` of the rows in their places in a batch, and zero elsewhere."""
    position = positions(batch, start, rows.device)
    inside = (position < alive).view(-1, *[1] * (rows.dim() - 1))
    return torch.where(inside, rows.index_select(0, position.clamp(max=rows.shape[0] - 1)), 0)
