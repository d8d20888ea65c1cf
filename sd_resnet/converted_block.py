"""What a residual block of a foreign network becomes: its own class, and a forward pass that skips.

The block is seen from outside: it computes `x + branch(x)`, whatever is inside, and drops as one unit. In training the
branch, `block(x) - x`, is skipped for a whole mini-batch, or runs on a part of the rows.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from timm.layers import DropPath, SplitBatchNorm2d
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .compiling import TRACED, forward_by_mode, outside_compiler, own_code
from .functions import put_rows, skip, take_rows
from .ramp import DropPathRamp, check_scriptable
from .ranks import SharedGenerator, many_ranks
from .stochastic_depth import Decision, StochasticDepth, draw_per_batch, draw_per_sample, rows_of, scriptable_copy

_REMEMBERED = 2**14  # passes through a block between a forward pass and its backward pass


class BlockDropPath(StochasticDepth):
    """The block's survival probability, where the block's first drop path was. The block itself drops."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Draws:
    """What the converted blocks of one network share: how they draw.

    A block draws when it runs, from torch's default CPU generator, which activation checkpointing restores for its
    second forward pass. What is not drawn from there, because ranks share it or a ramp has moved on by then, is
    remembered under a ticket that is, for the second forward pass, which runs inside a backward pass.

    Args:
        sync: In batch mode all ranks of a distributed training drop the same blocks.
        ramp: Of the network.

    Attributes:
        counting: With a ramp the network's blocks in order; the first that trains counts the steps.
    """

    def __init__(self, sync: bool, ramp: DropPathRamp | None) -> None:
        self.sync = sync
        self.ramp = ramp
        self.counting: list[ConvertedBlock] = []
        self._generator = SharedGenerator()
        self._remembered: OrderedDict[int, tuple[float, Decision]] = OrderedDict()

    @torch.compiler.disable
    def draw(self, block: ConvertedBlock, x: Tensor) -> tuple[float, Decision]:
        """p_l and the block's decision, None where nothing is dropped."""
        drop_path = block.stochastic_depth
        if self.ramp is None and not drop_path.drops:
            return 1.0, None
        shared = drop_path.mode == 'batch' and many_ranks()
        if shared and not self.sync:
            block.check_ranks()
            shared = False
        if not shared and self.ramp is None:
            return drop_path.p_l, self._draw(drop_path, x, None)

        ticket = int(torch.randint(2**63 - 1, (), device='cpu'))
        # The ticket alone does not tell: who seeds anew in every epoch meets it again
        recomputed = torch._C._current_graph_task_id() != -1
        known = self._remembered.get(ticket) if recomputed else None
        if not recomputed and self.ramp is not None and block.counts_steps:
            self.ramp.advance()
        p_l, decision = known or (drop_path.p_l, None)
        if p_l < 1 and not (shared and known):  # what comes from the default generator is drawn in both passes
            drawn = self._draw(drop_path, x, self._generator.get() if shared else None)
            decision = decision if known else drawn
        if known is None:
            self._remembered[ticket] = p_l, decision
            self._remembered.move_to_end(ticket)
            if len(self._remembered) > _REMEMBERED:
                self._remembered.popitem(last=False)
        return p_l, decision

    def _draw(self, drop_path: StochasticDepth, x: Tensor, generator: torch.Generator | None) -> Decision:
        if drop_path.mode == 'batch':
            return draw_per_batch([drop_path], generator)[0]
        return draw_per_sample([drop_path], x)[0]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_remembered': OrderedDict()}


