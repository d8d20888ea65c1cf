"""What keeps draws out of `torch.compile`, and the work they leave in it.

A draw that is used inside a compiled frame is a guard: every other outcome compiles the frame again, until torch's
limit of recompilations per code object is reached and the frame runs uncompiled. So the frames that use one are kept
out of the compiler, and what they call is compiled frame by frame.
"""

import itertools
import warnings
from collections.abc import Callable
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .private_api import records_cuda_graphs, skip_frames
from .refusals import check_exportable

_count = itertools.count()


def with_own_code(function: Any, named: bool = False) -> Any:
    """The same function with a code object of its own, by which the compiler counts what it compiles of it.

    If that is `named`, too, no other function's past inputs count as its own: their shapes would become symbols.
    """
    name = function.__name__
    code = function.__code__.replace(co_name=f'{name}_{next(_count)}' if named else name)
    copy = FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__, copy.__annotations__ = function.__kwdefaults__, function.__annotations__
    return copy


def outside_compiler(function: Any) -> Any:
    """Decorates a method whose own frame is not compiled, while the functions that it calls are."""
    own = with_own_code(function)
    skip_frames(own.__code__)
    return torch.compiler.disable(own, recursive=False)


_records_cuda_graphs = outside_compiler(records_cuda_graphs)


@outside_compiler
def warn_of_cuda_graphs(x: Any) -> None:
    """Say, in a frame that uses draws, why its graphs had better be no CUDA graphs."""
    if isinstance(x, torch.Tensor) and x.is_cuda and _records_cuda_graphs():  # `torch.fx` traces with a Proxy
        warnings.warn(
            "drop_path_mode='batch', and any mode with drop_path_ramp, under torch.compile with CUDA graphs (mode="
            "'reduce-overhead' or 'max-autotune'): each outcome of the draws is recorded anew, in time and memory; use "
            "drop_path_mode='subset' without a ramp, or torch.compile without that mode",
            stacklevel=2,
        )


class forward_by_mode(property):
    """Decorates a `forward`, or a method like it, whose frame is not compiled if the module `runs_outside_compiler()`.

    `Module.__call__` looks `forward` up, so this is the one place that its hooks and a compiler both pass. It is a
    property because compilers follow one; a `forward` of a single module, as tools put there, comes first all the same.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        def by_mode(module: Any) -> Any:
            if 'forward' in module.__dict__:
                return module.__dict__['forward']
            if not module.runs_outside_compiler():
                return module._forward_inside
            check_exportable()
            return module._forward_outside_compiler

        super().__init__(by_mode)
        self.forward = forward

    def __set_name__(self, owner: type, name: str) -> None:
        owner._forward_inside = self.forward  # type: ignore[attr-defined]
        owner._forward_outside_compiler = outside_compiler(self.forward)  # type: ignore[attr-defined]

    def __get__(self, module: Any, owner: Any = None) -> Any:
        return self.forward if module is None else super().__get__(module, owner)

    def __set__(self, module: Any, forward: Any) -> None:
        module.__dict__['forward'] = forward

    def __delete__(self, module: Any) -> None:
        del module.__dict__['forward']


_own_functions: WeakKeyDictionary[nn.Module, dict[str, Callable[..., Any]]] = WeakKeyDictionary()


@torch.compiler.disable
def own_code(module: nn.Module, method: str) -> Callable[..., Any]:
    """The module's method as a function, of the module and the arguments, with a code object of its own.

    Recompilations are counted by code object: blocks of many shapes that share one would use up the limit together.
    """
    functions = _own_functions.setdefault(module, {})
    if method not in functions:
        functions[method] = with_own_code(getattr(type(module), method), named=True)
    return functions[method]
