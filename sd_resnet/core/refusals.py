"""What stochastic depth refuses, in one line each: the argument, its value, what is allowed, the way out.

Settings are checked when they are made; the rest, when a pass would be another function, or never end.
"""

from collections.abc import Iterable
from typing import Any

import torch.fx
from timm.layers import SplitBatchNorm2d
from torch import nn

from .private_api import exporting, is_replica, vmapping

MODES = ('batch', 'row', 'subset')
RESCALES = ('train', 'test')


def check_settings(survival_prob: float, mode: str, rescale: str = 'train') -> None:
    """Raise a ValueError where one of a drop path's settings is not allowed."""
    if not 0 < survival_prob <= 1:
        raise ValueError(f'survival_prob must be in (0, 1], got {survival_prob!r}')
    if mode not in MODES:
        raise ValueError(f'drop_path_mode must be one of {", ".join(map(repr, MODES))}, got {mode!r}')
    if rescale not in RESCALES:
        raise ValueError(f'drop_path_rescale must be one of {", ".join(map(repr, RESCALES))}, got {rescale!r}')


def check_sync(value: Any) -> None:
    """Raise a ValueError where it is not a bool: of `--model-kwargs drop_path_sync=false` timm makes a text."""
    if not isinstance(value, bool):
        raise ValueError(f'drop_path_sync must be True or False, got {value!r}')


def check_traceable(x: Any) -> None:
    """Raise a RuntimeError where `torch.fx`, whose `Proxy` x is, would freeze one draw into its graph."""
    if isinstance(x, torch.fx.Proxy):
        raise RuntimeError(
            'a block in training mode cannot be traced: one random decision would be frozen into the graph; trace in '
            'evaluation mode, or keep the blocks whole with timm.models.get_notrace_modules()'
        )


def check_draws_on_host(mode: str) -> None:
    """Raise a RuntimeError where only row mode can draw: under `torch.func.vmap`, and in a CUDA graph made by hand."""
    if vmapping():
        raise one_draw_for_all_samples(mode)
    if not torch.compiler.is_compiling() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"drop_path_mode must be 'row' where a CUDA graph is captured, got {mode!r}: one draw would be replayed "
            "for ever; torch.compile(model, mode='reduce-overhead') makes CUDA graphs that draw anew in mode 'subset'"
        )


def one_draw_for_all_samples(mode: str) -> RuntimeError:
    """What `torch.func.vmap` would make of a draw on the host."""
    cause = 'its draws are made on the host, once for all samples'
    return RuntimeError(f"drop_path_mode must be 'row' under torch.func.vmap, got {mode!r}: {cause}")


def check_exportable() -> None:
    """Raise a RuntimeError where a frame that is kept out of the compiler would be exported."""
    if exporting():
        raise RuntimeError(
            "drop_path_mode='batch', and any mode with drop_path_ramp, cannot be exported in training: one draw would "
            "be frozen into the graph; export model.eval(), or use drop_path_mode='subset' or 'row' without a ramp"
        )


def check_scriptable(ramp: nn.Module | None, training: bool) -> None:
    """Raise a ValueError where TorchScript would freeze the rate of the training step that comes next."""
    if ramp is not None and training:
        raise ValueError(
            f'drop_path_ramp must be None where a network is scripted to train, got {ramp}: TorchScript would freeze '
            'the rate; train without torch.jit.script'
        )


def check_counts_steps(module: nn.Module) -> None:
    """Raise a RuntimeError in a network with a ramp for `DataParallel`'s replicas, which are gone after every step."""
    if is_replica(module):
        raise RuntimeError(
            'drop_path_ramp must be None under DataParallel, whose replicas cannot count steps; use '
            'DistributedDataParallel'
        )


def check_draws_alone(modules: Iterable[nn.Module]) -> None:
    """Raise a RuntimeError where a rank that drops a block with these modules would let the others wait for ever."""
    if any(isinstance(module, nn.SyncBatchNorm) for module in modules):
        raise RuntimeError(
            "drop_path_mode='batch' with SyncBatchNorm needs decisions that all ranks share: without them ranks "
            'would wait for each other for ever; leave drop_path_sync=True and call the whole model, with gradients, '
            "or use drop_path_mode='row' or 'subset'"
        )


def check_takes_rows(modules: Iterable[nn.Module]) -> None:
    """Raise a ValueError where one of the modules would split the rows that are left."""
    if any(isinstance(module, SplitBatchNorm2d) for module in modules):
        raise ValueError(
            "drop_path_mode='subset' cannot be combined with split BatchNorm, which needs the whole batch to split; "
            "use drop_path_mode='batch' or 'row'"
        )
