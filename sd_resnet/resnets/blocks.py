"""timm's ResNet blocks, skipping the branch that stochastic depth drops."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from timm.models import register_notrace_module
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from ..core.compiling import forward_by_mode, outside_compiler, own_code
from ..core.draws import Draw, Window, draw, many_ranks, nothing_survives, simplified
from ..core.drop_path import StochasticDepth
from ..core.private_api import hooks_on_saved_tensors, is_hooked, version_of
from ..core.refusals import check_draws_alone, check_takes_rows, check_traceable
from ..core.skipping import fork, fork_in_graph, join, join_in_graph, relu_in_graph, rows_in, skip
from . import paper_rescaling
from .scripting import scriptable_copy

Part = Callable[[str], Callable[..., Tensor]]  # a block's method by its name, compiled or not


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
        # And what the two kinds of blocks bring: the branch behind `conv1`, and the activation after the addition
        after_conv1: Callable[[Tensor], Tensor]
        last_act: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_path = StochasticDepth()

    def branch(self, x: Tensor) -> Tensor:
        """The residual function f_l, up to its last norm layer and attention."""
        return self.after_conv1(self.conv1(x))

    def activate(self, x: Tensor) -> Tensor:
        """The activation after the addition, in place."""
        return self.last_act(x)

    def shortcut(self, x: Tensor) -> Tensor:
        """The identity, or the projection where the shape changes."""
        return x if self.downsample is None else self.downsample(x)

    def runs_outside_compiler(self) -> bool:
        """Must its own frame be kept out of `torch.compile`?"""
        return isinstance(self.drop_path, StochasticDepth) and self.drop_path.runs_outside_compiler()

    @forward_by_mode
    def forward(self, x: Tensor, drawn: Draw | None = None, after_relu: bool = False) -> Tensor:
        """Compute `act(shortcut(x) + b_l * branch(x))`, equation 2, of (N, C, H, W); (N, C', H', W').

        Args:
            x: The block's input.
            drawn: What the network drew for this block; None, as when a block is called on its own, draws here from
                torch's default generator. Used in training only.
            after_relu: Does `x` come out of a ReLU, so that a second one changes nothing?
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
            self.check_draws_alone()
            handed = draw([self.drop_path], x, self.drop_path.mode)[0]
        return handed

    _draw_eagerly = torch.compiler.disable(draw)

    def _forward_drawn(self, x: Tensor, drawn: Draw, after_relu: bool, part: Part) -> Tensor:
        p_l, b_l = drawn
        factor = 0.0 if nothing_survives(b_l) else self.drop_path.train_factor(p_l)
        relu = self.ends_in_relu()
        if isinstance(b_l, Window):
            check_takes_rows([paper_rescaling.last_norm(self)])
            b_l = simplified(b_l, x, x.shape[0], one_value=max(x.shape[-2:]) <= self.stride)
        if isinstance(b_l, Window):
            if isinstance(b_l.start, Tensor):
                x, x_rows = fork_in_graph(x, b_l)
                out = join_in_graph(self.shortcut(x), self.branch(x_rows), b_l, factor, relu)
                return out if relu else self.activate(out)
            return self._forward_rows(x, b_l, factor, after_relu and relu, part)
        if isinstance(b_l, Tensor):
            out = part('masked_sum')(x, b_l, factor)
            in_subset_graph = relu and self.drop_path.mode == 'subset' and torch.compiler.is_compiling()
            return relu_in_graph(out) if in_subset_graph else part('activate')(out)
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
        if factor != 1:
            return torch.add(shortcut, branch, alpha=factor)
        branch += shortcut
        return branch

    def masked_sum(self, x: Tensor, mask: Tensor, factor: float) -> Tensor:
        """The same, with the branch of some rows only."""
        branch, shortcut = self.branch(x), self.shortcut(x)
        return torch.addcmul(shortcut, branch, mask.to(branch.dtype), value=factor)

    @outside_compiler
    def _forward_rows(self, x: Tensor, window: Window, factor: float, after_relu: bool, part: Part) -> Tensor:
        projects = self.downsample is not None
        relu = self.ends_in_relu() if projects else after_relu
        x, x_rows = fork(x, window, replaced=not projects)
        rows = self._branch_of_rows(x, x_rows, window, part)
        if projects:
            out = join(part('shortcut')(x), rows, window, factor, relu)
        else:
            out = join(x, torch.add(x_rows, rows, alpha=factor), window, None, relu)
        return out if relu else part('activate')(out)

    @outside_compiler
    def _branch_of_rows(self, x: Tensor, x_rows: Tensor, window: Window, part: Part) -> Tensor:
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

    def check_draws_alone(self) -> None:
        """Raise where a draw that other ranks do not share would make SyncBatchNorm wait for ever."""
        if self.drop_path.mode == 'batch' and many_ranks():
            check_draws_alone([paper_rescaling.last_norm(self)])  # all of a network's norms are alike

    def ends_in_relu(self) -> bool:
        """May a ReLU be put in the place of its activation?"""
        return isinstance(self.last_act, nn.ReLU) and not is_hooked(self.last_act)

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable_copy(self)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any, **kwargs: Any
    ) -> None:
        errors = kwargs['error_msgs'] if 'error_msgs' in kwargs else args[-1]
        paper_rescaling.fold(self, state_dict, prefix, local_metadata, errors)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)


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


class gathered_again(saved_tensors_hooks):
    """While active, an operation on `rows`, taken by `fork`, keeps no copy of them for backward.

    `fork` keeps its input, which other operations keep anyway; the rows are taken from it again in backward. What else
    the operation keeps goes to the hooks that were active before; a LookupError where torch does not tell them.
    """

    @torch.compiler.disable
    def __init__(self, rows: Tensor) -> None:
        taken: Any = rows.grad_fn
        address, layout = rows.data_ptr(), (rows.shape, rows.stride(), rows.dtype)
        outer_pack, outer_unpack = hooks_on_saved_tensors() or (_with_version, _if_unchanged)

        @torch.compiler.disable
        def pack(tensor: Tensor) -> Any:
            same = tensor.data_ptr() == address and (tensor.shape, tensor.stride(), tensor.dtype) == layout
            return None if same else (outer_pack(tensor),)

        @torch.compiler.disable
        def unpack(kept: Any) -> Tensor:
            return rows_in(taken.saved_tensors[0], taken.window) if kept is None else outer_unpack(*kept)

        super().__init__(pack, unpack)


def _with_version(tensor: Tensor) -> tuple[Tensor, int]:
    return tensor, version_of(tensor)


def _if_unchanged(kept: tuple[Tensor, int]) -> Tensor:
    """As torch does where no hooks are active."""
    tensor, version = kept
    if version_of(tensor) != version:
        raise RuntimeError('a tensor needed for gradient computation has been modified by an inplace operation')
    return tensor