class ConvertedBlock(nn.Module):
    """Put before a block's own class by `converted_class`.

    Attributes:
        plain_class: The block's own class.
        stochastic_depth: Survival probability and mode; a child of the block under the name of a drop path.
        draws: Shared with the network's other blocks.
        ends_in_relu: After the addition.
        plain_slots: (module, name, child) of every drop path that the block had.
    """

    plain_class: Any = nn.Module

    if TYPE_CHECKING:
        stochastic_depth: StochasticDepth
        draws: Draws
        ends_in_relu: bool
        plain_slots: list[tuple[nn.Module, str, nn.Module | None]]

    @property
    def counts_steps(self) -> bool:
        """Does a step of a network with a ramp begin here?"""
        return next((block for block in self.draws.counting if block.training), None) is self

    def decides_per_batch(self) -> bool:
        """Does it train, and decide for the whole mini-batch, or for all that follow?"""
        return self.training and (self.stochastic_depth.per_batch or self.counts_steps)

    @forward_by_mode
    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute `x + b_l / p_l * (block(x) - x)` in training, `block(x)` else.

        Args:
            x: (N, ...).
            *args: What the block's own class takes beside it, the same for all rows.
            **kwargs: The same.

        Returns:
            The shape of `x`.
        """
        drop_path = self.stochastic_depth
        if not self.training or not (drop_path.drops or self.draws.ramp or self.decides_per_batch()):
            return self.plain_class.forward(self, x, *args, **kwargs)
        if isinstance(x, torch.fx.Proxy):
            raise RuntimeError(TRACED)
        if drop_path.mode == 'batch':
            return self._forward_per_batch(x, args, kwargs)
        if self.counts_steps:
            return self._forward_first(x, args, kwargs)
        return self._forward_per_sample(x, args, kwargs)

    @outside_compiler
    def _forward_per_batch(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        p_l, decision = self.draws.draw(self, x)
        if decision is None:
            return own_code(self, '_forward_plain')(self, x, args, kwargs)
        if decision:
            return own_code(self, '_forward_scaled')(self, x, args, kwargs, 1 / p_l)
        return skip(x, self.parameters())

    @torch.compiler.disable
    def _forward_first(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """A network's step begins here, where no compiled code could count it."""
        return self._forward_drawn(x, args, kwargs, *self.draws.draw(self, x))

    def _forward_per_sample(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():  # compiled code keeps its own p_l for its backward pass
            drop_path = self.stochastic_depth
            return self._forward_drawn(x, args, kwargs, None, draw_per_sample([drop_path], x)[0])
        return self._forward_drawn(x, args, kwargs, *self.draws.draw(self, x))

    def _forward_plain(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        return self.plain_class.forward(self, x, *args, **kwargs)

    def _forward_scaled(self, x: Tensor, args: Any, kwargs: Any, factor: float | Tensor) -> Tensor:
        out = _scaled(x, self.plain_class.forward(self, x, *args, **kwargs), factor)
        return out.relu_() if self.ends_in_relu else out

    def _forward_drawn(self, x: Tensor, args: Any, kwargs: Any, p_l: float | None, decision: Decision) -> Tensor:
        if decision is None:
            return self._forward_plain(x, args, kwargs)
        drop_path = self.stochastic_depth
        if drop_path.mode == 'row':
            assert isinstance(decision, Tensor)
            mask = decision.view(-1, *[1] * (x.dim() - 1))
            return self._forward_scaled(x, args, kwargs, mask / (drop_path.p_l if p_l is None else p_l))
        self.check_split()
        batch = x.shape[0]
        rows = drop_path.rows(batch) if p_l is None else rows_of(p_l, batch)
        if rows >= batch or (rows == 1 and any(isinstance(module, _BatchNorm) for module in self.modules())):
            return self._forward_plain(x, args, kwargs)
        x, x_rows = take_rows(x, decision, rows)
        try:
            y_rows = _scaled(x_rows, self.plain_class.forward(self, x_rows, *args, **kwargs), batch / rows)
        except RuntimeError as error:
            further = (*args, *kwargs.values())
            if not any(isinstance(value, Tensor) and value.shape[:1] == (batch,) for value in further):
                raise
            raise RuntimeError(
                f'{self.plain_class.__name__} failed on {rows} of {batch} images; if it takes an argument for each '
                f"image, use drop_path_mode='batch': {error}"
            ) from error
        return put_rows(x.to(y_rows.dtype), y_rows, decision, relu=self.ends_in_relu)

    def check_ranks(self) -> None:
        """Raise where a draw that other ranks do not share would make SyncBatchNorm wait for ever."""
        if any(isinstance(module, nn.SyncBatchNorm) for module in self.modules()):
            raise RuntimeError(
                "drop_path_mode='batch' with SyncBatchNorm needs decisions that all ranks share: without them ranks "
                "would wait for each other for ever; leave drop_path_sync=True, or use drop_path_mode='subset'"
            )

    def check_split(self) -> None:
        """Raise where a norm layer would split the rows that are left."""
        if any(isinstance(module, SplitBatchNorm2d) for module in self.modules()):
            raise ValueError(
                "drop_path_mode='subset' cannot be combined with split BatchNorm, which needs the whole batch to "
                "split; use drop_path_mode='batch'"
            )

    def restore(self) -> None:
        """Back to what it was, in place."""
        for holder, name, child in self.plain_slots:
            if child is None:  # it was no child
                delattr(holder, name)
            setattr(holder, name, child if child is None else child.train(self.training))
        for name in ('stochastic_depth', 'draws', 'ends_in_relu', 'plain_slots'):
            del self.__dict__[name]
        self.__class__ = self.plain_class

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript sees the block's own class, with timm's drop path at the block's rate."""
        check_scriptable(self.draws.ramp, self.training)
        plain: Any = scriptable_copy(self)
        rate = 1 - plain.stochastic_depth.p_l
        for index, (holder, name, _) in enumerate(plain.plain_slots):
            plain.plain_slots[index] = holder, name, DropPath(rate) if rate else nn.Identity()
        plain.restore()
        return plain

    def __reduce__(self) -> Any:
        state = self.__getstate__() if hasattr(type(self), '__getstate__') else self.__dict__
        return _new_block, (self.plain_class,), state


@cache
def converted_class(plain: Any) -> Any:
    """The class that a block of the class `plain` gets; the same one every time."""
    names = {'plain_class': plain, '__module__': plain.__module__, '__doc__': plain.__doc__}
    cls: Any = type(f'Stochastic{plain.__name__}', (ConvertedBlock, plain), names)
    return register_notrace_module(cls)  # a leaf for torch.fx: no draw is frozen into a graph


def _new_block(plain: Any) -> Any:
    """For copying and unpickling."""
    cls = converted_class(plain)
    return cls.__new__(cls)


def _scaled(x: Tensor, out: Tensor, factor: float | Tensor) -> Tensor:
    """`x + factor * (out - x)`, of the type of `out`, which autocast may have changed."""
    if out.shape != x.shape:
        raise RuntimeError(f'a residual block must keep the shape of its input, got {x.shape} and then {out.shape}')
    if isinstance(factor, Tensor):
        factor = factor.to(out.dtype)
    return torch.lerp(x.to(out.dtype), out, factor)
