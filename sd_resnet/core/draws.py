"""The draws b_l of Huang et al., section 3: per mini-batch, per row, or a window of rows, and what ranks share.

A draw is made on the host, so that no step waits for a device; only a row mode's masks are drawn where the images are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .private_api import transforming, vmapping

if TYPE_CHECKING:
    from .drop_path import StochasticDepth

# p_l as a whole number of these is exact where p_l is at least 2^-7. A whole number is a constant to `torch.compile`; a
# float that changes would become a symbol, and with it the number of rows.
UNIT = 2**60
_NOTHING = 2**28  # rows in these units: shares below 3e-10 are rounding


class Window(NamedTuple):
    """Which rows of a mini-batch survive in subset mode: `rows` neighbouring ones, cyclically.

    Attributes:
        start: The first row, 0 to N - 1. In a compiled graph a tensor of one number, on the device of the images.
        rows: Number of rows that the branch runs on, 0 to N.
        alive: Number of rows that survive: `rows`. In a compiled graph, whose shapes are fixed, a tensor: all of them,
            or all but the last. On more than one rank a branch runs on one row, of which nothing survives, rather than
            on none: a SyncBatchNorm in it waits for all ranks.
    """

    start: int | Tensor
    rows: int
    alive: int | Tensor


class Draw(NamedTuple):
    """One block's b_l, for one mini-batch.

    Attributes:
        p_l: The survival probability that it was drawn with, which a ramp may have changed by the time it is used.
        b_l: Batch mode: is the block active? Row mode: the mask of the rows, (N, 1, ..., 1). Subset mode: the rows
            that survive.
    """

    p_l: float
    b_l: bool | Tensor | Window

    def share(self, batch: int) -> float:
        """Of the branch's work, for a mini-batch of `batch` images: row mode computes all of it."""
        if isinstance(self.b_l, Window):
            return self.b_l.rows / batch
        return float(isinstance(self.b_l, Tensor) or self.b_l)


def draw(
    drop_paths: Sequence[StochasticDepth], x: Tensor, mode: str, generator: torch.Generator | None = None
) -> list[Draw]:
    """Draw for one mini-batch.

    Args:
        drop_paths: One module per block.
        x: Input of the network or of the block, (N, ...).
        mode: `'batch'`, `'row'` or `'subset'`.
        generator: Of batch mode's draws; None is torch's default generator.

    Raises:
        RuntimeError: Under `torch.func.vmap`, where only row mode can draw.
    """
    if mode == 'row':
        return [Draw(drop_path.p_l, drop_path.mask(x)) for drop_path in drop_paths]
    if vmapping():
        raise RuntimeError(
            f"drop_path_mode must be 'row' under torch.func.vmap, got {mode!r}: its draws are made on the host, once "
            'for all samples'
        )
    if mode == 'batch':
        uniform = _numbers(torch.rand(len(drop_paths), dtype=torch.float64, device='cpu', generator=generator))
        return [Draw(drop_path.p_l, u < drop_path.p_l) for u, drop_path in zip(uniform, drop_paths)]
    windows = draw_windows([drop_path.p_l_in_units for drop_path in drop_paths], x)
    return [Draw(drop_path.p_l_in_units / UNIT, window) for drop_path, window in zip(drop_paths, windows)]


def draw_windows(probs: Sequence[int], x: Tensor) -> list[Window]:
    """Windows of k rows, k being floor(p_l N) or one more, with the mean p_l N, from a first row that is uniform.

    So each row survives with exactly p_l, whatever N. The same seed gives the same windows in eager and in compiled
    code (which `torch.rand` and `randint` would not).

    Args:
        probs: p_l of each block, in units of 1 / `UNIT`.
        x: (N, ...).
    """
    batch = len(range(x.shape[0]))  # a number of its own for each compiled graph, where it may be a symbol
    if batch == 0:
        return [Window(0, 0, 0)] * len(probs)
    whole = [(p * batch + _NOTHING) // UNIT for p in probs]
    rest = [max(0, p * batch - k * UNIT) for p, k in zip(probs, whole)]
    rest = [r if r > _NOTHING else 0 for r in rest]
    starts = torch.ones(batch, device='cpu').multinomial(len(probs), replacement=True)
    odds = [[1 - r / UNIT, r / UNIT] for r in rest]
    one_more = torch.tensor(odds, dtype=torch.float64, device='cpu').multinomial(1).squeeze(1)
    if not torch.compiler.is_compiling():
        more = _numbers(one_more)
        least = int(many_ranks())
        return [Window(start, max(k + m, least), k + m) for start, k, m in zip(_numbers(starts), whole, more)]
    both = torch.stack([starts, one_more]).to(x.device, non_blocking=True)
    rows = [k + 1 if r else k for k, r in zip(whole, rest)]
    return [Window(both[0, l], rows[l], whole[l] + both[1, l] if rest[l] else rows[l]) for l in range(len(probs))]


def _numbers(values: Tensor) -> list[Any]:
    """As Python numbers; within a transform of `torch.func` torch 2.5 gives them one by one only."""
    return [value.item() for value in values] if transforming() else values.tolist()


def simplified(window: Window, x: Tensor, one_value: bool) -> Window | Tensor | bool:
    """A window as batch mode's b_l where all rows survive, or none; as row mode's mask where all rows must run.

    Args:
        window: Of rows of `x`.
        x: (N, ...).
        one_value: Would BatchNorm see a single value per channel in a single row?
    """
    if window.rows == 0:
        return False
    if window.rows == x.shape[0] and not isinstance(window.alive, Tensor):
        return True
    if window.rows == x.shape[0] or (window.rows == 1 and one_value):
        alive = positions(x, window.start) < window.alive
        return alive.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
    return window


def nothing_survives(b_l: Any) -> bool:
    """Is it a window of which no row survives?"""
    return isinstance(b_l, Window) and not isinstance(b_l.alive, Tensor) and b_l.alive == 0


def positions(x: Tensor, start: int | Tensor) -> Tensor:
    """Of each row of a mini-batch in the window that begins at `start`, (N,)."""
    return (torch.arange(x.shape[0], device=x.device) - start) % x.shape[0]


def many_ranks() -> bool:
    """Is there a default process group of more than one rank?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def takes_gradients(x: Tensor) -> bool:
    """Is this a forward pass that trains? Reentrant checkpointing makes its first one without gradients."""
    return torch.is_grad_enabled() or x.requires_grad


def check_sync(value: Any) -> None:
    """Raise where it is neither True nor False: of `--model-kwargs drop_path_sync=false` timm makes a text.

    Raises:
        ValueError: It is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f'drop_path_sync must be True or False, got {value!r}')


class SharedGenerator:
    """A generator that all ranks of the default process group share; a copy, or a new process group, joins anew."""

    def __init__(self) -> None:
        self._joined: tuple[Any, torch.Generator] | None = None

    def get(self) -> torch.Generator:
        """Seeded by rank 0 at the first call, a collective; the default generator stays where it is."""
        group = dist.group.WORLD
        if self._joined is None or self._joined[0] is not group:
            with torch.random.fork_rng(devices=[]):
                seed = [int(torch.randint(2**63 - 1, (), device='cpu'))]
            dist.broadcast_object_list(seed, src=0)
            self._joined = group, torch.Generator().manual_seed(seed[0])
        return self._joined[1]

    def __getstate__(self) -> dict[str, Any]:
        return {'_joined': None}
