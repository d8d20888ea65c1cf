"""The private names of torch and timm in use, what each is for, and what is done where it does not exist.

Public names are used wherever there are any; `converted/private_api.py` has those that only it uses.
`tests/core/test_private_api.py` says in which version one is gone.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo.decorators
from timm.models._features import feature_take_indices as feature_take_indices  # what `indices` asks for
from timm.models._prune import adapt_model_from_file as adapt_model_from_file  # to the widths of a pruned network
from torch import Tensor, nn

# Since torch 2.6. Without it rows of a wrapped window are kept for backward instead of being taken again.
_top_hooks: Any = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', None)

# Without them torch.func and forward-mode differentiation fail with torch's own message about `setup_context`.
_interpreters: Any = getattr(torch._C._functorch, 'get_interpreter_stack', lambda: None)
_vmap: Any = getattr(getattr(torch._C._functorch, 'TransformType', None), 'Vmap', None)
_forward_ad: Any = torch.autograd.forward_ad

# Since torch 2.7. Without it an export that goes through the compiler fails with the compiler's own message.
_EXPORTING = '_is_exporting_flag'

# Without it compiled steps of batch mode, and of a ramp, take longer.
_skip_code: Any = getattr(torch._dynamo.decorators, 'skip_code', None)

# Where there is one, its module is called as timm calls it, and nothing stands in its place.
_HOOKS = ('_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks')


def skip_frames(code: Any) -> None:
    """Let no compiler look at a frame of this code: of one that is disabled alone torch asks it anew at every call."""
    if _skip_code is not None:
        _skip_code(code)


def recomputing() -> bool:
    """Is this forward pass inside a backward pass, as the second one of a checkpointed region is?"""
    return torch._C._current_graph_task_id() != -1


def hooks_on_saved_tensors() -> tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None:
    """(pack, unpack) of the innermost `saved_tensors_hooks`, or None; a LookupError if torch does not tell."""
    if _top_hooks is None:
        raise LookupError('torch does not tell which saved-tensor hooks are active')
    return _top_hooks(True)


def transforming() -> bool:
    """Is a transform of `torch.func`, or forward-mode differentiation, at work? In a compiled graph it is not seen."""
    if torch.compiler.is_compiling():
        return False
    return bool(_interpreters()) or getattr(_forward_ad, '_current_level', -1) >= 0


def vmapping() -> bool:
    """Is `torch.func.vmap` at work? In a compiled graph it is not seen."""
    return not torch.compiler.is_compiling() and any(each.key() == _vmap for each in _interpreters() or ())


def exporting() -> bool:
    """Is `torch.export` at work?"""
    told = getattr(torch.compiler, _EXPORTING, None)
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling() if told is None else told


def records_cuda_graphs() -> bool:
    """Does the compiler around this frame, which it skips, record CUDA graphs? With torch 2.5 it is not seen."""
    compiler: Any = getattr(torch._C._dynamo.eval_frame, 'get_eval_frame_callback', lambda: None)()
    while inner := getattr(compiler, '_torchdynamo_orig_backend', None):
        compiler = inner
    return bool((getattr(compiler, 'config', None) or {}).get('triton.cudagraphs'))


def is_replica(module: nn.Module) -> bool:
    """Is it one of `DataParallel`'s copies, which live for one forward pass?"""
    return getattr(module, '_is_replica', False)


def is_hooked(module: nn.Module) -> bool:
    """Has somebody registered a hook on its forward or backward pass, or on every module's?"""
    return any(getattr(module, name) or getattr(torch.nn.modules.module, f'_global{name}') for name in _HOOKS)


def buffer_of(module: nn.Module, name: str) -> Tensor:
    """A buffer whose name a property of the class has, past which a compiler does not look."""
    return module._buffers[name]  # type: ignore[return-value]


def version_of(tensor: Tensor) -> int:
    """How often it was changed in place; autograd checks this to refuse gradients of what is not there any more."""
    return tensor._version
