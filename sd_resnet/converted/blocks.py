"""What a residual block of any network becomes: its own class, and a forward pass that skips.

The block drops as one unit. Whatever is inside, it computes `x + branch(x)`: in training the branch, `block(x) - x`, is
skipped for a whole mini-batch, or runs on a part of the rows.
"""

from collections import OrderedDict
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.compiling import forward_by_mode, outside_compiler, own_code
from ..core.draws import Draw, SharedGenerator, Window, draw, nothing_survives, ranks_share, simplified, takes_gradients
from ..core.drop_path import StochasticDepth
from ..core.private_api import recomputing
from ..core.ramp import DropPathRamp
from ..core.refusals import check_counts_steps, check_scriptable, check_takes_rows, check_traceable
from ..core.scripting import copy_sharing_tensors
from ..core.skipping import fork, fork_in_graph, join, join_in_graph, skip
from .search import Found

_REMEMBERED = 2**14  # passes through a block between a forward pass and its backward pass


class BlockDropPath(StochasticDepth):
    """The block's survival probability, in its first drop path's place. It may scale the branch; the block drops."""

    def __init__(self, survival_prob: float = 1.0, mode: str = 'subset') -> None:
        super().__init__(survival_prob, mode)
        self.factor: float | Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor.to(x.dtype) if isinstance(self.factor, Tensor) else self.factor
        return x if factor is None else x * factor


_NEVER = BlockDropPath().eval()  # where somebody has put something else in its place


class Draws:
    """How the converted blocks of one network draw.

    When a block runs, from torch's default CPU generator, which activation checkpointing restores for its second pass.
    What is not drawn from there, because ranks share it or a ramp has moved on, is remembered under a ticket that is.
    """

    def __init__(self, sync: bool, ramp: DropPathRamp | None) -> None:
        self.sync, self.ramp = sync, ramp
        self.counting: list[ConvertedBlock] = []  # with a ramp all blocks: a step begins at the first that trains
        self._generator = SharedGenerator()
        self._remembered: OrderedDict[int, Draw] = OrderedDict()

    @torch.compiler.disable
    def draw(self, block: 'ConvertedBlock', x: Tensor) -> Draw:
        """The block's draw for this pass; a RuntimeError where a recomputation does not find it."""
        check_traceable(x)
        if self.ramp is not None:
            check_counts_steps(block)
        drop_path = block.block_drop_path
        # Whatever the rate: in a ramp it moves on
        shared = drop_path.mode == 'batch' and ranks_share(x, self.sync, block.modules())
        if not shared and self.ramp is None:
            return draw([drop_path], x, drop_path.mode)[0]
        # Of the default generator both passes take the same numbers, whether they use them or not
        ticket = int(torch.randint(2**63 - 1, (), device='cpu'))
        if recomputing():  # the ticket alone does not tell: who seeds anew in every epoch meets it again
            if (drawn := self._remembered.get(ticket)) is None:
                raise RuntimeError(
                    'a checkpointed region runs again, and its draws are not known: use preserve_rng_state=True, and '
                    f'run the backward pass in the process of the forward pass, after at most {_REMEMBERED} blocks'
                )
            if drop_path.mode == 'row':
                return Draw(drawn.p_l, drop_path.mask(x, drawn.p_l))
            if not shared:
                draw([drop_path], x, drop_path.mode)
            return drawn
        first = next((each for each in self.counting if each.block_drop_path.training), None)
        if self.ramp is not None and takes_gradients(x) and block is first:
            self.ramp.advance()
        drawn = draw([drop_path], x, drop_path.mode, self._generator.get() if shared else None)[0]
        # A mask is drawn again: it is of the images' device
        self._remembered[ticket] = Draw(drawn.p_l, True) if isinstance(drawn.b_l, Tensor) else drawn
        self._remembered.move_to_end(ticket)
        if len(self._remembered) > _REMEMBERED:
            self._remembered.popitem(last=False)
        return drawn

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, '_remembered': OrderedDict()}


