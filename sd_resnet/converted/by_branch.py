"""Subset mode as timm drops: each drop path for itself, its branch on the rows that survive; and row mode.

No code of the network changes. Where a branch begins, a hook takes the window of what comes in; all that follows runs
on these rows, and in the drop path's place they are put back among zeros. That is so within a pass through the block
only: who calls a part of it alone gets what timm's module gives.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from ..core.compiling import forward_by_mode, with_own_code
from ..core.draws import UNIT, Window, draw_windows, simplified
from ..core.drop_path import StochasticDepth
from ..core.private_api import is_hooked, transforming
from ..core.refusals import check_draws_on_host, check_takes_rows, check_traceable
from ..core.skipping import fork, fork_in_graph, join, join_in_graph
from ..errors import one_line
from ..resnets.scripting import copy_sharing_tensors
from .additions import Rows
from .blocks import Converted, ConvertedBlock
from .private_api import remove_hooks


class BranchDropPath(StochasticDepth):
    """Survival probability of one branch, in the place of its drop path.

    Args:
        survival_prob: p_l, in (0, 1].
        mode: `'subset'` or `'row'`.
        added: Is what it gives added to a shortcut at once?
        once: Is it used once in a pass?
        one_value: May a BatchNorm of its block see a single value per channel, where one row is left?
        early: Does a `PutBack` put its rows back?
    """

    def __init__(
        self,
        survival_prob: float = 1.0,
        mode: str = 'subset',
        added: bool = False,
        once: bool = False,
        one_value: bool = False,
        early: bool = False,
    ) -> None:
        super().__init__(survival_prob, mode)
        self.added, self.once, self.one_value, self.early = added, once, one_value, early
        self.in_force: int | None = None  # p_l, in units of 1 / `UNIT`, while its block runs
        self.branch: _Begun | None = None  # that has begun
        self.batch = 0  # images of the mini-batch, where its block tells

    def begin(self, p_l_in_units: int, batch: int) -> None:
        """Its block's pass begins."""
        self.in_force, self.batch, self.branch = p_l_in_units, batch, None

    def end(self) -> None:
        """Its block's pass has ended, or failed."""
        self.in_force, self.branch = None, None

    def is_open(self) -> bool:
        """Does a pass through its block run? In a compiled graph, or have all branches been drawn ahead?"""
        return self.in_force is not None or (torch.compiler.is_compiling() and self.branch is not None)

    def take(self, x: Tensor, inner: bool) -> Tensor:
        """Of what comes into the branch, (N, ...), the rows that it runs on, (k, ...); if `inner`, rows of images."""
        batch = self.batch if inner and self.batch else x.shape[0]
        if self.branch is None or (self.branch.drawn_ahead and not inner and self.branch.batch != batch):
            (self.branch,) = _begun([self], x, batch)
        return self.branch.take(x)

    def forward(self, x: Tensor) -> Tensor:
        """What its branch has come to, (k, ...), among zeros, (N, ...); for who calls it alone, as timm's."""
        if not self.is_dropping():
            return x
        p_l = self.p_l if self.in_force is None else self.in_force / UNIT
        branch, factor = self.branch if self.is_open() else None, self.train_factor(p_l)
        if branch is None:
            return x * (self.mask(x, p_l) * factor) if p_l < 1 else x
        done = self.early and isinstance(branch.b_l, Window) and x.shape[0] == branch.batch
        out = x if done else branch.put(x, factor, self.added and not is_hooked(self))
        if not branch.drawn_ahead:
            self.branch = None
        return out


class _Begun:
    """A branch between its entries and its drop path, for a mini-batch of N images.

    In a compiled graph the whole network's are drawn ahead: a checkpointed region in it may not change any attribute.
    """

    def __init__(self, b_l: Window | Tensor | bool, batch: int, ahead: bool) -> None:
        self.b_l, self.batch, self.drawn_ahead = b_l, batch, ahead
        self.forks: list[tuple[Tensor, Tensor]] = []

    def take(self, x: Tensor) -> Tensor:
        if not isinstance(self.b_l, Window):
            return x
        each = x.shape[0] // self.batch  # rows of an image
        window = _times(each, self.b_l)
        if isinstance(window.start, Tensor):
            return fork_in_graph(x, window)[1]
        forked, rows = fork(x, window, kept=False)
        self.forks.append((x, forked))
        return rows

    def put(self, x: Tensor, factor: float, added: bool = False, each: int = 1) -> Tensor:
        window: Any = self.b_l
        if window is True or self.batch == 0:
            return x * factor if factor != 1 else x
        if not isinstance(window, Window):
            return x * (window.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) * factor)
        if x.shape[0] != each * window.rows:
            raise RuntimeError(f'{window.rows} rows went into the branch, {x.shape[0]} came out of it')
        batch, window = each * self.batch, _times(each, window)
        if isinstance(window.start, Tensor):
            return join_in_graph(batch, x, window, factor)
        factor = factor if window.alive else 0.0
        if added and not transforming():
            return Rows.of(x, window, batch, factor, self.forks)
        return join(batch, x, window, factor)


def _begun(drop_paths: list[BranchDropPath], x: Tensor, batch: int, ahead: bool = False) -> list[_Begun]:
    """Their branches, with windows as if each were drawn for itself, and in compiled code one copy to the device."""
    check_draws_on_host('subset')
    probs = [each.p_l_in_units if each.in_force is None else each.in_force for each in drop_paths]
    windows = draw_windows(probs, batch, x.device, least=1)
    return [
        _Begun(simplified(window, x, batch, each.one_value), batch, ahead) for each, window in zip(drop_paths, windows)
    ]


def _times(each: int, window: Any) -> Window:
    """The window of as many rows for each image."""
    start, rows, alive = window
    return Window(each * start, each * rows, each * alive)


