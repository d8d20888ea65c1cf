"""timm's ResNet blocks, skipping the branch that stochastic depth drops."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from timm.layers import SplitBatchNorm2d
from timm.models import register_notrace_module
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.compiling import check_traceable, forward_by_mode, outside_compiler, own_code
from ..core.draws import Draw, Window, draw, many_ranks, nothing_survives, simplified
from ..core.drop_path import StochasticDepth
from ..core.private_api import is_hooked
from ..core.scripting import scriptable_copy
from ..core.skipping import fork, fork_in_graph, gathered_again, join, join_in_graph, put_rows, skip, take_rows
from . import paper_rescaling


class ResidualBlock(nn.Module):
    """What stochastic depth adds to a residual block; mixed into timm's blocks, whose parameter names it keeps.

    Where nothing is dropped, timm's own `forward` runs.
    """

    plain_class: Any = nn.Module  # timm's own block

    if TYPE_CHECKING:  # what timm's blocks bring
        aa: Any
        conv1: Any
        downsample: Any
        drop_path: Any  # a StochasticDepth, unless someone has put something else there
        se: Any
        stride: int
        zero_init_last: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_path = StochasticDepth()

    def branch(self, x: Tensor) -> Tensor:
        """The residual function f_l, up to its last norm layer and attention."""
        return self.after_conv1(self.conv1(x))

    def after_conv1(self, x: Tensor) -> Tensor:
        """The branch from its first convolution's output on."""
        raise AssertionError('a block brings its own branch')

    @property
    def last_act(self) -> nn.Module:
        """The activation after the addition."""
        raise AssertionError('a block brings its own activation')

    def activate(self, x: Tensor) -> Tensor:
        """The activation after the addition, in place."""
        return self.last_act(x)

    def shortcut(self, x: Tensor) -> Tensor:
        """The identity, or the projection where the shape changes."""
        if self.downsample is not None:
            x = self.downsample(x)
        return x

    def runs_outside_compiler(self) -> bool:
        """Must its own frame be kept out of `torch.compile`?"""
        return isinstance(self.drop_path, StochasticDepth) and self.drop_path.runs_outside_compiler()

    @forward_by_mode
    def forward(self, x: Tensor, drawn: Draw | None = None, after_relu: bool = False) -> Tensor:
        """Compute `act(shortcut(x) + b_l * branch(x))`.

        Args:
            x: (N, C, H, W).
            drawn: What the network drew for this block; None, as when a block is called on its own, draws here from
                torch's default generator. Used in training only.
            after_relu: Does `x` come out of a ReLU, so that a second one changes nothing?

        Returns:
            (N, C', H', W').
        """
        if self.runs_outside_compiler():
            return self._forward_outside(x, drawn, after_relu)
        if isinstance(self.drop_path, StochasticDepth) and self.drop_path.is_dropping():
            check_traceable(x)
            return self._forward_drawn(x, drawn or self.draw(x), after_relu, partial(getattr, self))
        return self.plain_class.forward(self, x)

    @outside_compiler
    def _forward_outside(self, x: Tensor, drawn: Draw | None, after_relu: bool) -> Tensor:
        """The draw is used here, and only what it leaves to do is compiled."""
        if self.drop_path.is_dropping():
            check_traceable(x)
            drawn = drawn or self._draw_eagerly(x)
        return self._forward_drawn_outside(x, drawn or Draw(1.0, True), after_relu, self._compiled_part)

    def _compiled_part(self, name: str) -> Callable[..., Tensor]:
        """A method, with a code object of its own; see `compiling`.

        But for the activation: at the end of a graph a compiler keeps a mask of it for backward, which on a CPU takes
        longer than the rest, while eager mode keeps the output, which the next block keeps anyway.
        """
        return self._activate_eagerly if name == 'activate' else partial(own_code(self, name), self)

    @torch.compiler.disable
    def _activate_eagerly(self, x: Tensor) -> Tensor:
        return self.activate(x)

    def draw(self, x: Tensor) -> Draw:
        """What the network handed over for this pass, else a draw of the block's own."""
        handed = None if torch.compiler.is_compiling() else self.__dict__.pop('handed', None)
        if handed is None:
            self.check_alone()
            handed = draw([self.drop_path], x, self.drop_path.mode)[0]
        return handed

    @torch.compiler.disable
    def _draw_eagerly(self, x: Tensor) -> Draw:
        return self.draw(x)

    def _forward_drawn(
        self, x: Tensor, drawn: Draw, after_relu: bool, part: Callable[[str], Callable[..., Tensor]]
    ) -> Tensor:
        p_l, b_l = drawn
        factor = 0.0 if nothing_survives(b_l) else self.drop_path.train_factor(p_l)
        relu = self.ends_in_relu()
        if isinstance(b_l, Window):
            self.check_window()
            b_l = simplified(b_l, x, one_value=max(x.shape[-2:]) <= self.stride)
        if isinstance(b_l, Window):
            return self._forward_window(x, b_l, factor, after_relu and relu, part)
        if isinstance(b_l, Tensor):
            return part('activate')(part('masked_sum')(x, b_l, factor))
        if b_l:
            return part('activate')(part('sum')(x, factor))
        if self.downsample is not None:
            x = part('shortcut')(x)
        if self.downsample is not None or not (after_relu and relu):
            # Not in place: it may be the shortcut that a hook has kept, or somebody's input
            x = x.relu() if relu else part('activate')(x.clone())
        return skip(x, self.branch_parameters())

    _forward_drawn_outside = outside_compiler(_forward_drawn)

    def sum(self, x: Tensor, factor: float) -> Tensor:
        """The whole block, but for its activation."""
        branch, shortcut = self.branch(x), self.shortcut(x)
        if factor == 1:
            branch += shortcut
        else:
            branch = torch.add(shortcut, branch, alpha=factor)
        return branch

    def masked_sum(self, x: Tensor, mask: Tensor, factor: float) -> Tensor:
        """The same, with the branch of some rows only."""
        branch, shortcut = self.branch(x), self.shortcut(x)
        return torch.addcmul(shortcut, branch, mask.to(branch.dtype), value=factor)

    def _forward_window(
        self, x: Tensor, window: Window, factor: float, after_relu: bool, part: Callable[[str], Callable[..., Tensor]]
    ) -> Tensor:
        if isinstance(window.start, Tensor):
            x, x_rows = fork_in_graph(x, window)
            return self.activate(join_in_graph(self.shortcut(x), self.branch(x_rows), window, factor))
        return self._forward_rows(x, window, factor, after_relu, part)

    @outside_compiler
    def _forward_rows(
        self, x: Tensor, window: Window, factor: float, after_relu: bool, part: Callable[[str], Callable[..., Tensor]]
    ) -> Tensor:
        relu = self.ends_in_relu()
        if self.downsample is not None:
            x, x_rows = fork(x, window)
            branch = self._branch_of_rows(x, x_rows, window, part)
            out = join(part('shortcut')(x), branch, window, factor, relu)
            return out if relu else part('activate')(out)
        x, x_rows = take_rows(x, window)
        branch = self._branch_of_rows(x, x_rows, window, part)
        out = put_rows(x, torch.add(x_rows, branch, alpha=factor), window, relu=after_relu)
        return out if after_relu else part('activate')(out)

    @outside_compiler
    def _branch_of_rows(
        self, x: Tensor, x_rows: Tensor, window: Window, part: Callable[[str], Callable[..., Tensor]]
    ) -> Tensor:
        wraps = window.start + window.rows > x.shape[0]
        if wraps and hasattr(x_rows.grad_fn, 'window'):  # the rows are a copy, which backward need not keep
            try:
                keeping_nothing = gathered_again(x_rows)
            except LookupError:
                return part('branch')(x_rows)
            with keeping_nothing:
                x_rows = self.conv1(x_rows)
            return part('after_conv1')(x_rows)
        return part('branch')(x_rows)

    def branch_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that a dropped block does not use."""
        for name, child in self.named_children():
            if name != 'downsample':
                yield from child.parameters()

    def check_alone(self) -> None:
        """Raise where a draw that other ranks do not share would make SyncBatchNorm wait for ever."""
        if self.drop_path.mode == 'batch' and many_ranks() and _holds(self, nn.SyncBatchNorm):
            raise RuntimeError(
                "drop_path_mode='batch' with SyncBatchNorm needs decisions that all ranks share: without them ranks "
                'would wait for each other for ever; leave drop_path_sync=True and call the whole model, or use '
                "drop_path_mode='row' or 'subset'"
            )

    def check_window(self) -> None:
        """Raise where a norm layer would split the rows that are left."""
        if _holds(self, SplitBatchNorm2d):
            raise ValueError(
                "drop_path_mode='subset' cannot be combined with split BatchNorm, which needs the whole batch to "
                "split; use drop_path_mode='batch' or 'row'"
            )

    def ends_in_relu(self) -> bool:
        """May a ReLU be put in the place of its activation?"""
        return isinstance(self.last_act, nn.ReLU) and not is_hooked(self.last_act)

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable_copy(self)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        paper_rescaling.fold(self, state_dict, prefix, local_metadata, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _holds(block: nn.Module, kind: type) -> bool:
    """Does a branch hold a norm layer of that kind? All of a network's are alike."""
    return isinstance(getattr(block, paper_rescaling.last_norm_name(block)), kind)


