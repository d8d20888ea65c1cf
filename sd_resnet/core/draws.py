"""The draws b_l of Huang et al., section 3: per mini-batch, per row, or a window of rows.

A draw is made on the host, so that no step waits for a device; only a row mode's masks are drawn where the images are.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .private_api import transforming
from .refusals import check_draws_on_host, one_draw_for_all_samples

# p_l as a whole number of these is exact from 2^-7 on. A whole number is a constant to `torch.compile`; a float that
# changes would become a symbol, and with it the number of rows.
UNIT = 2**60
_NOTHING = 2**28  # rows in these units: shares below 3e-10 are rounding


class Window(NamedTuple):
    """Which neighbouring rows of a mini-batch survive in subset mode, cyclically.

    In a compiled graph, whose shapes are fixed, `start` and `alive` are tensors on the images' device, and the last row
    may not be alive. On many ranks no row survives of one, not of none: a SyncBatchNorm would wait for this rank.
    """

    start: int | Tensor  # the first row, 0 to N - 1
    rows: int  # that the branch runs on, 0 to N
    alive: int | Tensor  # number of rows that survive: all of these, but for the above


class Draw(NamedTuple):
    """One block's b_l for one mini-batch, and the p_l that it was drawn with, which a ramp may since have changed.

    In batch mode b_l says whether the block is active; in row mode it is the mask of the rows, (N, 1, ..., 1).
    """

    p_l: float
    b_l: bool | Tensor | Window


def draw(drop_paths: Sequence[Any], x: Tensor, mode: str, generator: torch.Generator | None = None) -> list[Draw]:
    """One draw per block, whose `StochasticDepth`s these are, for a mini-batch (N, ...).

    Batch mode draws from `generator`, None being torch's default one. Under `torch.func.vmap` only row mode can draw.
    """
    if mode == 'row':
        return [Draw(drop_path.p_l, drop_path.mask(x)) for drop_path in drop_paths]
    check_draws_on_host(mode)
    if mode == 'batch':
        uniform = _numbers(torch.rand(len(drop_paths), dtype=torch.float64, device='cpu', generator=generator))
        return [Draw(drop_path.p_l, u < drop_path.p_l) for u, drop_path in zip(uniform, drop_paths)]
    windows = draw_windows([drop_path.p_l_in_units for drop_path in drop_paths], x.shape[0], x.device)
    return [Draw(drop_path.p_l_in_units / UNIT, window) for drop_path, window in zip(drop_paths, windows)]


def draw_windows(probs: Sequence[int], batch: int, device: torch.device, least: int = 0) -> list[Window]:
    """Windows of k rows of N, k being floor(p_l N) or one more, with the mean p_l N, from a first row that is uniform.

    So each row survives with exactly p_l, whatever N. `probs` are in units of 1 / `UNIT`, `least` rows run in any case.
    The same seed gives the same windows in eager and in compiled code, at once or one by one; but a compiler draws
    other numbers for dropout on a CPU, and where a graph calls this more than once, it may do so in another order.
    """
    batch = len(range(batch))  # a number of its own for each compiled graph, where it may be a symbol
    if batch == 0:
        return [Window(0, 0, 0)] * len(probs)
    whole = [(p * batch + _NOTHING) // UNIT for p in probs]
    rest = [r if r > _NOTHING else 0 for r in (p * batch - k * UNIT for p, k in zip(probs, whole))]
    odds = [r / UNIT for r in rest]
    if not torch.compiler.is_compiling():
        least = max(least, int(many_ranks()))
        drawn = _first_and_more(batch, odds)
        return [Window(start, max(k + more, least), k + more) for k, start, more in zip(whole, *drawn)]
    call = torch.empty(0, device='cpu')
    both = torch.ops.sd_resnet.first_and_more(call, batch, odds).to(device, non_blocking=True)
    rows = [k + 1 if r else k for k, r in zip(whole, rest)]
    return [Window(both[0, l], rows[l], whole[l] + both[1, l] if rest[l] else rows[l]) for l in range(len(probs))]


def _first_and_more(batch: int, odds: Sequence[float]) -> tuple[list[int], list[int]]:
    """First rows, and 1 where one more row survives, with these odds, else 0."""
    uniform = _numbers(torch.rand(2 * len(odds), dtype=torch.float64, device='cpu'))
    return [int(batch * u) for u in uniform[::2]], [int(u < p) for u, p in zip(uniform[1::2], odds)]


# In a compiled graph an operation of its own, of which a compiler knows nothing but that it draws: of `torch.rand` it
# makes other numbers, and with CUDA graphs some versions move a part of `multinomial` to the device and fail. `call` is
# a new empty tensor for each call: of two with the same arguments a compiler makes one, and both would draw the same.
_OPERATION = 'sd_resnet::first_and_more'
if not hasattr(torch.ops.sd_resnet, 'first_and_more'):  # torch keeps it, also where this module is imported anew
    _TAGS = (torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag)
    torch.library.define(_OPERATION, '(Tensor call, int batch, float[] odds) -> Tensor', tags=_TAGS)

    @torch.library.impl(_OPERATION, 'CompositeExplicitAutograd')
    def _(call: Tensor, batch: int, odds: Sequence[float]) -> Tensor:
        check_draws_on_host('subset')  # a CUDA graph that is made by hand captures what is already compiled
        return torch.tensor(_first_and_more(batch, odds), device='cpu')

    @torch.library.impl(_OPERATION, 'FuncTorchVmapMode')
    def _(call: Tensor, batch: int, odds: Sequence[float]) -> Tensor:
        raise one_draw_for_all_samples('subset')

    @torch.library.register_fake(_OPERATION)
    def _(call: Tensor, batch: int, odds: Sequence[float]) -> Tensor:
        return torch.empty((2, len(odds)), dtype=torch.int64, device='cpu')


def _numbers(values: Tensor) -> list[Any]:
    """As Python numbers; within a transform of `torch.func` torch 2.5 gives them one by one only."""
    return [value.item() for value in values] if transforming() else values.tolist()


def simplified(window: Window, x: Tensor, batch: int, one_value: bool) -> Window | Tensor | bool:
    """A window of N rows as batch mode's b_l where all survive, or none; as row mode's, for `x`, where all must run.

    As where there is one row, in which BatchNorm would see a single value per channel (`one_value`).
    """
    if window.rows == 0:
        return False
    if window.rows == batch and not isinstance(window.alive, Tensor):
        return window.alive == batch or x.new_zeros([1] * x.dim())
    if window.rows == batch or (window.rows == 1 and one_value):
        alive = positions(batch, window.start, x.device) < window.alive
        return alive.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return window


def nothing_survives(b_l: Any) -> bool:
    """Is it a window of which no row survives?"""
    return isinstance(b_l, Window) and not isinstance(b_l.alive, Tensor) and b_l.alive == 0


def positions(batch: int, start: int | Tensor, device: torch.device) -> Tensor:
    """Of each row of a mini-batch in the window that begins at `start`, (N,)."""
    return (torch.arange(batch, device=device) - start) % batch


def many_ranks() -> bool:
    """Is there a default process group of more than one rank?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
