"""What can drop in a network, whether of this package or converted: who asks need not tell the two. And its name."""

import copy
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cached_property, partial
from itertools import product
from statistics import fmean
from typing import Any, NamedTuple

import timm
import torch
from timm.models import is_model, is_model_in_modules
from torch import Tensor, nn

from ..converted.blocks import UnitBlock
from ..converted.by_branch import BranchDropPath
from ..converted.convert import converted_blocks, own_input_size, unconvert
from ..converted.converted_models import register
from ..converted.draws import Draws
from ..converted.published_rates import published
from ..converted.trial import copy_without_data, find_slots, run
from ..core.draws import Draw, Window
from ..core.schedules import DEFAULT_DROP_PATH_RATE
from ..resnets.checkpoints import fold
from ..resnets.network import StochasticDepthNet

_MODULES = ('resnet_cifar', 'resnet_imagenet', 'converted_models')  # that register the models of this package


class ConvertedNetwork:
    """One of timm's, or of anybody's, that `convert` has converted."""

    def __init__(self, model: Any) -> None:
        self.model = model
        # The blocks' drop paths by the blocks' names as in the state dict, in the order in which they run
        self.drop_paths = {name: block.drop_paths() for name, block in converted_blocks(model).items()}

    @cached_property
    def fixed(self) -> frozenset[int]:
        """Blocks that change the shape, and so cannot be removed: a trial run shows them."""
        changing: set[str] = set()
        tried = copy_without_data(self.model).eval()

        def compare(name: str, block: nn.Module, args: Any, out: Any) -> None:
            after = out[0] if isinstance(out, tuple) else out
            if not args or args[0].shape != after.shape:
                changing.add(name)

        for name in self.drop_paths:
            tried.get_submodule(name).register_forward_hook(partial(compare, name))
        run(tried, own_input_size(self.model))
        return frozenset(index for index, name in enumerate(self.drop_paths) if name in changing)

    def plain_copy(self) -> Any:
        """The network as it was before, of the same weights, which drops nothing."""
        plain = copy.deepcopy(self.model)
        drop_paths = [child for block in converted_blocks(plain).values() for _, _, child in block.plain_slots]
        unconvert(plain)
        drop_paths += [getattr(plain.get_submodule(slot.holder), slot.name) for slot in find_slots(plain)]
        for drop_path, rate in product(drop_paths, ('drop_prob', 'p')):
            if getattr(drop_path, rate, None):
                setattr(drop_path, rate, 0.0)
        return plain

    def on_forward(self, tell: Callable[[list[float]], None]) -> None:
        """Call `tell` after each forward pass with the share of each block's branches that was run, their mean."""
        blocks = converted_blocks(self.model).values()
        ran: dict[Any, list[float]] = {}  # by drop paths: of each use

        for drop_path in (each for own in self.drop_paths.values() for each in own):
            if isinstance(drop_path, BranchDropPath):
                drop_path.take = torch.compiler.disable(_watched_take(drop_path, ran))  # type: ignore[method-assign]
        for draws in {block.draws: None for block in blocks if isinstance(block, UnitBlock)}:
            draws.draw = torch.compiler.disable(_watched_draw(draws, ran))

        def told(*_: Any) -> None:
            shares = ((ran.get(drop_path, [1.0]) for drop_path in own) for own in self.drop_paths.values())
            tell([fmean([fmean(each) for each in own] or [1.0]) for own in shares])

        self.model.register_forward_pre_hook(torch.compiler.disable(lambda *_: ran.clear()))
        self.model.register_forward_hook(torch.compiler.disable(told))


def _watched_take(drop_path: BranchDropPath, ran: dict[Any, list[float]]) -> Callable[[Tensor, bool], Tensor]:
    take = drop_path.take

    def watched(x: Tensor, inner: bool) -> Tensor:
        begins = drop_path.branch is None
        rows = take(x, inner)
        if begins:
            ran.setdefault(drop_path, []).append(len(rows) / len(x))
        return rows

    return watched


def _watched_draw(draws: Draws, ran: dict[Any, list[float]]) -> Callable[[UnitBlock, Tensor], Draw]:
    draw = draws.draw

    def watched(block: UnitBlock, x: Tensor) -> Draw:
        drawn = draw(block, x)
        ran[block.block_drop_path] = _shares([drawn], x)
        return drawn

    return watched


class OwnNetwork:
    """One of this package, described alike."""

    def __init__(self, model: StochasticDepthNet) -> None:
        self.model: Any = model
        names = {module: name for name, module in model.named_modules()}
        blocks = list(model.blocks())
        self.drop_paths = {names[block]: [block.drop_path] for block in blocks}
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


class Defaults(NamedTuple):
    """How a model drops where nothing is said."""

    rate: float
    schedule: str
    mode: str
    source: str  # of the rate


def defaults_of(architecture: str) -> Defaults:
    """Those of a registered `sd_` model, by its name without tag."""
    if is_model_in_modules(architecture, ('converted_models',)):
        rate, source = published(architecture.removeprefix('sd_'))
        return Defaults(rate, 'timm', 'subset', source)
    return Defaults(DEFAULT_DROP_PATH_RATE, 'linear', 'batch', 'Huang et al., arXiv 1603.09382, section 4: p_L = 0.5')


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
