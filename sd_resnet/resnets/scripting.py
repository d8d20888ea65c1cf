"""What TorchScript sees: timm's own classes, with a drop path that computes every branch and multiplies it by b_l."""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..core.drop_path import StochasticDepth

ModuleT = TypeVar('ModuleT', bound=nn.Module)


class Gate(nn.Module):
    """b_l of one block, by its mode, as a factor of its branch in its drop path's place: TorchScript skips nothing."""

    def __init__(self, drop_path: StochasticDepth) -> None:
        super().__init__()
        self.training, self.p_l, self.mode = drop_path.training, drop_path.p_l, drop_path.mode
        self.letter = drop_path.rescale == 'test'
        if self.letter:
            self.register_buffer('survival_prob', drop_path.survival_prob)  # a scripted state dict has it too

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) to (N, ...)."""
        if not self.training:
            return x * self.p_l if self.letter else x
        if self.p_l == 1.0:
            return x
        gate = self.draw(x)
        return x * gate if self.letter else x * (gate / self.p_l)

    def draw(self, x: Tensor) -> Tensor:
        """1 for a surviving row, else 0; shape (N, 1, ..., 1), or (1, 1, ..., 1) in batch mode."""
        batch = x.shape[0]
        ones = [1] * (x.dim() - 1)
        if self.mode != 'subset':
            return x.new_empty([1 if self.mode == 'batch' else batch] + ones).bernoulli_(self.p_l)
        share = self.p_l * batch
        rows = int(share) + int(torch.rand(1).item() < share - int(share))
        position = torch.arange(batch, device=x.device) - int(torch.randint(max(batch, 1), (1,)).item())
        return (position.remainder(max(batch, 1)) < rows).to(x.dtype).view([batch] + ones)


def scriptable_copy(module: ModuleT) -> ModuleT:
    """A copy that shares all tensors, of timm's own classes, for `torch.jit.script`."""
    copied = copy_sharing_tensors(module)
    become_plain(copied, Gate)
    return copied


def copy_sharing_tensors(module: ModuleT) -> ModuleT:
    """A copy with the same parameters and buffers."""
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, memo)
    copied.__dict__['_copied_from'] = (module,)  # torch.jit tells modules apart by id: keep this one's from reuse
    return copied


def become_plain(module: nn.Module, drop_path: Callable[[StochasticDepth], nn.Module | None]) -> None:
    """Give a network of this package, a stage or a block, timm's own classes, in place.

    Devices, types, hooks and whatever was replaced stay. `drop_path` gives what comes in the place of each block's.
    """
    for child in list(module.modules()):
        plain_class = getattr(child, 'plain_class', None)
        if plain_class is None:
            continue
        own: Any = getattr(child, 'drop_path', None)
        if isinstance(own, StochasticDepth):
            del child.drop_path
            child.drop_path = drop_path(own)  # type: ignore[assignment]
        if hasattr(child, 'drop_path_ramp'):
            del child.drop_path_ramp
        for name in [name for name in child.__dict__ if name.startswith('drop_path_') or name == '_shared_generator']:
            delattr(child, name)
        child.__class__ = plain_class