class ConvertedBlock(nn.Module):
    """Put before a block's own class by `take_over`; its names must be none that a block gives its children."""

    plain_class: Any = nn.Module  # the block's own
    plain_forward: Callable[..., Any] | None  # that somebody has given this one block
    plain_slots: list[tuple[str, str, nn.Module | None]]  # (holder, name, child) of the drop paths that it had
    draws: Draws  # shared with the network's other blocks
    last_relu: str | None  # see `Found.activation`
    scales_inside: bool  # may a factor of its branch stand in the drop path's place?

    @property
    def block_drop_path(self) -> StochasticDepth:
        """Survival probability and mode, in the place of the first drop path; else the block never drops."""
        holder, name, _ = self.plain_slots[0]
        found: Any = getattr(self.get_submodule(holder), name)
        return found if isinstance(found, BlockDropPath) else _NEVER

    def runs_outside_compiler(self) -> bool:
        """Must its own frame be kept out of `torch.compile`?"""
        return self.block_drop_path.runs_outside_compiler()

    @forward_by_mode
    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """`x + b_l / p_l * (block(x) - x)` in training, else `block(x)`; all further arguments are for all N rows."""
        drop_path = self.block_drop_path
        if not drop_path.is_dropping():
            drawn = Draw(1.0, True)
        elif torch.compiler.is_compiling():  # compiled code keeps its own draws for its backward pass
            drawn = draw([drop_path], x, drop_path.mode)[0]
        else:
            drawn = self.draws.draw(self, x)
        if drop_path.runs_outside_compiler():
            return self._forward_drawn_outside(x, args, kwargs, drawn, lambda name: partial(own_code(self, name), self))
        return self._forward_drawn(x, args, kwargs, drawn, partial(getattr, self))

    def _forward_drawn(self, x: Tensor, args: Any, kwargs: Any, drawn: Draw, part: Any) -> Any:
        """`part` gives a method by its name; where this frame is not compiled, one that is compiled by itself."""
        p_l, b_l = drawn
        factor = 0.0 if nothing_survives(b_l) else self.block_drop_path.train_factor(p_l)
        if isinstance(b_l, Window):
            check_takes_rows(self.modules())
            b_l = simplified(b_l, x, one_value=any(isinstance(module, _BatchNorm) for module in self.modules()))
        if isinstance(b_l, Window):
            if not isinstance(b_l.start, Tensor):
                return self._forward_rows(x, args, kwargs, b_l, factor, part)
            x, x_rows = fork_in_graph(x, b_l)
            change = self.scaled_block(x_rows, args, kwargs, factor) - self.without_branch(x_rows)
            return join_in_graph(self.without_branch(x), change, b_l, 1.0)
        if isinstance(b_l, Tensor):
            return part('scaled_block')(x, args, kwargs, b_l.view(-1, *[1] * (x.dim() - 1)) * factor)
        if b_l:
            return part('plain_block')(x, args, kwargs) if p_l == 1 else part('scaled_block')(x, args, kwargs, factor)
        return skip(part('without_branch')(x), self.parameters())

    _forward_drawn_outside = outside_compiler(_forward_drawn)

    @outside_compiler
    def _forward_rows(self, x: Tensor, args: Any, kwargs: Any, window: Window, factor: float, part: Any) -> Tensor:
        x, x_rows = fork(x, window, replaced=True)
        try:
            y_rows = part('scaled_block')(x_rows, args, kwargs, factor)
        except RuntimeError as error:
            if not any(isinstance(v, Tensor) and v.shape[:1] == x.shape[:1] for v in (*args, *kwargs.values())):
                raise
            failed = f'{self.plain_class.__name__} failed on {window.rows} of {x.shape[0]} images'
            cure = "if it takes an argument for each image, use drop_path_mode='batch'"
            raise RuntimeError(f'{failed}; {cure}: {error}') from error
        return join(part('without_branch')(x).to(y_rows.dtype), y_rows, window, None, relu=False)

    def plain_block(self, x: Any, args: Any, kwargs: Any) -> Any:
        """The block as it was."""
        forward = self.plain_forward or partial(self.plain_class.forward, self)
        return forward(x, *args, **kwargs)

    def scaled_block(self, x: Tensor, args: Any, kwargs: Any, factor: float | Tensor) -> Tensor:
        """With a factor for the branch: in the drop path's place, or else for all that the block adds."""
        # Where there is no ReLU both ways are the same; torch 2.5 sets no attribute in a compiled checkpoint
        if self.scales_inside and not (self.last_relu is None and torch.compiler.is_compiling()):
            drop_path: Any = self.block_drop_path
            drop_path.factor = factor
            try:
                return self.plain_block(x, args, kwargs)
            finally:
                drop_path.factor = None
        out = self.plain_block(x, args, kwargs)
        if out.shape != x.shape:
            raise RuntimeError(f'a residual block must keep the shape of its input, got {x.shape} and then {out.shape}')
        factor = factor.to(out.dtype) if isinstance(factor, Tensor) else factor
        out = torch.lerp(x.to(out.dtype), out, factor)  # autocast may have changed the type
        return out if self.last_relu is None else out.relu_()

    def without_branch(self, x: Tensor) -> Tensor:
        """What it gives without its branch."""
        if self.last_relu is None:
            return x
        return self.get_submodule(self.last_relu)(x.clone()) if self.last_relu else x.relu()

    def restore(self) -> None:
        """Back to what it was before `take_over`, in place."""
        for path, name, child in self.plain_slots:
            holder = self.get_submodule(path)
            if child is None:  # it was no child
                delattr(holder, name)
            setattr(holder, name, child if child is None else child.train(self.training))
        if self.plain_forward is not None:
            self.forward = self.plain_forward
        for name in ('plain_forward', 'plain_slots', 'draws', 'last_relu', 'scales_inside'):
            del self.__dict__[name]
        self.__class__ = self.plain_class

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript sees the block's own class, with timm's drop path at the block's rate."""
        check_scriptable(self.draws.ramp, self.training)
        plain: Any = copy_sharing_tensors(self)
        rate = plain.block_drop_path.drop_prob
        plain.plain_slots = [(holder, name, DropPath(rate)) for holder, name, _ in plain.plain_slots]
        plain.restore()
        return plain

    def __reduce_ex__(self, protocol: Any) -> Any:  # its class is made at run time: pickle would not find it
        return _new_block, (self.plain_class,), *list(super().__reduce_ex__(2))[2:]


