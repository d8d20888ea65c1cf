"""timm's ResNet blocks, skipping the branch that stochastic depth drops.

Loading never changes what a network computes at test time: a block multiplies its branch by `test_scale`, so a
checkpoint of another convention is met by rescaling the affine weights of the branch's last norm layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from timm.layers import SplitBatchNorm2d
from timm.models import register_notrace_module
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .compiling import TRACED, forward_by_mode, outside_compiler, own_code
from .functions import fork, gathered_again, join, put_rows, skip, take_rows
from .ramp import DropPathRamp
from .ranks import many_ranks
from .stochastic_depth import (
    Decision,
    StochasticDepth,
    check_settings,
    draw_per_batch,
    draw_per_sample,
    scriptable_copy,
)


class ResidualBlock(nn.Module):
    """What stochastic depth adds to a residual block; mixed into timm's blocks, whose parameter names it keeps.

    Loading: a state dict states its block's test-time factor as `<block>.drop_path.survival_prob`, absent where it
    is 1. The last norm's weight and bias are multiplied by p_checkpoint / p_model, in float32. A dict with neither a
    stored probability nor the norm's running statistics (parameters alone) is not rescaled.
    """

    last_norm = ''  # name of the norm layer that ends the branch
    plain_class: Any = nn.Module  # timm's own block

    if TYPE_CHECKING:  # what timm's blocks bring; TorchScript would read plain annotations
        aa: Any
        conv1: Any
        downsample: Any
        drop_path: Any  # a StochasticDepth
        se: Any
        stride: int
        zero_init_last: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.drop_path = StochasticDepth(device=kwargs.get('device'), dtype=kwargs.get('dtype'))

    def branch(self, x: Tensor) -> Tensor:
        """The residual function f_l, up to its last norm layer and attention."""
        return self.after_conv1(self.conv1(x))

    def after_conv1(self, x: Tensor) -> Tensor:
        """The branch from its first convolution's output on."""
        raise AssertionError('a block brings its own branch')

    def activate(self, x: Tensor) -> Tensor:
        """The activation after the addition, in place."""
        raise AssertionError('a block brings its own activation')

    def shortcut(self, x: Tensor) -> Tensor:
        """The identity, or the projection where the shape changes."""
        if self.downsample is not None:
            x = self.downsample(x)
        return x

    def decides_per_batch(self) -> bool:
        """Does it train, and decide for the whole mini-batch?"""
        return self.training and self.drop_path.per_batch

    @forward_by_mode
    def forward(self, x: Tensor, decision: Decision = None) -> Tensor:
        """Compute `act(shortcut(x) + b_l * branch(x))`.

        Args:
            x: (N, C, H, W).
            decision: What the model drew for this block; None, as when a block is called on its own, draws here
                from torch's default generator. Used in training only.

        Returns:
            (N, C', H', W').
        """
        if torch.jit.is_scripting():
            return self._forward_scripted(x)
        else:
            if self.decides_per_batch():
                return self._forward_per_batch(x, decision)
            if self.training and self.drop_path.drops:
                return self._forward_per_sample(x, decision)
            return self._forward_whole(x, self.drop_path.test_scale)

    def _forward_whole(self, x: Tensor, factor: float) -> Tensor:
        return self.activate(self._sum(x, factor))

    def _sum(self, x: Tensor, factor: float) -> Tensor:
        branch, shortcut = self.branch(x), self.shortcut(x)
        if factor == 1:
            branch += shortcut
        else:
            branch = torch.add(shortcut, branch, alpha=factor)
        return branch

    @outside_compiler
    def _forward_per_batch(self, x: Tensor, decision: Decision) -> Tensor:
        """Batch mode in training: the decision is taken here, and only what it leaves to do is compiled.

        But for the activation: at the end of a graph a compiler keeps a mask of it for backward, which on a CPU takes
        longer than the rest, while eager mode keeps the output, which the next block keeps anyway.
        """
        alone = decision is None
        if not self.drop_path.drops:
            decision = True
        elif isinstance(x, torch.fx.Proxy):
            raise RuntimeError(TRACED)
        elif decision is None:
            self.check_alone()
            decision = draw_per_batch([self.drop_path])[0]
        if decision:
            total = own_code(self, '_sum')(self, x, self.drop_path.train_factor(self.drop_path.p_l))
            return self._activate_eagerly(total)
        if self.downsample is not None:
            out = self._activate_eagerly(own_code(self, 'shortcut')(self, x))
        elif alone or not self._ends_in_relu():
            out = self._activate_eagerly(x.clone())
        else:
            out = x  # relu(x): in a network, x comes out of a ReLU
        return skip(out, self.branch_parameters())

    @torch.compiler.disable
    def _activate_eagerly(self, x: Tensor) -> Tensor:
        return self.activate(x)

    def _forward_per_sample(self, x: Tensor, decision: Decision) -> Tensor:
        if isinstance(x, torch.fx.Proxy):
            raise RuntimeError(TRACED)
        alone = decision is None
        if decision is None:
            decision = draw_per_sample([self.drop_path], x)[0]
        assert decision is not None
        if self.drop_path.mode == 'subset':
            return self._forward_subset(x, decision, alone)
        assert isinstance(decision, Tensor)
        branch, shortcut = self.branch(x), self.shortcut(x)
        factor = self.drop_path.train_factor(self.drop_path.p_l)
        return self.activate(torch.addcmul(shortcut, branch, decision.to(branch), value=factor))

    def _forward_subset(self, x: Tensor, start: int | Tensor, alone: bool) -> Tensor:
        if isinstance(getattr(self, self.last_norm), SplitBatchNorm2d):
            raise ValueError(
                "drop_path_mode='subset' cannot be combined with split BatchNorm, which needs the whole batch to "
                "split; use drop_path_mode='batch' or 'row'"
            )
        batch = x.shape[0]
        rows = self.drop_path.rows(batch)
        if rows >= batch or (rows == 1 and self._is_one_pixel(x)):
            return self._forward_whole(x, 1.0)
        factor = self.drop_path.train_factor(rows / batch)
        copied = not isinstance(start, Tensor) and start + rows > batch  # the window wraps
        if self.downsample is not None:
            x, x_rows = fork(x, start, rows)
            branch = self._branch_of_rows(x_rows, copied)
            return self.activate(join(self.downsample(x), branch, start, factor))
        x, x_rows = take_rows(x, start, rows)
        branch = self._branch_of_rows(x_rows, copied)
        y_rows = branch.add_(x_rows) if factor == 1 else torch.add(x_rows, branch, alpha=factor)
        if alone or not self._ends_in_relu():
            return self.activate(put_rows(x, y_rows, start, relu=False))
        return put_rows(x, y_rows, start, relu=True)  # the other rows: relu(x), and x comes out of a ReLU

    def _branch_of_rows(self, x_rows: Tensor, copied: bool) -> Tensor:
        if not copied or torch.compiler.is_compiling() or not hasattr(x_rows.grad_fn, 'start'):
            return self.branch(x_rows)  # without `start`: nothing was taken from a graph, or compiled code has done it
        with gathered_again(x_rows):
            x = self.conv1(x_rows)
        return self.after_conv1(x)

    def _forward_scripted(self, x: Tensor) -> Tensor:
        branch, shortcut = self.branch(x), self.shortcut(x)
        if self.training and self.drop_path.p_l < 1.0:
            return self.activate(torch.addcmul(shortcut, branch, self.drop_path.gate(branch)))
        if self.drop_path.rescale == 'test' and self.drop_path.p_l < 1.0:
            return self.activate(torch.add(shortcut, branch, alpha=self.drop_path.p_l))
        branch += shortcut
        return self.activate(branch)

    def branch_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that a dropped block does not use."""
        for name, child in self.named_children():
            if name != 'downsample':
                yield from child.parameters()

    def check(self, survival_prob: float, mode: str, rescale: str) -> None:
        """Raise a ValueError where `configure` could not do this, before anything has changed."""
        check_settings(survival_prob, mode, rescale)
        if rescale == 'train' or survival_prob == 1:
            return
        norm = getattr(self, self.last_norm)
        if self.se is not None:
            raise ValueError(
                "drop_path_rescale='test' cannot be combined with an attention layer after the last norm layer: "
                "survival probabilities could not be folded into the weights; use drop_path_rescale='train'"
            )
        if getattr(norm, 'weight', None) is None or getattr(norm, 'bias', None) is None:
            raise ValueError(
                f"drop_path_rescale='test' needs a last norm layer with weight and bias, got {norm}; "
                "use drop_path_rescale='train'"
            )

    def configure(self, survival_prob: float, mode: str, rescale: str, keep_function: bool) -> None:
        """Set the survival probability, mode and rescaling, in place.

        Args:
            survival_prob: p_l, in (0, 1].
            mode: See `StochasticDepth`.
            rescale: See `StochasticDepth`.
            keep_function: Rescale the last norm layer, so that the test-time function stays.

        Raises:
            ValueError: As `check`.
        """
        self.check(survival_prob, mode, rescale)
        norm = getattr(self, self.last_norm)
        old = self.drop_path.test_scale
        self.drop_path.configure(survival_prob, mode, rescale)
        self.drop_path.rebuild_carrier(like=getattr(norm, 'weight', None))
        if keep_function and old != self.drop_path.test_scale:
            for module in norm.modules():  # split BatchNorm holds auxiliary ones
                for tensor in (module.weight, module.bias) if hasattr(module, 'weight') else ():
                    tensor.data.copy_(_scaled(tensor, old / self.drop_path.test_scale))

    def check_alone(self) -> None:
        """Raise where a draw that other ranks do not share would make SyncBatchNorm wait for ever."""
        norm = getattr(self, self.last_norm)
        if many_ranks() and isinstance(norm, nn.SyncBatchNorm):
            raise RuntimeError(
                "drop_path_mode='batch' with SyncBatchNorm needs decisions that all ranks share: without them ranks "
                'would wait for each other for ever; leave drop_path_sync=True and call the whole model, or use '
                "drop_path_mode='row' or 'subset'"
            )

    def __prepare_scriptable__(self) -> nn.Module:
        return scriptable_copy(self)

    def _ends_in_relu(self) -> bool:
        return isinstance(getattr(self, self.last_norm.replace('bn', 'act')), nn.ReLU)

    def _is_one_pixel(self, x: Tensor) -> bool:
        """Would a norm layer of the branch see a single pixel?"""
        return max(x.shape[-2:]) <= self.stride

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        norm_prefix = f'{prefix}{self.last_norm}.'
        assign = local_metadata.get('assign_to_params_buffers', False)
        factor = self._load_factor(state_dict, prefix, norm_prefix, args[-1])
        if factor != 1:
            for key in [k for k in state_dict if k.startswith(norm_prefix) and k.endswith(('.weight', '.bias'))]:
                scaled = _scaled(state_dict[key], factor)
                state_dict[key] = scaled.to(state_dict[key].dtype) if assign else scaled
        weight = state_dict.get(f'{norm_prefix}weight')
        self.drop_path.rebuild_carrier(like=weight if assign else None)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def _load_factor(self, state_dict: dict[str, Any], prefix: str, norm_prefix: str, errors: list[str]) -> float:
        """p_checkpoint / p_model."""
        key = f'{prefix}drop_path.survival_prob'
        stored = state_dict.get(key)
        if stored is None:
            norm = getattr(self, self.last_norm)
            has_statistics = getattr(norm, 'running_mean', None) is not None
            if has_statistics and f'{norm_prefix}running_mean' not in state_dict:
                return 1.0
            return 1 / self.drop_path.test_scale
        if not (isinstance(stored, Tensor) and stored.numel() == 1 and (stored.is_meta or 0 < float(stored) <= 1)):
            errors.append(f'{key} must be a survival probability in (0, 1], got {stored!r}')
            return 1.0
        if stored.is_meta:
            return 1.0
        own = torch.tensor(self.drop_path.test_scale, dtype=stored.dtype)  # compared at the stored precision
        if float(own) == float(stored):
            return 1.0
        return float(stored) / self.drop_path.test_scale


class Stage(nn.Sequential):
    """The blocks of one stage; a plain `nn.Sequential` for whoever calls it with the input alone."""

    def decides_per_batch(self) -> bool:
        """Does one of the blocks?"""
        return any(block.decides_per_batch() for block in self)  # type: ignore[operator]

    @forward_by_mode
    def forward(
        self,
        x: Tensor,
        decisions: list[Decision] | None = None,
        grad_checkpointing: bool = False,
        ramp: Any = None,
    ) -> Tensor:
        """Run the blocks.

        Args:
            x: (N, C, H, W).
            decisions: One per block; None lets each block draw for itself.
            grad_checkpointing: Recompute each block in the backward pass instead of keeping its activations.
            ramp: The network's `DropPathRamp`, whose rates may have changed by then, or None.
        """
        if torch.jit.is_scripting():
            for block in self:
                x = block(x)
            return x
        else:
            for block, decision in zip(self, [None] * len(self) if decisions is None else decisions):
                x = _checkpointed(block, x, decision, ramp) if grad_checkpointing else block(x, decision)
            return x


def _checkpointed(block: nn.Module, x: Tensor, decision: Decision, ramp: DropPathRamp | None) -> Tensor:
    if ramp is None or torch.compiler.is_compiling():  # compiled code keeps its own rates for its backward pass
        return checkpoint(block, x, decision, use_reentrant=False)
    return checkpoint(block, x, decision, use_reentrant=False, context_fn=ramp.contexts)


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """The product, computed in float32 or better."""
    tensor = tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor


@register_notrace_module  # a leaf for torch.fx: no draw is frozen into a graph
class StochasticBasicBlock(ResidualBlock, BasicBlock):
    """Two 3x3 convolutions (ResNet-18 and -34, and the paper's CIFAR nets)."""

    last_norm = 'bn2'
    plain_class = BasicBlock

    def after_conv1(self, x: Tensor) -> Tensor:
        x = self.act1(self.drop_block(self.bn1(x)))
        x = self.bn2(self.conv2(self.aa(x)))
        if self.se is not None:
            x = self.se(x)
        return x

    def activate(self, x: Tensor) -> Tensor:
        return self.act2(x)


@register_notrace_module
class StochasticBottleneck(ResidualBlock, Bottleneck):
    """A 1x1, a 3x3 and a 1x1 convolution (ResNet-50 and deeper)."""

    last_norm = 'bn3'
    plain_class = Bottleneck

    def after_conv1(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(x))
        x = self.act2(self.drop_block(self.bn2(self.conv2(x))))
        x = self.bn3(self.conv3(self.aa(x)))
        if self.se is not None:
            x = self.se(x)
        return x

    def activate(self, x: Tensor) -> Tensor:
        return self.act3(x)
