"""What a block of any network becomes when it is converted: its own class, with a forward pass that skips.

`UnitBlock` drops as one, whatever is inside: it computes `shortcut(x) + branch(x)`, and in training the branch is
skipped for a whole mini-batch, or runs on a part of the rows. `by_branch` has the block whose branches drop one by one.
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from timm.layers import DropPath
from timm.models import register_notrace_module
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..core.compiling import forward_by_mode, outside_compiler, own_code, warn_of_cuda_graphs
from ..core.draws import Draw, Window, draw, nothing_survives, simplified
from ..core.drop_path import StochasticDepth
from ..core.refusals import check_scriptable, check_takes_rows
from ..core.skipping import fork, fork_in_graph, join, join_in_graph, skip
from ..resnets.scripting import copy_sharing_tensors
from .draws import Draws
from .private_api import keep_shape, share_hooks


class BlockDropPath(StochasticDepth):
    """Survival probability of a block that drops as one, in its first drop path's place. It may scale the branch."""

    def __init__(self, survival_prob: float = 1.0, mode: str = 'subset') -> None:
        super().__init__(survival_prob, mode)
        self.factor: float | Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor.to(x.dtype) if isinstance(self.factor, Tensor) else self.factor
        return x if factor is None else x * factor


_NEVER = BlockDropPath().eval()  # where somebody has put something else in its place


class Converted(nn.Module):
    """Put before a module's own class by `change_class`; its names must be none that a module gives its children."""

    kind: Any  # the subclass of this one that it is
    plain_class: Any = nn.Module  # the module's own
    plain_forward: Callable[..., Any] | None  # that somebody has given this one module

    def plain_pass(self, *args: Any, **kwargs: Any) -> Any:
        """The module as it was."""
        forward = self.plain_forward or partial(self.plain_class.forward, self)
        return forward(*args, **kwargs)

    def restore(self) -> None:
        """Back to what it was before `change_class`, in place."""
        if self.plain_forward is not None:
            self.forward = self.plain_forward
        own = {name for cls in self.kind.__mro__ if issubclass(cls, Converted) for name in cls.__annotations__}
        for name in own - {'kind', 'plain_class'}:
            del self.__dict__[name]
        self.__class__ = self.plain_class

    def __reduce_ex__(self, protocol: Any) -> Any:  # its class is made at run time: pickle would not find it
        return _new, (self.kind, self.plain_class), *list(super().__reduce_ex__(2))[2:]


class ConvertedBlock(Converted):
    """A block with drop paths, made by `take_over`."""

    plain_slots: list[tuple[str, str, nn.Module | None]]  # (holder, name, child) of the drop paths that it had
    draws: Draws  # shared with the network's other blocks

    def drop_paths(self) -> list[StochasticDepth]:
        """In the places of those that it had, unless somebody has put something else there."""
        slots = [getattr(self.get_submodule(holder), name) for holder, name, _ in self.plain_slots]
        return [slot for slot in slots if isinstance(slot, StochasticDepth)]

    @property
    def block_drop_path(self) -> StochasticDepth:
        """The first of them; else the block never drops."""
        return [*self.drop_paths(), _NEVER][0]

    def runs_outside_compiler(self) -> bool:
        """Must its own frame be kept out of `torch.compile`?"""
        return self.block_drop_path.runs_outside_compiler()

    def restore(self) -> None:
        """Back to what it was before `take_over`, in place."""
        for path, name, child in self.plain_slots:
            holder = self.get_submodule(path)
            if child is None:  # it was no child
                delattr(holder, name)
            setattr(holder, name, child if child is None else child.train(self.training))
        super().restore()

    def __prepare_scriptable__(self) -> nn.Module:
        """TorchScript sees the block's own class, with timm's drop paths at the block's rates."""
        check_scriptable(self.draws.ramp, self.training)
        plain: Any = copy_sharing_tensors(self)
        drop_paths = [getattr(plain.get_submodule(holder), name) for holder, name, _ in plain.plain_slots]
        rates = [getattr(drop_path, 'drop_prob', None) for drop_path in drop_paths]
        first = plain.block_drop_path.drop_prob  # of a block that drops as one
        plain.plain_slots = [
            (holder, name, DropPath(first if rate is None else rate))
            for (holder, name, _), rate in zip(plain.plain_slots, rates)
        ]
        plain.restore()
        return plain


