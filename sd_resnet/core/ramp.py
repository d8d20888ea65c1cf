"""A drop-path rate that changes during training: a warm-up, early only, late only, or a decay.

Early and late drop path, and the decay in a line (there `--drop_schedule linear`), are those of Liu et al., "Dropout
Reduces Underfitting" (https://arxiv.org/abs/2303.01500). Language models that drop layers early and none in the end
need less compute for the same loss: "Don't Drop Dropout", ICML 2026 (https://openreview.net/forum?id=AEHn9ya4Re).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .drop_path import StochasticDepth, derived
from .refusals import check_counts_steps

KINDS = ('warmup', 'early', 'late', 'decay')


class DropPathRamp(nn.Module):
    """Multiplies every block's rate, 1 - p_l, by a factor that depends on the number of training steps so far.

    Early, late and decay are those of Liu et al. (arxiv.org/abs/2303.01500).

    A step is one forward pass of the network in training mode, with gradients; of a converted one, of its first block
    that trains. `steps_done` alone decides, so that no step waits for a device; the state dict has it as a scalar,
    `step`, which survives timm's `--resume`. Who starts anew drops the key, or sets `steps_done` to 0.

    Args:
        kind: `'warmup'`, from 0 up to the whole rate in equal steps; `'early'`, on, then off; `'late'`, off, then on;
            `'decay'`, from the whole rate down to 0 in equal steps.
        steps: When the warm-up or decay ends, or drop path is switched; at least 1.
        device: Device of the travelling scalar.

    Raises:
        ValueError: `kind` is none of these, or `steps` no whole number of at least 1.
    """

    __jit_unused_properties__ = ('factor',)

    def __init__(self, kind: str, steps: int, device: Any = None) -> None:
        super().__init__()
        if kind not in KINDS or isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(_message((kind, steps)))
        self.kind, self.steps, self.steps_done = kind, steps, 0
        self.step: Any
        self.register_buffer('step', torch.zeros((), dtype=torch.int64, device=device))
        self._drop_paths: list[StochasticDepth] = []
        self._rates: list[float] = []
        self._factor = 1.0  # in force

    @derived
    def factor(self) -> Any:
        """What the rates are multiplied by in the next training step."""
        done = min(1.0, self.steps_done / self.steps)
        if self.kind in ('warmup', 'decay'):
            return done if self.kind == 'warmup' else 1 - done
        return float((done < 1) == (self.kind == 'early'))

    def survival_probs(self) -> tuple[float, ...]:
        """p_1 .. p_L at factor 1."""
        return tuple(1 - rate for rate in self._rates)

    def govern(self, drop_paths: Sequence[StochasticDepth]) -> None:
        """Take charge of the blocks' rates, which are by now those of factor 1."""
        self.__dict__['_drop_paths'] = list(drop_paths)  # no children: they belong to their blocks
        self._rates = [drop_path.drop_prob for drop_path in drop_paths]
        self._factor = 1.0
        self._set(self.factor)

    @torch.compiler.disable
    def advance(self) -> None:
        """Set the rates for the training step that begins, and count it."""
        check_counts_steps(self)
        self._set(self.factor)
        self.steps_done += 1
        self.step.fill_(self.steps_done)

    def _set(self, factor: float) -> None:
        if self._factor != factor:
            self._factor = factor
            for drop_path, rate in zip(self._drop_paths, self._rates):
                drop_path.configure(1 - rate * factor, drop_path.mode)

    def extra_repr(self) -> str:
        return f'kind={self.kind!r}, steps={self.steps}'

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """A state dict of a network without a ramp leaves the count as it is."""
        stored = state_dict.get(f'{prefix}step')
        if stored is None:
            state_dict[f'{prefix}step'] = self.step.detach()
        elif not stored.is_meta:
            self.steps_done = int(stored)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._set(self.factor)


def as_ramp(value: Any, device: Any = None) -> DropPathRamp | None:
    """The ramp that `drop_path_ramp=value` asks for: a pair (kind, steps), or None; else a ValueError."""
    if value is None:
        return None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise ValueError(_message(value))
    return DropPathRamp(value[0], value[1], device)


def _message(value: Any) -> str:
    kinds = ', '.join(map(repr, KINDS))
    return f'drop_path_ramp must be None or (kind, steps), a kind of {kinds} and steps of at least 1, got {value!r}'