def blocks_in(module: nn.Module) -> Iterator[ResidualBlock]:
    """The residual blocks of a module in order, also those that somebody has wrapped."""
    if isinstance(module, ResidualBlock):
        yield module
    else:
        for child in module.children():
            yield from blocks_in(child)


class Stage(nn.Sequential):
    """The blocks of one stage, and whatever else somebody puts there; a plain `nn.Sequential` for who calls it so."""

    plain_class = nn.Sequential

    def runs_outside_compiler(self) -> bool:
        """Does one of the blocks?"""
        return any(block.runs_outside_compiler() for block in blocks_in(self))

    @forward_by_mode
    def forward(self, x: Tensor, drawn: Sequence[Draw] | None = None, grad_checkpointing: bool = False) -> Tensor:
        """Run the blocks.

        Args:
            x: (N, C, H, W).
            drawn: One draw per block; None lets each block draw for itself.
            grad_checkpointing: Recompute each block in the backward pass instead of keeping its activations.
        """
        before: Any = None
        for module in self:
            own = list(blocks_in(module))
            draws = None if drawn is None else drawn[: len(own)]
            drawn = None if drawn is None else drawn[len(own) :]
            if draws is not None and takes_draws(module):
                after_relu = before is not None and before.ends_in_relu() and not is_hooked(before)
                # By name: to a full backward hook, as under timm, the input is the one argument
                given: dict[str, Any] = {'drawn': draws[0], 'after_relu': after_relu}
                if grad_checkpointing:
                    given['use_reentrant'] = False
                x = checkpoint(module, x, **given) if grad_checkpointing else module(x, **given)
            elif draws is None and not grad_checkpointing:
                x = module(x)
            else:
                x = call_wrapped(module, x, own, draws, grad_checkpointing)
            before = module if takes_draws(module) else None
        return x


