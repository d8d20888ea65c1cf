"""The private names of torch that only this wing uses, and what each is for."""

from typing import Any

# Says in a warning that a function was compiled so often that it runs uncompiled from now on
COMPILER_LOG = 'torch._dynamo'


def default_recompile_limit() -> Any:
    """A context in which torch compiles a function as often as by default: whoever imports `timm.optim` lifts that."""
    import torch._dynamo  # takes a second

    return torch._dynamo.config.patch(cache_size_limit=8)
