"""What a drop path gives, until somebody uses it: an addition then writes shortcut and rows at once."""

from typing import Any

import torch
from torch import Tensor

from ..core.draws import Window
from ..core.skipping import join
from .private_api import as_kind, tree_map_only

_ADDITIONS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__)


class Rows(Tensor):
    """`factor * rows`, (k, ...), in the window of a batch of zeros, (N, ...), which are written when they are used.

    A drop path gives this where a trial run has shown that it is added to a shortcut next. To everything else it is
    the tensor that it stands for.
    """

    rows: Tensor
    window: Window
    batch: int
    factor: float
    forks: list[tuple[Tensor, Tensor]]  # what rows were taken of, and the same for the shortcut; see `fork`

    @staticmethod
    def of(rows: Tensor, window: Window, batch: int, factor: float, forks: list[tuple[Tensor, Tensor]]) -> 'Rows':
        """One that has no data of its own, so that nothing can use it unseen."""
        made = as_kind(Rows, torch.empty(0, device='meta'))
        made.__dict__.update(rows=rows, window=window, batch=batch, factor=factor, forks=forks)
        return made

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _ADDITIONS and not kwargs and len(args) == 2:
            mine, other = args if isinstance(args[0], cls) else reversed(args)
            in_place = mine is not args[0] and function in (Tensor.add_, Tensor.__iadd__)
            if type(other) is Tensor and not in_place and (out := mine.added_to(other)) is not None:
                return out
        args, kwargs = tree_map_only(cls, cls.written, (args, kwargs or {}))
        return function(*args, **kwargs)

    def added_to(self, shortcut: Tensor) -> Tensor | None:
        """The sum, or None where the shortcut is of another shape."""
        mine = self.__dict__
        if shortcut.shape != (mine['batch'], *mine['rows'].shape[1:]):
            return None
        for whole, forked in mine['forks']:
            if whole is shortcut:
                shortcut = forked
        return join(shortcut, mine['rows'], mine['window'], mine['factor'])

    def written(self) -> Tensor:
        """The tensor that it stands for."""
        mine = self.__dict__
        return join(mine['batch'], mine['rows'], mine['window'], mine['factor'])
