"""What keeps decisions out of `torch.compile`, and the work they leave in it.

A decision that is taken inside a compiled frame is a guard: every other outcome compiles the frame again, until torch's
limit of recompilations per code object is reached and the frame runs uncompiled. So the frames that decide are kept
out of the compiler, and what they call is compiled frame by frame.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

# Decorates a method whose own frame is not compiled, while the functions that it calls are.
outside_compiler: Any = partial(torch.compiler.disable, recursive=False)


class forward_by_mode:
    """Decorates a module's `forward`, whose frame is kept out of the compiler while `decides_per_batch()`.

    `Module.__call__` looks `forward` up, so this is the one place that its hooks and a compiler both pass.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.inside = forward
        self.outside = outside_compiler(forward)

    def __get__(self, module: Any, owner: Any = None) -> Any:
        if module is None:
            return self.inside
        return (self.outside if module.decides_per_batch() else self.inside).__get__(module)


_twins: WeakKeyDictionary[nn.Module, dict[str, Callable[..., Any]]] = WeakKeyDictionary()


@torch.compiler.disable
def own_code(module: nn.Module, method: str) -> Callable[..., Any]:
    """The module's method as a function (of the module and the arguments) with a code object of its own.

    Recompilations are counted by code object: blocks of many shapes that share one would use up the limit together.
    """
    twins = _twins.setdefault(module, {})
    if method not in twins:
        function = getattr(type(module), method)
        twins[method] = FunctionType(function.__code__.replace(), function.__globals__, method)
    return twins[method]
