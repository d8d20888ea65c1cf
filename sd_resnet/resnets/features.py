"""What `features_only=True` gives: timm's list of features, under timm's names, with one draw for all blocks."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from timm.models import FeatureListNet
from torch import Tensor, nn

from ..core.compiling import check_exportable, outside_compiler
from ..core.ramp import check_scriptable
from ..core.scripting import Gate, become_plain, copy_sharing_tensors
from .blocks import blocks_in, call_wrapped, takes_draws

RAMP = 'drop_path_ramp'


class StochasticFeatures(FeatureListNet):
    """timm's `FeatureListNet`, whose names its state dict has, of a network with stochastic depth.

    Args:
        model: The network; its stages after the last wanted feature, and its head, are removed.
        out_indices: Of the wanted features; 0 is the stem's.
        **kwargs: What timm's takes.

    Attributes:
        network: The network, for `network.set_drop_path(...)`; not a child, so that names stay timm's.
    """

    def __init__(self, model: Any, out_indices: Any = (0, 1, 2, 3, 4), **kwargs: Any) -> None:
        out_indices = model.prune_intermediate_layers(out_indices)
        super().__init__(model, out_indices=out_indices, **kwargs)
        self.network: Any
        self.__dict__['network'] = model
        if model.drop_path_ramp is not None:
            self.add_module(RAMP, model.drop_path_ramp)  # its count is in the state dict

    def train(self, mode: bool = True) -> StochasticFeatures:
        self.network.training = mode
        return super().train(mode)

    def forward(self, x: Tensor) -> list[Tensor]:  # type: ignore[override]
        """(N, C, H, W) images to a list of (N, C', H', W')."""
        outside = self.network.runs_outside_compiler()
        if outside:
            check_exportable()
        return list((self._collect_outside if outside else self._collect)(x).values())

    def _collect(self, x: Tensor) -> dict[str, Tensor]:
        layers = [(name, module, list(blocks_in(module))) for name, module in self.items() if name != RAMP]
        draws = self.network.draw(x, [block for _, _, blocks in layers for block in blocks])
        features = OrderedDict()
        for name, module, blocks in layers:
            own = None if draws is None else [draws.pop(0) for _ in blocks]
            if takes_draws(module):
                x = module(x, drawn=own, grad_checkpointing=self.grad_checkpointing)
            elif blocks:
                x = call_wrapped(module, x, blocks, own, self.grad_checkpointing)
            else:
                x = module(x)
            if name in self.return_layers:
                features[self.return_layers[name]] = x
        return features

    _collect_outside = outside_compiler(_collect)

    def __prepare_scriptable__(self) -> nn.Module:
        check_scriptable(self.network.drop_path_ramp, self.training)
        plain: Any = copy_sharing_tensors(self)
        if hasattr(plain, RAMP):
            delattr(plain, RAMP)
        del plain.__dict__['network']
        plain.__class__ = FeatureListNet
        become_plain(plain, Gate)
        return plain
