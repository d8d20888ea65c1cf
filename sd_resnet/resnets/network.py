"""What the ImageNet and the CIFAR nets share: one draw per forward pass, handed to the blocks as an argument."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from timm.models import build_model_with_cfg
from torch import Tensor, nn

from ..core.compiling import check_exportable, outside_compiler
from ..core.draws import Draw, SharedGenerator, check_sync, draw, many_ranks, takes_gradients
from ..core.drop_path import StochasticDepth, derived
from ..core.private_api import feature_take_indices
from ..core.ramp import as_ramp, check_scriptable
from ..core.schedules import Schedule, expected_depth, survival_probs
from ..core.scripting import scriptable_copy
from .blocks import ResidualBlock, blocks_in, call_wrapped, takes_draws
from .features import StochasticFeatures
from .packaged import spread_stem
from .paper_rescaling import check_rescale, set_block


class StochasticDepthNet(nn.Module):
    """A network of stages `layer1`, `layer2`, ... of residual blocks, after a stem `conv1`, `bn1`, `act1`, `maxpool`.

    Mixed into a network class, which calls `init_drop_path` once its blocks exist. Modules that somebody puts in the
    place of a stage or a block, around one, or behind one, are called as timm calls them.
    """

    plain_class: Any = nn.Module  # the same network without stochastic depth

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

        Under `rescale='test'` the last norm layer of each branch is rescaled in place, which an EMA or an averaged copy
        does not see (timm's `ModelEmaV3` pairs values by position): call this before EMA, DDP and `torch.compile`, or
        on the copy too.

        Args:
            rate: 1 - p_L, in [0, 1); 0 drops nothing, for example while BatchNorm's statistics are estimated anew.
            schedule: See `survival_probs`. A new sequence of probabilities replaces the rate.
            mode: `'batch'`, `'row'` or `'subset'`.
            rescale: `'train'` or `'test'`.

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
        own = [(b, p_l) for b, p_l in zip(blocks, probs) if isinstance(b.drop_path, StochasticDepth)]
        for block, p_l in own:
            check_rescale(block, p_l, mode, rescale)
        for block, p_l in own:
            set_block(block, p_l, mode, rescale, keep_function)
            block.drop_path.network_drops = min(probs) < 1
            block.drop_path.ramped = self.drop_path_ramp is not None
        if self.drop_path_ramp is not None:
            self.drop_path_ramp.govern([block.drop_path for block, _ in own])
        self.drop_path_rate = rate
        self.drop_path_schedule = schedule
        self.drop_path_mode = mode
        self.drop_path_rescale = rescale

    @derived
    def survival_probs(self) -> Any:
        """p_1 .. p_L; 1 where something else stands in the place of a block's drop path."""
        return tuple(getattr(block.drop_path, 'p_l', 1.0) for block in self.blocks())

    @derived
    def expected_depth(self) -> Any:
        """Mean number of active blocks in a training step."""
        return expected_depth(self.survival_probs)

    def blocks(self) -> Iterator[ResidualBlock]:
        """The residual blocks in order, also wrapped ones; fewer after `prune_intermediate_layers`."""
        for name in self.stage_names:
            yield from blocks_in(getattr(self, name))

    def forward_stages(
        self, x: Tensor, taken: Sequence[int] = (), last: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Stem and stages.

        Args:
            x: Images (N, C, H, W).
            taken: Indices of the features to return beside the last one; 0 is the stem's.
            last: Number of stages to run, None for all.
        """
        outside = self.runs_outside_compiler()
        if outside:
            check_exportable()
        return (self._run_outside_compiler if outside else self._run)(x, taken, last)

    def runs_outside_compiler(self) -> bool:
        """Must the frames that use its draws be kept out of `torch.compile`?"""
        return (self.training and self.drop_path_ramp is not None) or any(
            block.runs_outside_compiler() for block in self.blocks()
        )

    def _run(self, x: Tensor, taken: Sequence[int], last: int | None) -> tuple[Tensor, list[Tensor]]:
        draws = self.draw(x)
        stem, x = self.forward_stem(x)
        features = [stem] if 0 in taken else []
        for index, name in enumerate(self.stage_names[:last], start=1):
            stage = getattr(self, name)
            blocks = list(blocks_in(stage))
            own = None if draws is None else [draws.pop(0) for _ in blocks]
            if takes_draws(stage):
                x = stage(x, drawn=own, grad_checkpointing=self.grad_checkpointing)
            elif not isinstance(stage, nn.Identity):  # which pruning puts in its place
                x = call_wrapped(stage, x, blocks, own, self.grad_checkpointing)
            if index in taken:
                features.append(x)
        return x, features

    _run_outside_compiler = outside_compiler(_run)

    def forward_stem(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stem's feature, and what the first stage is given."""
        if torch.compiler.is_compiling() and x.device.type == 'cpu' and self.runs_outside_compiler():
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

    def draw(self, x: Tensor, blocks: Sequence[ResidualBlock] | None = None) -> list[Draw] | None:
        """One draw per block for this forward pass, or None where nothing is to be drawn.

        On the host, outside any checkpointed region; for all blocks as soon as one of them drops, so that ranks stay in
        step. A `torch.fx` trace draws nothing: its blocks are leaves and draw when they run.

        Args:
            x: Images (N, C, H, W).
            blocks: None is the network's own.
        """
        if isinstance(x, torch.fx.Proxy):
            return None
        blocks = list(self.blocks()) if blocks is None else blocks
        return (self._draw_eagerly if self.runs_outside_compiler() else self._draw)(x, blocks)

    @torch.compiler.disable
    def _draw_eagerly(self, x: Tensor, blocks: Sequence[ResidualBlock]) -> list[Draw] | None:
        return self._draw(x, blocks)

    def _draw(self, x: Tensor, blocks: Sequence[ResidualBlock]) -> list[Draw] | None:
        if self.drop_path_ramp is not None and self.training and takes_gradients(x):
            self.drop_path_ramp.advance()
        drop_paths = [block.drop_path if isinstance(block.drop_path, StochasticDepth) else _NEVER for block in blocks]
        if not any(drop_path.is_dropping() for drop_path in drop_paths):
            return None
        generator = self._generator(x) if self.drop_path_mode == 'batch' else None
        return draw(drop_paths, x, self.drop_path_mode, generator)

    def _generator(self, x: Tensor) -> torch.Generator | None:
        """Batch mode's: on more than one rank one that all ranks share, else None, torch's default one.

        A pass without gradients does not draw from the shared one: it may be made on one rank only.
        """
        if not many_ranks():
            return None
        if not self.drop_path_sync:
            for block in self.blocks():
                block.check_alone()
            return None
        return self._shared_generator.get() if takes_gradients(x) else None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.drop_path_ramp is None:  # a network without a ramp loads what one with a ramp has saved
            state_dict.pop(f'{prefix}drop_path_ramp.step', None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        check_scriptable(self.drop_path_ramp, self.training)
        return scriptable_copy(self)


_NEVER = StochasticDepth().eval()  # in the place of a drop path that somebody has replaced


def build(model_cls: type[StochasticDepthNet], variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's builder; where pretrained weights cannot be had, its error with one line on what to do.

    `features_only` models draw for all blocks at once, too.
    """
    features = dict(feature_cls=StochasticFeatures, out_indices=tuple(range(1 + len(model_cls.stage_names))))
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
