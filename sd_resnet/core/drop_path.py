"""The `StochasticDepth` module: one block's survival probability and mode, in the place of timm's `DropPath`.

Section and equation numbers refer to Huang et al., "Deep Networks with Stochastic Depth"
(https://arxiv.org/abs/1603.09382). The field's words: a residual block computes `act(shortcut(x) + branch(x))`;
p_l is block l's survival probability, b_l its draw.
"""

from collections.abc import Callable
from typing import Any

from timm.layers import DropPath
from torch import Tensor, nn

from .draws import UNIT
from .refusals import check_settings


def derived(getter: Callable[[Any], Any]) -> Any:
    """A property that takes only the value that it has: some tools set every attribute that they read."""

    def setter(module: Any, value: Any) -> None:
        if value != getter(module):
            name, kind = getter.__name__, type(module).__name__
            raise AttributeError(f'{name} of {kind} cannot be assigned (got {value!r}): it follows from the drop path')

    return property(getter, setter, doc=getter.__doc__)


class StochasticDepth(DropPath):
    """Survival probability and mode of one residual block, which holds it as `drop_path` and skips the work.

    Called like timm's `DropPath`, it applies row mode's mask in training. Its own `training` flag decides.

    Args:
        survival_prob: p_l, in (0, 1].
        mode: `'batch'`, one draw per mini-batch (section 3); `'row'`, one per sample; `'subset'`, one per sample, and
            the branch runs on a window of surviving rows.

    Raises:
        ValueError: An argument is outside what is allowed.
    """

    __jit_unused_properties__ = ('survival_prob', 'drop_prob')

    rescale = 'train'  # the branch over p_l in training, timm's; `paper_rescaling` has the paper's

    def __init__(self, survival_prob: float = 1.0, mode: str = 'batch') -> None:
        nn.Module.__init__(self)  # DropPath's own would assign drop_prob
        self.scale_by_keep = True
        self.network_drops = False  # does any block of its network?
        self.ramped = False  # does a `DropPathRamp` set its rate?
        self.configure(survival_prob, mode)

    def configure(self, survival_prob: float, mode: str) -> None:
        """Set both at once, and nothing else; `model.set_drop_path` sets a whole network."""
        check_settings(survival_prob, mode, self.rescale)
        self.mode, self.p_l = mode, float(survival_prob)
        self.p_l_in_units, self.drops = round(self.p_l * UNIT), self.p_l < 1

    @derived
    def survival_prob(self) -> Any:
        """p_l."""
        return self.p_l

    @property
    def drop_prob(self) -> float:
        """1 - p_l, in [0, 1), under timm's name. Assigning it acts as in timm; an AttributeError where a ramp does."""
        return 1 - self.p_l

    @drop_prob.setter
    def drop_prob(self, value: float) -> None:
        if not 0 <= value < 1:
            raise ValueError(f'drop_prob must be in [0, 1), got {value!r}')
        if value != self.drop_prob and self.ramped:
            raise AttributeError(f'drop_prob cannot be assigned (got {value!r}): drop_path_ramp sets it at every step')
        if value != self.drop_prob:
            self.configure(1 - value, self.mode)

    def is_dropping(self) -> bool:
        """Does it train, and drop now, or later in a ramp?"""
        return self.training and (self.drops or self.ramped)

    def runs_outside_compiler(self) -> bool:
        """Must the block's own frame be kept out of `torch.compile`?

        In batch mode, where each outcome would be a graph, in all blocks; and in a ramp, which a compiler could freeze.
        """
        return self.training and (self.ramped or (self.mode == 'batch' and (self.drops or self.network_drops)))

    def train_factor(self, p_l: float) -> float:
        """What a surviving branch is multiplied by in training, drawn with `p_l`."""
        return 1 / p_l

    def mask(self, x: Tensor, p_l: float | None = None) -> Tensor:
        """Row mode's draw: 1 for a surviving sample, else 0; shape (N, 1, ..., 1), on the device of `x`."""
        return x.new_empty([x.shape[0]] + [1] * (x.dim() - 1)).bernoulli_(self.p_l if p_l is None else p_l)

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) to (N, ...), as timm's `DropPath`."""
        if not (self.training and self.drops):
            return x
        return x * (self.mask(x) * self.train_factor(self.p_l))

    def extra_repr(self) -> str:
        return f'survival_prob={self.p_l:.4g}, mode={self.mode!r}, rescale={self.rescale!r}'
