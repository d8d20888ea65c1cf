"""The operations that make a dropped branch cost nothing, in forward and in backward.

`skip` is batch mode's: a dropped block. The others are subset mode's, where the branch runs on a cyclic window of k
neighbouring rows of the mini-batch. They come in pairs: around an identity shortcut `take_rows` and `put_rows`, around
a projection `fork` and `join`. A window begins at row `start`, 0 to N - 1; a tensor of one number, on the device of the
images, gives a compiler an index instead of a number that it cannot know.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks


@torch.compiler.disable
def skip(x: Tensor, parameters: Iterable[nn.Parameter]) -> Tensor:
    """`x` itself, with zero gradients for `parameters`.

    A zero gradient is not an absent one: weight decay and momentum still act, as in the paper's code, and
    DistributedDataParallel sees every parameter become ready, so it needs no `find_unused_parameters`.
    """
    return _Skip.apply(x, *(p for p in parameters if p.requires_grad))


def take_rows(x: Tensor, start: int | Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """`x`, for `put_rows` and nothing else, and its window of `rows` rows, which keeps the memory format.

    Args:
        x: (N, ...).
        start: First row of the window.
        rows: k, from 1 to N.
    """
    if isinstance(start, Tensor):
        return _TakeByIndex.apply(x, start, rows)
    return _Take.apply(x, start, rows)


def put_rows(x: Tensor, rows: Tensor, start: int | Tensor, relu: bool) -> Tensor:
    """`x` with `rows`, or with their ReLU, in place of the window that `take_rows` has taken.

    The ReLU is applied on the way, so that no second copy of the rows is kept for backward.

    Args:
        x: (N, ...), from `take_rows`.
        rows: (k, ...).
        start: First row of the window.
        relu: Apply it?
    """
    if isinstance(start, Tensor):
        return _PutByIndex.apply(x, rows.relu() if relu else rows, start)
    return _Put.apply(x, rows, start, relu)


def fork(x: Tensor, start: int | Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """`x`, for the projection, and its window of `rows` rows, for the branch; see `take_rows`."""
    if isinstance(start, Tensor):
        return _ForkByIndex.apply(x, start, rows)
    return _Fork.apply(x, start, rows)


def join(shortcut: Tensor, branch: Tensor, start: int | Tensor, factor: float) -> Tensor:
    """Add `factor * branch` to a window of the shortcut, in place where `start` is a number.

    Args:
        shortcut: (N, ...), what the projection gave.
        branch: (k, ...).
        start: First row of the window.
        factor: Of the branch.
    """
    if isinstance(start, Tensor):
        return _JoinByIndex.apply(shortcut, branch, start, factor)
    return _Join.apply(shortcut, branch, start, factor)


class gathered_again(saved_tensors_hooks):
    """While active, an operation on `rows`, taken by `take_rows` or `fork`, keeps no copy of them for backward.

    Those keep their input, which other operations keep anyway; the rows are taken from it again in backward. What else
    the operation keeps goes to the hooks that were active before (torch has no public way to ask for them, and none
    before 2.8).
    """

    def __init__(self, rows: Tensor) -> None:
        taken: Any = rows.grad_fn
        address, layout = rows.data_ptr(), (rows.shape, rows.stride(), rows.dtype)
        outer_pack, outer_unpack = _active_hooks(True) or (_pack, _unpack)

        def pack(tensor: Tensor) -> Any:
            if tensor.data_ptr() == address and (tensor.shape, tensor.stride(), tensor.dtype) == layout:
                return None
            return (outer_pack(tensor),)

        def unpack(kept: Any) -> Tensor:
            if kept is not None:
                return outer_unpack(*kept)
            (x,) = taken.saved_tensors
            return _window(x, taken.start, layout[0][0])

        super().__init__(pack, unpack)


_active_hooks: Any = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', lambda ignore_tracing: None)


def _pack(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, tensor._version


def _unpack(kept: tuple[Tensor, int]) -> Tensor:
    """As torch does where no hooks are active."""
    tensor, version = kept
    if tensor._version != version:
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
    def forward(ctx: Any, x: Tensor, start: int, rows: int) -> tuple[Tensor, Tensor]:
        ctx.start = start
        ctx.save_for_backward(x)  # for gathered_again
        return x.view_as(x), _window(x, start, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> Any:
        return _replaced(grad, grad_rows, ctx.start), None, None


class _Put(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, start: int, relu: bool) -> Tensor:
        ctx.start, ctx.rows, ctx.relu = start, rows.shape[0], relu
        out = _replaced(x, rows, start, relu)
        if relu:
            ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        grad_rows = _window(grad, ctx.start, ctx.rows)
        if ctx.relu:
            (out,) = ctx.saved_tensors
            grad_rows = torch.ops.aten.threshold_backward(grad_rows, _window(out, ctx.start, ctx.rows), 0)
        return grad, grad_rows, None, None  # take_rows will replace the window in the first


class _Fork(Function):
    forward = _Take.forward

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> Any:
        return _add_to_window(grad.clone(), grad_rows, ctx.start), None, None


class _Join(Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, start: int, factor: float) -> Tensor:
        ctx.start, ctx.rows, ctx.factor = start, branch.shape[0], factor
        ctx.mark_dirty(shortcut)
        return _add_to_window(shortcut, branch, start, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        rows = _window(grad, ctx.start, ctx.rows)
        return grad, rows if ctx.factor == 1 else rows * ctx.factor, None, None


def _pieces(batch: int, start: int, rows: int) -> list[tuple[int, int, int]]:
    """The window's pieces: (first row of the batch, first row of the window, number of rows); two where it wraps."""
    wrapped = max(0, start + rows - batch)
    return [(start, 0, rows - wrapped)] + [(0, rows - wrapped, wrapped)] * (wrapped > 0)


