"""What keeps decisions out of `torch.compile`, and the work they leave in it.

A decision that is taken inside a compiled frame is a guard: every other outcome compiles the frame again, until torch's
limit of recompilations per code object is reached and the frame runs uncompiled. So the frames that decide are kept
out of the compiler, and what they call is compiled frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

TRACED = (
    'a block in training mode cannot be traced: one random decision would be frozen into the graph; trace in '
    'evaluation mode, or keep the blocks whole with timm.models.get_notrace_modules()'
)


def twin(function: Any) -> Any:
    """The same function with a code object of its own, by which the compiler knows a function."""
    copy = FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__annotations__ = function.__annotations__
    return copy


def outside_compiler(function: Any) -> Any:
    """Decorates a method whose own frame is not compiled, while the functions that it calls are."""
    return torch.compiler.disable(twin(function), recursive=False)


class forward_by_mode:
    """Decorates a module's `forward`, whose frame is kept out of the compiler while `decides_per_batch()`.

    `Module.__call__` looks `forward` up, so this is the one place that its hooks and a compiler both pass. Older
    compilers follow an attribute of the module, and not `function.__get__`.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward

    def __set_name__(self, owner: type, name: str) -> None:
        owner._forward_inside = self.forward  # type: ignore[attr-defined]
        owner._forward_outside = outside_compiler(self.forward)  # type: ignore[attr-defined]

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self.forward
        return module._forward_outside if module.decides_per_batch() else module._forward_inside


_twins: WeakKeyDictionary[nn.Module, dict[str, Callable[..., Any]]] = WeakKeyDictionary()


@torch.compiler.disable
def own_code(module: nn.Module, method: str) -> Callable[..., Any]:
    """The module's method as a function (of the module and the arguments) with a code object of its own.

    Recompilations are counted by code object: blocks of many shapes that share one would use up the limit together.
    """
    twins = _twins.setdefault(module, {})
    if method not in twins:
        twins[method] = twin(getattr(type(module), method))
    return twins[method]