def take_over(block: Any, found: Found, drop_path: BlockDropPath, draws: Draws) -> None:
    """Make a block of a network a converted one, in place; `restore` takes it back."""
    places = [(slot.holder.removeprefix(found.name).removeprefix('.'), slot.name) for slot in found.slots]
    # Not through nn.Module's __setattr__: nothing here is one more child of the block
    block.__dict__.update(
        plain_forward=block.__dict__.pop('forward', None),
        plain_slots=[(holder, name, getattr(block.get_submodule(holder), name)) for holder, name in places],
        draws=draws,
        last_relu=found.activation,
        scales_inside=found.identity and len(places) == 1,
    )
    for place, (holder, name) in enumerate(places):
        setattr(block.get_submodule(holder), name, nn.Identity() if place else drop_path)
    block.__class__ = converted_class(block.__class__)


@cache
def converted_class(plain: Any) -> Any:
    """The class that a block of the class `plain` gets; the same one every time."""
    names = {'plain_class': plain, '__module__': plain.__module__, '__doc__': plain.__doc__}
    cls: Any = type(f'Stochastic{plain.__name__}', (ConvertedBlock, plain), names)
    return register_notrace_module(cls)  # a leaf for torch.fx: no draw is frozen into a graph


def _new_block(plain: Any) -> Any:
    return object.__new__(converted_class(plain))