def takes_draws(module: nn.Module) -> bool:
    """Is it a block or a stage as it was made, whose `forward` nobody has replaced?"""
    return isinstance(module, (ResidualBlock, Stage)) and 'forward' not in module.__dict__


@outside_compiler
def call_wrapped(
    module: nn.Module,
    x: Tensor,
    blocks: Sequence[ResidualBlock],
    drawn: Sequence[Draw] | None,
    grad_checkpointing: bool = False,
) -> Tensor:
    """A module that somebody has put into the network, with a draw for each block in it, if there are any."""
    if drawn is None or not blocks:
        return checkpoint(module, x, use_reentrant=False) if grad_checkpointing else module(x)
    if grad_checkpointing:
        return checkpoint(_hand_over, module, x, blocks, drawn, use_reentrant=False)
    return _hand_over(module, x, blocks, drawn)


@outside_compiler
def _hand_over(module: nn.Module, x: Tensor, blocks: Sequence[ResidualBlock], drawn: Sequence[Draw]) -> Tensor:
    """Blocks that somebody has wrapped are called with their input alone."""
    for block, own in zip(blocks, drawn):
        block.__dict__['handed'] = own
    try:
        return module(x)
    finally:
        for block in blocks:
            block.__dict__.pop('handed', None)


@register_notrace_module  # a leaf for torch.fx: no draw is frozen into a graph
class StochasticBasicBlock(ResidualBlock, BasicBlock):
    """Two 3x3 convolutions (ResNet-18 and -34, and the paper's CIFAR nets)."""

    plain_class = BasicBlock

    def after_conv1(self, x: Tensor) -> Tensor:
        x = self.act1(self.drop_block(self.bn1(x)))
        x = self.bn2(self.conv2(self.aa(x)))
        if self.se is not None:
            x = self.se(x)
        return x

    @property
    def last_act(self) -> nn.Module:
        return self.act2


@register_notrace_module
class StochasticBottleneck(ResidualBlock, Bottleneck):
    """A 1x1, a 3x3 and a 1x1 convolution (ResNet-50 and deeper)."""

    plain_class = Bottleneck

    def after_conv1(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(x))
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        x = self.bn3(self.conv3(self.aa(x)))
        if self.se is not None:
            x = self.se(x)
        return x

    @property
    def last_act(self) -> nn.Module:
        return self.act3
