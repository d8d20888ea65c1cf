"""What the ranks of a distributed training share: the generator of batch mode's decisions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def many_ranks() -> bool:
    """Is there a default process group of more than one rank?"""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def check_sync(value: Any) -> None:
    """Raise where it is neither True nor False: of `--model-kwargs drop_path_sync=false` timm makes a text.

    Raises:
        ValueError: It is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f'drop_path_sync must be True or False, got {value!r}')


class SharedGenerator:
    """A generator that all ranks of the default process group share; a copy, or a new process group, joins anew."""

    def __init__(self) -> None:
        self._joined: tuple[Any, torch.Generator] | None = None

    def get(self) -> torch.Generator:
        """Seeded by rank 0 at the first call, a collective; the default generator stays where it is."""
        group = dist.group.WORLD
        if self._joined is None or self._joined[0] is not group:
            with torch.random.fork_rng(devices=[]):
                seed = [int(torch.randint(2**63 - 1, (), device='cpu'))]
            dist.broadcast_object_list(seed, src=0)
            self._joined = group, torch.Generator().manual_seed(seed[0])
        return self._joined[1]

    def __getstate__(self) -> dict[str, Any]:
        return {'_joined': None}