def _window(x: Tensor, start: int, rows: int) -> Tensor:
    """Slices, not an index: they keep any memory format. A view where the window does not wrap."""
    pieces = [x.narrow(0, first, length) for first, _, length in _pieces(x.shape[0], start, rows)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _add_to_window(x: Tensor, rows: Tensor, start: int, factor: float = 1.0) -> Tensor:
    """In place."""
    for first, begin, length in _pieces(x.shape[0], start, rows.shape[0]):
        x.narrow(0, first, length).add_(rows.narrow(0, begin, length), alpha=factor)
    return x


def _replaced(x: Tensor, rows: Tensor, start: int, relu: bool = False) -> Tensor:
    """A new tensor, every element of which is written once."""
    batch, count = x.shape[0], rows.shape[0]
    out = torch.empty_like(x)
    for first, begin, length in _pieces(batch, start, count):
        source, target = rows.narrow(0, begin, length), out.narrow(0, first, length)
        if relu:
            torch.clamp_min(source, 0, out=target)
        else:
            target.copy_(source)
    for first, _, length in _pieces(batch, (start + count) % batch, batch - count):
        out.narrow(0, first, length).copy_(x.narrow(0, first, length))
    return out


# With an index instead of slices. All are gathers, in backward too, which a compiler fuses with what is around them.


class _TakeByIndex(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, start: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(start)
        return x.view_as(x), x.index_select(0, _index(x, start, rows))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> Any:
        (start,) = ctx.saved_tensors
        return _placed(grad_rows, start, grad), None, None


class _PutByIndex(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, start: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        ctx.save_for_backward(start)
        return _placed(rows, start, x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (start,) = ctx.saved_tensors
        return grad, grad.index_select(0, _index(grad, start, ctx.rows)), None


class _ForkByIndex(Function):
    forward = _TakeByIndex.forward

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_rows: Tensor) -> Any:
        (start,) = ctx.saved_tensors
        return grad + _placed(grad_rows, start, torch.zeros_like(grad)), None, None


class _JoinByIndex(Function):
    @staticmethod
    def forward(ctx: Any, shortcut: Tensor, branch: Tensor, start: Tensor, factor: float) -> Tensor:
        ctx.rows, ctx.factor = branch.shape[0], factor
        ctx.save_for_backward(start)
        return shortcut + _placed(branch, start, torch.zeros_like(shortcut)) * factor

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (start,) = ctx.saved_tensors
        return grad, grad.index_select(0, _index(grad, start, ctx.rows)) * ctx.factor, None, None


def _index(x: Tensor, start: Tensor, rows: int) -> Tensor:
    """The window's rows, (k,)."""
    return (torch.arange(rows, device=x.device) + start) % x.shape[0]


def _placed(rows: Tensor, start: Tensor, elsewhere: Tensor) -> Tensor:
    """`rows` in their places, and what is `elsewhere` in the other rows."""
    batch, length = elsewhere.shape[0], rows.shape[0]
    position = (torch.arange(batch, device=rows.device) - start) % batch
    inside = (position < length).view(batch, *[1] * (rows.dim() - 1))
    return torch.where(inside, rows.index_select(0, position.clamp(max=length - 1)), elsewhere)
