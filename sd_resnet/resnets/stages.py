"""Residual blocks one after another, each with its own draw, also where somebody has put something else among them.

In a stage, and in what `features_only=True` gives.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from timm.models import FeatureListNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..core.compiling import forward_by_mode, outside_compiler
from ..core.draws import Draw
from ..core.private_api import is_hooked
from ..core.refusals import check_exportable, check_scriptable
from .blocks import ResidualBlock
from .scripting import Gate, become_plain, copy_sharing_tensors

RAMP = 'drop_path_ramp'  # the ramp's name in a network


class Stage(nn.Sequential):
    """The blocks of one stage, and whatever else somebody puts there; a plain `nn.Sequential` for who calls it so."""

    plain_class = nn.Sequential

    def runs_outside_compiler(self) -> bool:
        """Does one of the blocks?"""
        return any(block.runs_outside_compiler() for block in blocks_in(self))

    @forward_by_mode
    def forward(self, x: Tensor, drawn: Sequence[Draw] | None = None, grad_checkpointing: bool = False) -> Tensor:
        """Run the blocks on (N, C, H, W), each with its draw, or, without any, with one that it makes itself.

        With `grad_checkpointing` each block is recomputed in the backward pass instead of keeping its activations.
        """
        run = runner(self)
        draws = None if drawn is None else list(drawn)
        before: Any = None
        for module in self:
            after_relu = before is not None and before.ends_in_relu() and not is_hooked(before)
            x = run(module, x, draws, grad_checkpointing, after_relu)
            before = module if isinstance(module, ResidualBlock) and _is_as_made(module) else None
        return x


def blocks_in(module: nn.Module) -> Iterator[ResidualBlock]:
    """The residual blocks of a module in order, also those that somebody has wrapped."""
    if isinstance(module, ResidualBlock):
        yield module
    else:
        for child in module.children():
            yield from blocks_in(child)


def _run(
    module: nn.Module, x: Tensor, draws: list[Draw] | None, grad_checkpointing: bool, after_relu: bool = False
) -> Tensor:
    """A stage, a block, or what somebody has put in its place, with the draws of its blocks, which leave the list."""
    blocks = list(blocks_in(module))
    own = None if draws is None else [draws.pop(0) for _ in blocks]
    if isinstance(module, Stage) and _is_as_made(module):
        return module(x, drawn=own, grad_checkpointing=grad_checkpointing)
    if own and isinstance(module, ResidualBlock) and _is_as_made(module):
        # By name: to a full backward hook, as under timm, the input is the one argument
        given: dict[str, Any] = {'drawn': own[0], 'after_relu': after_relu}
        return checkpoint(module, x, use_reentrant=False, **given) if grad_checkpointing else module(x, **given)
    if not own and not grad_checkpointing:
        return module(x)
    return _call(module, x, blocks, own or [], grad_checkpointing)


_run_outside_compiler = outside_compiler(_run)


def runner(module: Any) -> Callable[..., Tensor]:
    """`_run`, for the frame of a module, which may be kept out of the compiler."""
    return _run_outside_compiler if module.runs_outside_compiler() else _run


def _is_as_made(module: nn.Module) -> bool:
    """Has nobody replaced its `forward`?"""
    return 'forward' not in module.__dict__


@outside_compiler
def _call(
    module: nn.Module, x: Tensor, blocks: list[ResidualBlock], drawn: list[Draw], grad_checkpointing: bool
) -> Tensor:
    if grad_checkpointing:
        return checkpoint(_hand_over, module, x, blocks, drawn, use_reentrant=False)
    return _hand_over(module, x, blocks, drawn)


@outside_compiler
def _hand_over(module: nn.Module, x: Tensor, blocks: list[ResidualBlock], drawn: list[Draw]) -> Tensor:
    """Blocks that somebody has wrapped are called with their input alone."""
    for block, own in zip(blocks, drawn):
        block.__dict__['handed'] = own
    try:
        return module(x)
    finally:
        for block in blocks:
            block.__dict__.pop('handed', None)


class StochasticFeatures(FeatureListNet):
    """timm's `FeatureListNet`, whose names its state dict has, of a network with stochastic depth.

    Args:
        model: The network, whose stages after the last wanted feature, and head, are removed; behind `network`, for
            `network.set_drop_path(...)`, and no child, so that names stay timm's.
        out_indices: Of the wanted features; 0 is the stem's.
        **kwargs: What timm's takes.
    """

    def __init__(self, model: Any, out_indices: Any = (0, 1, 2, 3, 4), **kwargs: Any) -> None:
        super().__init__(model, out_indices=model.prune_intermediate_layers(out_indices), **kwargs)
        self.network: Any
        self.__dict__['network'] = model
        if model.drop_path_ramp is not None:
            self.add_module(RAMP, model.drop_path_ramp)  # its count is in the state dict

    def train(self, mode: bool = True) -> Any:
        self.network.training = mode
        return super().train(mode)

    def runs_outside_compiler(self) -> bool:
        """Must the frame that uses the network's draws be kept out of `torch.compile`?"""
        return self.network.runs_outside_compiler()

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """(N, C, H, W) images to a list of (N, C', H', W')."""
        outside = self.runs_outside_compiler()
        if outside:
            check_exportable()
        return (self._features_outside if outside else self._features)(x)

    def _features(self, x: Tensor) -> list[Tensor]:
        layers = {name: module for name, module in self.items() if name != RAMP}
        blocks = {name: list(blocks_in(module)) for name, module in layers.items()}
        run = runner(self)
        draws = self.network.draw(x, [block for own in blocks.values() for block in own])
        features = []
        for name, module in layers.items():
            x = run(module, x, draws, self.grad_checkpointing and bool(blocks[name]))
            if name in self.return_layers:
                features.append(x)
        return features

    _features_outside = outside_compiler(_features)

    def __prepare_scriptable__(self) -> nn.Module:
        check_scriptable(self.network.drop_path_ramp, self.training)
        plain: Any = copy_sharing_tensors(self)
        if hasattr(plain, RAMP):
            delattr(plain, RAMP)
        del plain.__dict__['network']
        plain.__class__ = FeatureListNet
        become_plain(plain, Gate)
        return plain