class UnitBlock(ConvertedBlock):
    """A block that drops as one."""

    last_relu: str | None  # see `Unit.activation`
    scales_inside: bool  # may a factor of its branch stand in the drop path's place?
    projection: tuple[str, ...]  # see `Unit`
    further: tuple[Any, ...] | None  # see `Unit`

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
            warn_of_cuda_graphs(x)
            out = self._forward_drawn_outside(x, args, kwargs, drawn, lambda name: partial(own_code(self, name), self))
            keep_shape(out)
        else:
            out = self._forward_drawn(x, args, kwargs, drawn, partial(getattr, self))
        return (out, *self.further) if self.further is not None and isinstance(out, Tensor) else out

    def _forward_drawn(self, x: Tensor, args: Any, kwargs: Any, drawn: Draw, part: Any) -> Any:
        """`part` gives a method by its name; where this frame is not compiled, one that is compiled by itself."""
        p_l, b_l = drawn
        factor = 0.0 if nothing_survives(b_l) else self.block_drop_path.train_factor(p_l)
        if isinstance(b_l, Window):
            check_takes_rows(self.modules())
            has_norm = any(isinstance(module, _BatchNorm) for module in self.modules())
            b_l = simplified(b_l, x, x.shape[0], one_value=has_norm)
        if isinstance(b_l, Window):
            if not isinstance(b_l.start, Tensor):
                return self._forward_rows(x, args, kwargs, b_l, factor, part)
            x, x_rows = fork_in_graph(x, b_l)
            change = self.scaled_block(x_rows, args, kwargs, factor) - self.without_branch(x_rows)
            return join_in_graph(self.without_branch(x), change, b_l, 1.0)
        if isinstance(b_l, Tensor):
            return part('scaled_block')(x, args, kwargs, b_l.view(-1, *[1] * (x.dim() - 1)) * factor)
        if b_l:
            return part('scaled_block')(x, args, kwargs, factor) if p_l < 1 else part('plain_pass')(x, *args, **kwargs)
        return skip(part('without_branch')(x), self.branch_parameters())

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
        return join(part('without_branch')(x).to(y_rows.dtype), y_rows, window, None)

    def scaled_block(self, x: Tensor, args: Any, kwargs: Any, factor: float | Tensor) -> Tensor:
        """With a factor for the branch: in the drop path's place, or else for all that the block adds."""
        # Where there is no ReLU both ways are the same; torch 2.5 sets no attribute in a compiled checkpoint
        outside = self.last_relu is None and not self.projection and torch.compiler.is_compiling()
        if self.scales_inside and not outside:
            drop_path: Any = self.block_drop_path
            drop_path.factor = factor
            try:
                return self._tensor(self.plain_pass(x, *args, **kwargs))
            finally:
                drop_path.factor = None
        out = self._tensor(self.plain_pass(x, *args, **kwargs))
        if out.shape != x.shape:
            raise RuntimeError(f'a residual block must keep the shape of its input, got {x.shape} and then {out.shape}')
        factor = factor.to(out.dtype) if isinstance(factor, Tensor) else factor
        out = torch.lerp(x.to(out.dtype), out, factor)  # autocast may have changed the type
        return out if self.last_relu is None else out.relu_()

    def _tensor(self, out: Any) -> Tensor:
        return out if self.further is None else out[0]

    def without_branch(self, x: Tensor) -> Tensor:
        """What it gives without its branch."""
        for name in self.projection:
            x = self.get_submodule(name)(x)
        if self.last_relu is None:
            return x
        return self.get_submodule(self.last_relu)(x.clone()) if self.last_relu else x.relu()

    def branch_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that a dropped block does not use."""
        used = {parameter for name in self.projection for parameter in self.get_submodule(name).parameters()}
        return (parameter for parameter in self.parameters() if parameter not in used)


def take_over(
    block: Any, kind: Any, places: list[tuple[str, str]], drop_paths: list[Any], draws: Draws, **own: Any
) -> None:
    """Make a block of a network a converted one of this kind, in place; `restore` takes it back.

    Its drop paths are at `places`, (holder, name); `own` are further attributes.
    """
    slots = [(holder, name, getattr(block.get_submodule(holder), name)) for holder, name in places]
    for (holder, name, child), drop_path in zip(slots, drop_paths):
        if child is not None:
            share_hooks(child, drop_path)
        setattr(block.get_submodule(holder), name, drop_path)
    change_class(block, kind, plain_slots=slots, draws=draws, **own)


def change_class(module: Any, kind: Any, **own: Any) -> None:
    """Make a module a converted one of this kind, with these attributes, in place."""
    # Not through nn.Module's __setattr__: nothing here is one more child of the module
    module.__dict__.update(plain_forward=module.__dict__.pop('forward', None), **own)
    module.__class__ = converted_class(kind, module.__class__)


@cache
def converted_class(kind: Any, plain: Any) -> Any:
    """The class that a module of the class `plain` gets; the same one every time."""
    names = {'kind': kind, 'plain_class': plain, '__module__': plain.__module__, '__doc__': plain.__doc__}
    # A network keeps its name, which transformers, for one, writes into a configuration
    name = f'Stochastic{plain.__name__}' if issubclass(kind, ConvertedBlock) else plain.__name__
    cls: Any = type(name, (kind, plain), names)
    return register_notrace_module(cls)  # a leaf for torch.fx: no draw is frozen into a graph


def _new(kind: Any, plain: Any) -> Any:
    return object.__new__(converted_class(kind, plain))
