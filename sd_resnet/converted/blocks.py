"""What a residual block of a foreign network becomes: its own class, and a forward pass that skips.

The block is seen from outside: it computes `x + branch(x)`, whatever is inside, and drops as one unit. In training the
branch, `block(x) - x`, is skipped for a whole mini-batch, or runs on a part of the rows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import DropPath, SplitBatchNorm2d
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.compiling import check_traceable, forward_by_mode, outside_compiler, own_code
from ..core.draws import (
    Draw,
    SharedGenerator,
    Window,
    draw,
    many_ranks,
    nothing_survives,
    simplified,
    takes_gradients,
)
from ..core.drop_path import StochasticDepth
from ..core.private_api import is_replica, recomputing
from ..core.ramp import DropPathRamp, check_scriptable
from ..core.scripting import copy_sharing_tensors
from ..core.skipping import fork_in_graph, join_in_graph, put_rows, skip, take_rows

_REMEMBERED = 2**14  # passes through a block between a forward pass and its backward pass


class BlockDropPath(StochasticDepth):
    """The block's survival probability, where the block's first drop path was. The block itself drops.

    Attributes:
        factor: Of the branch, while the block runs; None where the block as a whole is scaled, or nothing is.
    """

    def __init__(self, survival_prob: float = 1.0, mode: str = 'subset') -> None:
        super().__init__(survival_prob, mode)
        self.factor: float | Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.factor is None:
            return x
        return x * (self.factor.to(x.dtype) if isinstance(self.factor, Tensor) else self.factor)


_NEVER = BlockDropPath().eval()  # where somebody has put something else in its place


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
        self._remembered: OrderedDict[int, Draw] = OrderedDict()

    @torch.compiler.disable
    def draw(self, block: ConvertedBlock, x: Tensor) -> Draw:
        """The block's draw for this pass.

        Raises:
            RuntimeError: A checkpointed region runs again, and its first pass is not known.
        """
        drop_path = block.block_drop_path
        if self.ramp is not None and is_replica(block):
            self.ramp.refuse_replica()
        shared = drop_path.mode == 'batch' and many_ranks()  # whatever the rate: in a ramp it moves on
        if shared and not self.sync:
            block.check_ranks()
        # A pass without gradients may be made on one rank only
        shared = shared and self.sync and takes_gradients(x)
        if not shared and self.ramp is None:
            return draw([drop_path], x, drop_path.mode)[0]

        # Of the default generator both passes take the same numbers, whether they use them or not
        ticket = int(torch.randint(2**63 - 1, (), device='cpu'))
        if recomputing():  # the ticket alone does not tell: who seeds anew in every epoch meets it again
            if ticket not in self._remembered:
                raise RuntimeError(
                    'a checkpointed region runs again in the backward pass, and what its blocks drew in the forward '
                    'pass is not known: checkpoint with preserve_rng_state=True, and run the backward pass in the '
                    f'process that ran the forward pass, after at most {_REMEMBERED} blocks'
                )
            drawn = self._remembered[ticket]
            if not shared and drop_path.mode != 'row':
                draw([drop_path], x, drop_path.mode)
            elif not shared:
                drawn = Draw(drawn.p_l, drop_path.mask(x, drawn.p_l))
            return drawn
        if self.ramp is not None and takes_gradients(x) and block.counts_steps():
            self.ramp.advance()
        drawn = draw([drop_path], x, drop_path.mode, self._generator.get() if shared else None)[0]
        self._remember(ticket, drawn)
        return drawn

    def _remember(self, ticket: int, drawn: Draw) -> None:
        # A mask is drawn again: it is of the images' device
        self._remembered[ticket] = Draw(drawn.p_l, True) if isinstance(drawn.b_l, Tensor) else drawn
        self._remembered.move_to_end(ticket)
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_remembered': OrderedDict()}


class ConvertedBlock(nn.Module):
    """Put before a block's own class by `converted_class`; its names must be none that a block gives its children.

    Attributes:
        plain_class: The block's own class.
        plain_forward: A `forward` that somebody has given this one block, or None.
        draws: Shared with the network's other blocks.
        last_relu: After the addition a ReLU: the name of its module, or '' for a function; None for none.
        scales_inside: May a factor of its branch stand in the drop path's place?
        plain_slots: (holder, name, child) of every drop path that the block had, the holder by its name in the block.
    """

    plain_class: Any = nn.Module

    if TYPE_CHECKING:
        plain_forward: Callable[..., Any] | None
        draws: Draws
        last_relu: str | None
        scales_inside: bool
        plain_slots: list[tuple[str, str, nn.Module | None]]

    @property
    def block_drop_path(self) -> StochasticDepth:
        """Survival probability and mode, in the place of the first drop path; else the block never drops."""
        holder, name, _ = self.plain_slots[0]
        found: Any = getattr(self.get_submodule(holder) if holder else self, name)
        return found if isinstance(found, BlockDropPath) else _NEVER

    def counts_steps(self) -> bool:
        """Does a step of a network with a ramp begin here?"""
        for block in self.draws.counting:
            if block.block_drop_path.training:
                return block is self
        return False

    def runs_outside_compiler(self) -> bool:
        """Must its own frame be kept out of `torch.compile`?"""
        return self.block_drop_path.runs_outside_compiler()

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
        if self.runs_outside_compiler():
            return self._forward_outside(x, args, kwargs)
        if self.block_drop_path.is_dropping():
            check_traceable(x)
            drop_path = self.block_drop_path
            if torch.compiler.is_compiling():  # compiled code keeps its own draws for its backward pass
                drawn = draw([drop_path], x, drop_path.mode)[0]
            else:
                drawn = self.draws.draw(self, x)
            return self._forward_drawn(x, args, kwargs, drawn, partial(getattr, self))
        return self.plain_block(x, args, kwargs)

    @outside_compiler
    def _forward_outside(self, x: Any, args: Any, kwargs: Any) -> Any:
        drawn = Draw(1.0, True)
        if self.block_drop_path.is_dropping():
            check_traceable(x)
            drawn = self.draws.draw(self, x)
        return self._forward_drawn_outside(x, args, kwargs, drawn, lambda name: partial(own_code(self, name), self))

    def plain_block(self, x: Any, args: Any, kwargs: Any) -> Any:
        """The block as it was."""
        if self.plain_forward is not None:
            return self.plain_forward(x, *args, **kwargs)
        return self.plain_class.forward(self, x, *args, **kwargs)

    def scaled_block(self, x: Tensor, args: Any, kwargs: Any, factor: float | Tensor) -> Tensor:
        """With a factor for the branch: in the drop path's place, or, else, for all that the block adds."""
        # Where there is no ReLU both ways are the same; torch 2.5 sets no attribute in a compiled checkpoint
        if not self.scales_inside or (self.last_relu is None and torch.compiler.is_compiling()):
            out = _scaled(x, self.plain_block(x, args, kwargs), factor)
            return out if self.last_relu is None else out.relu_()
        drop_path: Any = self.block_drop_path
        drop_path.factor = factor
        try:
            return self.plain_block(x, args, kwargs)
        finally:
            drop_path.factor = None

    def without_branch(self, x: Tensor) -> Tensor:
        """What it gives without its branch."""
        if self.last_relu is None:
            return x
        return self.get_submodule(self.last_relu)(x.clone()) if self.last_relu else x.relu()

    def _forward_drawn(
        self, x: Tensor, args: Any, kwargs: Any, drawn: Draw, part: Callable[[str], Callable[..., Tensor]]
    ) -> Any:
        p_l, b_l = drawn
        if isinstance(b_l, Window):
            self.check_split()
            b_l = simplified(b_l, x, one_value=any(isinstance(module, _BatchNorm) for module in self.modules()))
        if isinstance(b_l, Window):
            rows = self._forward_index if isinstance(b_l.start, Tensor) else self._forward_rows
            return rows(x, args, kwargs, b_l, 0.0 if nothing_survives(b_l) else 1 / p_l, part)
        if isinstance(b_l, Tensor):
            return part('scaled_block')(x, args, kwargs, b_l.view(-1, *[1] * (x.dim() - 1)) / p_l)
        if b_l:
            return part('plain_block')(x, args, kwargs) if p_l == 1 else part('scaled_block')(x, args, kwargs, 1 / p_l)
        return skip(part('without_branch')(x) if self.last_relu is not None else x, self.parameters())

    _forward_drawn_outside = outside_compiler(_forward_drawn)

    def _forward_index(self, x: Tensor, args: Any, kwargs: Any, window: Window, factor: float, part: Any) -> Tensor:
        x, x_rows = fork_in_graph(x, window)
        change = self.scaled_block(x_rows, args, kwargs, factor) - self.without_branch(x_rows)
        return join_in_graph(self.without_branch(x), change, window, 1.0)

    @outside_compiler
    def _forward_rows(self, x: Tensor, args: Any, kwargs: Any, window: Window, factor: float, part: Any) -> Tensor:
        x, x_rows = take_rows(x, window)
        try:
            y_rows = part('scaled_block')(x_rows, args, kwargs, factor)
        except RuntimeError as error:
            further, batch = (*args, *kwargs.values()), x.shape[0]
            if not any(isinstance(value, Tensor) and value.shape[:1] == (batch,) for value in further):
                raise
            raise RuntimeError(
                f'{self.plain_class.__name__} failed on {window.rows} of {batch} images; if it takes an argument for '
                f"each image, use drop_path_mode='batch': {error}"
            ) from error
        x = part('without_branch')(x) if self.last_relu is not None else x
        return put_rows(x.to(y_rows.dtype), y_rows, window, relu=False)

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
        for path, name, child in self.plain_slots:
            holder = self.get_submodule(path)
            if child is None:  # it was no child
                delattr(holder, name)
            setattr(holder, name, child if child is None else child.train(self.training))
        if self.plain_forward is not None:
            self.forward = self.plain_forward
        for name in ('plain_forward', 'draws', 'last_relu', 'scales_inside', 'plain_slots'):
            del self.__dict__[name]
        self.__class__ = self.plain_class

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript sees the block's own class, with timm's drop path at the block's rate."""
        check_scriptable(self.draws.ramp, self.training)
        plain: Any = copy_sharing_tensors(self)
        rate = 1 - plain.block_drop_path.p_l
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
