"""What ranks share in batch mode: the draws of all blocks, so that none waits for a block that another has dropped."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.draws import many_ranks
from ..core.refusals import check_draws_alone, check_draws_on_host


def takes_gradients(x: Tensor) -> bool:
    """Is this a forward pass that trains? Reentrant checkpointing makes its first one without gradients."""
    return torch.is_grad_enabled() or x.requires_grad


def ranks_share(x: Tensor, sync: bool, modules: Iterable[nn.Module]) -> bool:
    """Does batch mode draw for all ranks at once? Not in a pass without gradients, which may be made on one only."""
    if not many_ranks():
        return False
    if not sync or not takes_gradients(x):
        check_draws_alone(modules)
        return False
    check_draws_on_host('batch')  # before ranks wait for each other
    return True


class SharedGenerator:
    """A generator that all ranks of the default process group share; a copy, or a new group, joins anew."""

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
