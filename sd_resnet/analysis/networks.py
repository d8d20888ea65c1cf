"""What can drop in a network, whether of this package or converted: who asks need not tell the two. And its name."""

import copy
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

import timm
import torch
from timm.layers import DropPath
from timm.models import is_model, is_model_in_modules
from torch import Tensor, nn

from ..converted.blocks import ConvertedBlock
from ..converted.convert import converted_blocks, unconvert
from ..converted.converted_models import register
from ..core.draws import Draw, Window
from ..resnets.checkpoints import fold
from ..resnets.network import StochasticDepthNet

_MODULES = ('resnet_cifar', 'resnet_imagenet', 'converted_models')  # that register the models of this package


class ConvertedNetwork:
    """One of timm's, or of anybody's, that `convert` has converted."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # The blocks' `StochasticDepth` by the blocks' names as in the state dict, in the order in which they run
        self.drop_paths = {name: block.block_drop_path for name, block in converted_blocks(model).items()}
        self.fixed: frozenset[int] = frozenset()  # blocks that change the shape, and so cannot be removed

    def plain_copy(self) -> Any:
        """timm's own network of the same weights, which drops nothing."""
        plain = copy.deepcopy(self.model)
        unconvert(plain)
        if cfg := getattr(plain, 'pretrained_cfg', None):
            plain.pretrained_cfg = plain.default_cfg = {**cfg, 'architecture': cfg['architecture'].removeprefix('sd_')}
        for module in plain.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0
        return plain

    def on_forward(self, tell: Callable[[list[float]], None]) -> None:
        """Call `tell` after each forward pass with the share of each block's branch that was run."""
        blocks = converted_blocks(self.model).values()
        draws = next(iter(blocks)).draws
        draw, ran = draws.draw, dict.fromkeys(blocks, 1.0)

        @torch.compiler.disable
        def watched(block: ConvertedBlock, x: Tensor) -> Draw:
            drawn = draw(block, x)
            (ran[block],) = _shares([drawn], x)
            return drawn

        draws.draw = watched
        self.model.register_forward_hook(torch.compiler.disable(lambda *_: tell(list(ran.values()))))


class OwnNetwork:
    """One of this package, described alike."""

    def __init__(self, model: StochasticDepthNet) -> None:
        self.model: Any = model
        names = {module: name for name, module in model.named_modules()}
        blocks = list(model.blocks())
        self.drop_paths = {names[block]: block.drop_path for block in blocks}
        self.fixed = frozenset(index for index, block in enumerate(blocks) if block.downsample is not None)

    def plain_copy(self) -> Any:
        """timm's ResNet; of the CIFAR nets, which timm does not have, the same class at rate 0."""
        return fold(self.model)

    def on_forward(self, tell: Callable[[list[float]], None]) -> None:
        """See `ConvertedNetwork.on_forward`."""
        draw = self.model.draw

        def watched(x: Tensor, *args: Any) -> Any:
            draws = draw(x, *args)
            tell([1.0] * len(self.drop_paths) if draws is None else _shares(draws, x))
            return draws

        self.model.draw = watched


Network = ConvertedNetwork | OwnNetwork


def _shares(draws: Sequence[Draw], x: Tensor) -> list[float]:
    """Of each branch's work that is computed for the mini-batch `x`: in row mode all of it."""
    drawn = (b_l for _, b_l in draws)
    return [b_l.rows / len(x) if isinstance(b_l, Window) else float(b_l is not False) for b_l in drawn]


def network_of(model: nn.Module) -> Network:
    """The description of a network; a TypeError where it is neither of this package nor converted."""
    if isinstance(model, StochasticDepthNet):
        return OwnNetwork(model)
    if not converted_blocks(model):
        raise TypeError(
            f'model must be of sd_resnet, or one that sd_resnet.convert has converted, got {type(model).__name__}; '
            'unwrap DDP and EMA (`.module`) and torch.compile (`._orig_mod`) first'
        )
    return ConvertedNetwork(model)


def check_name(name: str, own: bool = True) -> None:
    """Refuse the name of an unknown model with a ValueError that has the nearest ones.

    It may have a tag; `hf-hub:` and the like are not checked. `own`: it must be of this package, or `sd_` before any
    network of timm's, which is registered if need be.
    """
    architecture = name.split('.')[0]
    plain = architecture.removeprefix('sd_')
    if plain != architecture and is_model(plain) and not is_model(architecture):
        register(plain)
    if ':' in name or (is_model_in_modules(architecture, _MODULES) if own else is_model(architecture)):
        return
    if own and (is_model(plain) or is_model(f'sd_{plain}')):
        raise ValueError(f'model must be sd_{plain}, with stochastic depth that skips, got {name!r}')
    nearest = ', '.join(get_close_matches(architecture, timm.list_models(module=_MODULES if own else ''), cutoff=0))
    further = ', or sd_ before another of timm' if own else ''
    raise ValueError(f'model must be a name such as {nearest}{further}, got {name!r}')