class Take:
    """The forward pre-hook of a module where a branch begins: its argument at `position` becomes rows of it.

    If `inner`, the argument has several rows for each image.
    """

    def __init__(self, drop_path: BranchDropPath, position: int | str, inner: bool) -> None:
        self.drop_path, self.position, self.inner = drop_path, position, inner

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        drop_path, position = self.drop_path, self.position
        if not drop_path.is_open() or not drop_path.is_dropping() or drop_path.mode == 'row':
            return None
        if isinstance(position, str):
            if not isinstance(kwargs.get(position), Tensor):
                return None
            return args, {**kwargs, position: drop_path.take(kwargs[position], self.inner)}
        if position >= len(args) or not isinstance(args[position], Tensor):
            return None
        return (*args[:position], drop_path.take(args[position], self.inner), *args[position + 1 :]), kwargs


class PutBack:
    """The forward hook of a module behind which only the layout changes: its rows are put back here already.

    For blocks that have asked for the number of images before their branch began.
    """

    def __init__(self, drop_path: BranchDropPath) -> None:
        self.drop_path = drop_path

    def __call__(self, module: nn.Module, args: Any, out: Any) -> Any:
        drop_path = self.drop_path
        branch, rows = drop_path.branch, out[0] if isinstance(out, tuple) else out
        if branch is None or not drop_path.is_open() or not isinstance(branch.b_l, Window):
            return None
        p_l = drop_path.p_l if drop_path.in_force is None else drop_path.in_force / UNIT
        each = rows.shape[0] // branch.b_l.rows  # rows of an image
        whole = branch.put(rows, drop_path.train_factor(p_l), each=each)
        return (whole, *out[1:]) if isinstance(out, tuple) else whole


class BranchedBlock(ConvertedBlock):
    """A module in whose pass branches begin and end."""

    taken: list[BranchDropPath]  # those that it was given, also if somebody has put something else in their places

    @forward_by_mode
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block itself computes, with each branch on its rows, unless all of them were drawn ahead."""
        dropping: list[Any] = [drop_path for drop_path in self.drop_paths() if drop_path.is_dropping()]
        if dropping:
            check_traceable(args)
        if any(drop_path.mode == 'subset' for drop_path in dropping):
            check_takes_rows(self.modules())
        drawn = torch.compiler.is_compiling() and all(each.branch is not None for each in dropping)
        if drawn or all(each.mode == 'row' and not each.ramped for each in dropping):
            return self.plain_pass(*args, **kwargs)
        batch = args[0].shape[0] if args and isinstance(args[0], Tensor) else 0
        if torch.compiler.is_compiling():
            for drop_path in dropping:
                drop_path.begin(drop_path.p_l_in_units, batch)
            out = self.plain_pass(*args, **kwargs)
            for drop_path in dropping:
                drop_path.end()
            return out
        in_force = self.draws.probs_in_force(self, dropping, args[0] if args else None)
        for drop_path, p_l_in_units in zip(dropping, in_force):
            drop_path.begin(p_l_in_units, batch)
        run = self._plain_eagerly if self.runs_outside_compiler() else self.plain_pass
        try:
            out = run(*args, **kwargs)
            if any(drop_path.branch is not None for drop_path in dropping):
                raise RuntimeError('the drop path at its end was not reached')
            return out
        except (RuntimeError, ValueError, IndexError, AssertionError) as error:  # not what ends a recomputation early
            begun = [drop_path for drop_path in dropping if drop_path.branch is not None]
            if begun and not isinstance(error, BranchFailed):
                raise BranchFailed(self, begun[0], error) from error
            raise
        finally:
            for drop_path in dropping:
                drop_path.end()

    _plain_eagerly = torch.compiler.disable(ConvertedBlock.plain_pass)  # with a ramp: no rate can be frozen

    def restore(self) -> None:
        """See `ConvertedBlock.restore`."""
        for module in self.modules():
            remove_hooks(module, lambda hook: isinstance(hook, Take | PutBack) and hook.drop_path in self.taken)
        super().restore()


class BranchFailed(RuntimeError):
    """A block has failed while a branch of it was on a part of the rows."""

    def __init__(self, block: BranchedBlock, drop_path: BranchDropPath, cause: Exception) -> None:
        branch: Any = drop_path.branch
        rows = f'{getattr(branch.b_l, "rows", branch.batch)} of {branch.batch} images'
        super().__init__(
            f'{block.plain_class.__name__} failed on {rows}: {one_line(cause)} (where it needs all of them, for an '
            "argument of each image, say: drop_path_mode='batch' or 'row')"
        )
        self.drop_path, self.cause = drop_path, cause


class BranchedNetwork(Converted):
    """A network of such blocks. In a compiled graph it draws for all of them before it runs."""

    by_branch: list[BranchDropPath]  # in the order in which they run

    def __init_subclass__(cls) -> None:
        # Under the signature of the network's own: `torch.fx` and others go by it
        cls.forward = wraps(cls.plain_class.forward)(with_own_code(BranchedNetwork.forward))  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network itself computes."""
        if not (torch.compiler.is_compiling() and args and isinstance(args[0], Tensor)):
            return self.plain_pass(*args, **kwargs)
        ahead = [
            each
            for each in self.by_branch
            if each.once and each.mode != 'row' and each.is_dropping() and not each.ramped
        ]
        if ahead:
            for drop_path, branch in zip(ahead, _begun(ahead, args[0], args[0].shape[0], ahead=True)):
                drop_path.branch = branch
        out = self.plain_pass(*args, **kwargs)
        for drop_path in ahead:
            drop_path.branch = None
        return out

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript sees the network's own class; its blocks see to themselves."""
        plain: Any = copy_sharing_tensors(self)
        plain.restore()
        return plain
