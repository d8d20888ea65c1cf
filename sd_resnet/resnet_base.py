"""What the ImageNet and the CIFAR nets share: one draw per forward pass, handed to the blocks as an argument."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from timm.models import build_model_with_cfg
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .compiling import outside_compiler
from .ramp import as_ramp, check_scriptable
from .ranks import SharedGenerator, check_sync, many_ranks
from .resnet_blocks import ResidualBlock, Stage
from .schedules import Schedule, expected_depth, survival_probs
from .stochastic_depth import Decision, draw_per_batch, draw_per_sample, scriptable_copy
from .weights import spread_stem


class StochasticDepthNet(nn.Module):
    """A network of stages `layer1`, `layer2`, ... of residual blocks, after a stem `conv1`, `bn1`, `act1`, `maxpool`.

    Mixed into a network class, which calls `init_drop_path` once its blocks exist.
    """

    __jit_unused_properties__ = ('survival_probs', 'expected_depth')

    if TYPE_CHECKING:  # what the network class brings; TorchScript would read plain annotations
        stage_names: tuple[str, ...]
        conv1: Any
        bn1: Any
        act1: Any
        maxpool: Any
        layer1: Any
        layer2: Any
        layer3: Any
        layer4: Any
        grad_checkpointing: bool

    def init_drop_path(
        self,
        drop_path_rate: float | None,
        drop_path_schedule: Schedule,
        drop_path_mode: str,
        drop_path_rescale: str,
        drop_path_sync: bool,
        drop_path_ramp: tuple[str, int] | None,
    ) -> None:
        check_sync(drop_path_sync)
        self.drop_path_sync = drop_path_sync
        self.drop_path_ramp = as_ramp(drop_path_ramp, next(self.parameters()).device)
        self._shared_generator = SharedGenerator()
        self._set_drop_path(drop_path_rate, drop_path_schedule, drop_path_mode, drop_path_rescale, keep_function=False)

    def set_drop_path(
        self,
        rate: float | None = None,
        schedule: Schedule | None = None,
        mode: str | None = None,
        rescale: str | None = None,
    ) -> None:
        """Change stochastic depth in place and keep the test-time function; None leaves a setting as it is.

        The last norm layer of each branch is rescaled in place, which an EMA or an averaged copy does not see (timm's
        `ModelEmaV3` pairs values by position): call this before EMA, DDP and `torch.compile`, or on the copy too.

        Args:
            rate: 1 - p_L, in [0, 1).
            schedule: See `survival_probs`. A new sequence of probabilities replaces the rate.
            mode: `'batch'`, `'row'` or `'subset'`.
            rescale: `'test'` or `'train'`.

        Raises:
            ValueError: An argument is not allowed; nothing has changed then.
        """
        probs = None
        if rate is None and schedule is None:  # also after blocks were pruned away
            probs = self.survival_probs if self.drop_path_ramp is None else self.drop_path_ramp.survival_probs()
        if rate is None and (schedule is None or isinstance(schedule, str)):
            rate = self.drop_path_rate
        self._set_drop_path(
            rate,
            self.drop_path_schedule if schedule is None else schedule,
            self.drop_path_mode if mode is None else mode,
            self.drop_path_rescale if rescale is None else rescale,
            keep_function=True,
            probs=probs,
        )

    def _set_drop_path(
        self,
        rate: float | None,
        schedule: Schedule,
        mode: str,
        rescale: str,
        keep_function: bool,
        probs: tuple[float, ...] | None = None,
    ) -> None:
        if self.drop_path_ramp is not None and rescale == 'test':
            raise ValueError(
                "drop_path_ramp needs drop_path_rescale='train', got 'test': under test-time rescaling every change of "
                'the rate would change what the network computes at test time'
            )
        blocks = list(self.blocks())
        probs = survival_probs(len(blocks), rate, schedule) if probs is None else probs
        for block, p_l in zip(blocks, probs):
            block.check(p_l, mode, rescale)
        for block, p_l in zip(blocks, probs):
            block.configure(p_l, mode, rescale, keep_function)
            block.drop_path.network_drops = min(probs) < 1
            block.drop_path.ramped = self.drop_path_ramp is not None
        if self.drop_path_ramp is not None:
            self.drop_path_ramp.govern([block.drop_path for block in blocks])
        self.drop_path_rate = rate
        self.drop_path_schedule = schedule
        self.drop_path_mode = mode
        self.drop_path_rescale = rescale

    @property
    def survival_probs(self) -> tuple[float, ...]:
        """p_1 .. p_L."""
        return tuple(block.drop_path.p_l for block in self.blocks())

    @property
    def expected_depth(self) -> float:
        """Mean number of active blocks in a training step."""
        return expected_depth(self.survival_probs)

    def blocks(self) -> Iterator[ResidualBlock]:
        """The residual blocks in order; fewer after `prune_intermediate_layers`."""
        for name in self.stage_names:
            yield from getattr(self, name).children()

    def forward_stages(
        self, x: Tensor, taken: Sequence[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Stem and stages.

        Args:
            x: Images (N, C, H, W).
            taken: Indices of the features to return beside the last one; 0 is the stem's.
            last: Number of stages to run, None for all.
        """
        per_batch = any(block.decides_per_batch() for block in self.blocks())
        return (self._run_outside_compiler if per_batch else self._run)(x, taken, last)

    def _run(self, x: Tensor, taken: Sequence[int], last: int | None) -> tuple[Tensor, list[Tensor]]:
        decisions = self.draw(x)
        stem, x = self.forward_stem(x)
        # Without pooling they are one tensor, and so may be the first stage's output, if all of it is dropped
        features = [stem.clone() if stem is x else stem] if 0 in taken else []
        for index, name in enumerate(self.stage_names[:last], start=1):
            stage = getattr(self, name)
            if isinstance(stage, Stage):  # pruning puts an nn.Identity in its place
                own = None if decisions is None else [decisions.pop(0) for _ in stage]
                x = stage(x, own, self.grad_checkpointing, self.drop_path_ramp)
            if index in taken:
                features.append(x)
        return x, features

    _run_outside_compiler = outside_compiler(_run)

    def forward_stem(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stem's feature, and what the first stage is given."""
        if (
            torch.compiler.is_compiling()
            and x.device.type == 'cpu'
            and any(b.decides_per_batch() for b in self.blocks())
        ):
            # Compiled convolutions are computed so on a CPU: each of the many graphs would convert at its borders
            x = x.contiguous(memory_format=torch.channels_last)
        stem = self.act1(self.bn1(self.conv1(x)))
        return stem, self.maxpool(stem)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """The last features and intermediate ones, as timm's ResNet gives them.

        Args:
            x: Images (N, C, H, W).
            indices: The last n features if a number, all if None, else those of the list; 0 is the stem's.
            norm: Without effect: there is no final norm layer.
            stop_early: Do not run the stages after the last wanted one.
            output_fmt: `'NCHW'`.
            intermediates_only: Return the list alone.

        Returns:
            A list of (N, C, H, W), or the last feature and that list.

        Raises:
            ValueError: `output_fmt` is not `'NCHW'`.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, highest = feature_take_indices(1 + len(self.stage_names), indices)
        x, features = self.forward_stages(x, taken, highest if stop_early else None)
        return features if intermediates_only else (x, features)

    def draw(self, x: Tensor) -> list[Decision] | None:
        """One decision per block for this forward pass, or None where nothing is to be drawn.

        Drawn on the host, outside any checkpointed region; for all blocks as soon as one of them trains, so that
        ranks stay in step. A `torch.fx` trace draws nothing: its blocks are leaves and draw when they run.
        """
        if self.drop_path_ramp is not None and self.training and not isinstance(x, torch.fx.Proxy):
            self.drop_path_ramp.advance()
        if isinstance(x, torch.fx.Proxy) or not any(b.training and b.drop_path.drops for b in self.blocks()):
            return None
        if self.drop_path_mode == 'batch':
            return self._draw_per_batch()
        return draw_per_sample([block.drop_path for block in self.blocks()], x)

    @torch.compiler.disable
    def _draw_per_batch(self) -> list[Decision]:
        blocks = list(self.blocks())
        return draw_per_batch([block.drop_path for block in blocks], self._generator(blocks))

    def _generator(self, blocks: list[ResidualBlock]) -> torch.Generator | None:
        """On more than one rank a generator that all ranks share, else None, torch's default one."""
        if not many_ranks():
            return None
        if not self.drop_path_sync:
            for block in blocks:
                block.check_alone()
            return None
        return self._shared_generator.get()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.drop_path_ramp is None:  # a network without a ramp loads what one with a ramp has saved
            state_dict.pop(f'{prefix}drop_path_ramp.step', None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __prepare_scriptable__(self) -> nn.Module:
        check_scriptable(self.drop_path_ramp, self.training)
        return scriptable_copy(self)


def build(model_cls: type[StochasticDepthNet], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's builder; where pretrained weights cannot be had, its error with one line on what to do.

    `features_only` models go through `forward_intermediates` (`'getter'`), so that they draw in the same place.
    """
    features = dict(feature_cls='getter', out_indices=tuple(range(1 + len(model_cls.stage_names))))
    features.update(kwargs.pop('feature_cfg', None) or {})
    try:
        return build_model_with_cfg(
            model_cls, variant, pretrained, feature_cfg=features, pretrained_filter_fn=spread_stem, **kwargs
        )
    except OSError as error:
        if pretrained:
            advice = (
                f'{variant}: the pretrained weights are not in the cache and could not be downloaded. Connect to the '
                'Hugging Face Hub once, or point HF_HOME to a filled cache, or name a local file with '
                "pretrained_cfg_overlay={'file': PATH}, or pass pretrained=False."
            )
            error.args = (f'{error}\n{advice}', *error.args[1:]) if len(error.args) < 2 else error.args
        raise
