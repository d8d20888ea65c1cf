"""What the ImageNet and the CIFAR nets share: one draw per forward pass, handed to the blocks as an argument."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.fx
from torch import Tensor, nn

from ..core.compiling import outside_compiler, warn_of_cuda_graphs
from ..core.draws import Draw, draw
from ..core.drop_path import StochasticDepth, derived
from ..core.private_api import feature_take_indices
from ..core.ramp import as_ramp
from ..core.refusals import check_exportable, check_scriptable, check_sync
from ..core.schedules import Schedule, expected_depth, survival_probs
from .blocks import ResidualBlock
from .paper_rescaling import check_rescale, last_norm, set_block
from .ranks import SharedGenerator, ranks_share, takes_gradients
from .scripting import scriptable_copy
from .stages import Stage, blocks_in, runner


class StochasticDepthNet(nn.Module):
    """A network of stages `layer1`, `layer2`, ... of residual blocks, after a stem `conv1`, `bn1`, `act1`, `maxpool`.

    Mixed into a network class. Modules that somebody puts in the place of a stage or a block, around one, or behind
    one, are called as timm calls them.

    Args:
        *args: What the network class takes, as `**kwargs`.
        drop_path_rate: 1 - p_L, in [0, 1); None is 0.5 where the schedule needs one.
        drop_path_schedule: See `sd_resnet.survival_probs`.
        drop_path_mode: `'batch'`, `'row'` or `'subset'`; see `sd_resnet.StochasticDepth`.
        drop_path_rescale: `'train'`, timm's, or `'test'`, the paper's letter; see `paper_rescaling`.
        drop_path_sync: In batch mode all ranks of a distributed training drop the same blocks.
        drop_path_ramp: (kind, steps), a rate that changes during training; see `DropPathRamp`.
        **kwargs: What the network class takes.

    Raises:
        ValueError: An argument is outside what is allowed.
    """

    plain_class: Any = nn.Module  # the same network without stochastic depth

    if TYPE_CHECKING:  # what the network class brings; TorchScript would read plain annotations
        stage_names: tuple[str, ...]
        conv1: Any
        bn1: Any
        act1: Any
        maxpool: Any
        grad_checkpointing: bool

    def __init__(
        self,
        *args: Any,
        drop_path_rate: float | None = None,
        drop_path_schedule: Schedule = 'linear',
        drop_path_mode: str = 'batch',
        drop_path_rescale: str = 'train',
        drop_path_sync: bool = True,
        drop_path_ramp: tuple[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        for name in self.stage_names:
            setattr(self, name, Stage(*getattr(self, name)))
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
            probs,
        )

    def _set_drop_path(
        self,
        rate: float | None,
        schedule: Schedule,
        mode: str,
        rescale: str,
        probs: tuple[float, ...] | None = None,
        keep_function: bool = True,
    ) -> None:
        ramp = self.drop_path_ramp
        if ramp is not None and rescale == 'test':
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
            block.drop_path.network_drops, block.drop_path.ramped = min(probs) < 1, ramp is not None
        if ramp is not None:
            ramp.govern([block.drop_path for block, _ in own])
        self.drop_path_rate, self.drop_path_schedule = rate, schedule
        self.drop_path_mode, self.drop_path_rescale = mode, rescale

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

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images to the last stage's (N, C', H', W')."""
        return self.forward_stages(x)[0]

    def forward_stages(self, x: Tensor, taken: Sequence[int] = (), last: int | None = None) -> tuple[Any, list[Any]]:
        """Images (N, C, H, W) to the feature of the `last` stage to run, and those of the indices `taken`."""
        outside = self.runs_outside_compiler()
        if outside:
            check_exportable()
            warn_of_cuda_graphs(x)
        return (self._stages_outside if outside else self._stages)(x, taken, last)

    def _stages(self, x: Tensor, taken: Sequence[int], last: int | None) -> tuple[Any, list[Any]]:
        run, draws = runner(self), self.draw(x)
        stem, x = self.forward_stem(x, 0 in taken)
        features = [stem] if 0 in taken else []
        for index, name in enumerate(self.stage_names[:last], start=1):
            stage = getattr(self, name)
            if not isinstance(stage, nn.Identity):  # which pruning puts in its place
                x = run(stage, x, draws, self.grad_checkpointing)
            if index in taken:
                features.append(x)
        return x, features

    _stages_outside = outside_compiler(_stages)

    def runs_outside_compiler(self) -> bool:
        """Must the frames that use its draws be kept out of `torch.compile`?"""
        ramped = self.training and self.drop_path_ramp is not None
        return ramped or any(block.runs_outside_compiler() for block in self.blocks())

    def forward_stem(self, x: Tensor, taken: bool = False) -> tuple[Tensor | None, Tensor]:
        """The stem's feature, if it is taken, and what the first stage is given."""
        if torch.compiler.is_compiling() and x.device.type == 'cpu' and self.runs_outside_compiler():
            # Compiled convolutions are computed so on a CPU: each of the many graphs would convert at its borders
            x = x.contiguous(memory_format=torch.channels_last)
        stem = self.act1(self.bn1(self.conv1(x)))
        # What a graph gives out has a gradient to come in: a pass over the largest feature, and a mask kept for it
        return stem if taken else None, self.maxpool(stem)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> Any:
        """The last feature and a list of intermediate ones, (N, C, H, W), or that list alone, as timm's ResNet.

        `indices` are the last n features if a number, all if None, else those of the list; 0 is the stem's. `norm` has
        no effect: there is no final norm layer. With `stop_early` no stage runs after the last wanted one.

        Raises:
            ValueError: `output_fmt` is not `'NCHW'`.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        taken, highest = feature_take_indices(1 + len(self.stage_names), indices)
        x, features = self.forward_stages(x, taken, highest if stop_early else None)
        return features if intermediates_only else (x, features)

    def draw(self, x: Tensor, blocks: Sequence[ResidualBlock] | None = None) -> list[Draw] | None:
        """One draw per block, None meaning the network's own, for images `x`; or None where nothing is to be drawn.

        On the host, outside any checkpointed region; for all blocks as soon as one of them drops, so that ranks stay in
        step. A `torch.fx` trace draws nothing: its blocks are leaves and draw when they run.
        """
        if isinstance(x, torch.fx.Proxy):
            return None
        blocks = list(self.blocks()) if blocks is None else blocks
        return (self._draw_eagerly if self.runs_outside_compiler() else self._draw)(x, blocks)

    def _draw(self, x: Tensor, blocks: Sequence[ResidualBlock]) -> list[Draw] | None:
        if self.drop_path_ramp is not None and self.training and takes_gradients(x):
            self.drop_path_ramp.advance()
        drop_paths = [block.drop_path if isinstance(block.drop_path, StochasticDepth) else _NEVER for block in blocks]
        if not any(drop_path.is_dropping() for drop_path in drop_paths):
            return None
        norms = (last_norm(block) for block in blocks)
        shared = self.drop_path_mode == 'batch' and ranks_share(x, self.drop_path_sync, norms)
        return draw(drop_paths, x, self.drop_path_mode, self._shared_generator.get() if shared else None)

    _draw_eagerly = torch.compiler.disable(_draw)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        if self.drop_path_ramp is None:  # a network without a ramp loads what one with a ramp has saved
            state_dict.pop(f'{prefix}drop_path_ramp.step', None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __prepare_scriptable__(self) -> nn.Module:
        check_scriptable(self.drop_path_ramp, self.training)
        return scriptable_copy(self)


_NEVER = StochasticDepth().eval()  # in the place of a drop path that somebody has replaced
