"""Survival probabilities p_1 .. p_L of the residual blocks of a network: pure functions.

Equations and sections are those of Huang et al., "Deep Networks with Stochastic Depth" (arxiv.org/abs/1603.09382).
"""

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

DEFAULT_DROP_PATH_RATE = 0.5  # 1 - p_L; the paper recommends p_L = 0.5
SCHEDULES = ('linear', 'uniform', 'timm')

Schedule = str | Sequence[float]


def survival_probs(depth: int, drop_path_rate: float | None = None, schedule: Schedule = 'linear') -> tuple[float, ...]:
    """Survival probability of each residual block, from the first to the last: L probabilities in (0, 1].

    Args:
        depth: Number L of residual blocks, at least 1.
        drop_path_rate: 1 - p_L, in [0, 1). None is 0.5, the paper's value. 0 drops nothing, whatever the schedule.
        schedule: How p_l runs from the first block to the last:

            * `'linear'`: p_l = 1 - l/L (1 - p_L), the paper's equation 4
            * `'uniform'`: p_l = p_L
            * `'timm'`: p_l = 1 - (l-1)/(L-1) (1 - p_L), the rule of timm's own ResNet
            * a sequence of L probabilities in (0, 1]
            * a pair (p_1, p_L), for L > 2, with equal steps between

            A sequence states the probabilities itself and takes no `drop_path_rate` beside it, but for 0.

    Raises:
        ValueError: An argument is outside what is allowed.
    """
    if not (isinstance(depth, int) and depth >= 1):
        raise ValueError(f'depth must be a whole number of at least 1, got {depth!r}')
    if drop_path_rate is not None and not (_is_number(drop_path_rate) and 0 <= drop_path_rate < 1):
        raise ValueError(f'drop_path_rate must be in [0, 1), got {drop_path_rate!r}')
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(_schedule_message(depth, schedule))
        rate = float(DEFAULT_DROP_PATH_RATE if drop_path_rate is None else drop_path_rate)
        if schedule == 'linear':
            return tuple(1 - l / depth * rate for l in range(1, depth + 1))
        if schedule == 'uniform':
            return (1 - rate,) * depth
        return tuple(1 - l / max(depth - 1, 1) * rate for l in range(depth))
    probs = _checked_sequence(depth, schedule)
    if drop_path_rate is None:
        return probs
    if drop_path_rate == 0:
        return (1.0,) * depth
    raise ValueError(
        f'drop_path_rate must be None or 0 where drop_path_schedule is a sequence of probabilities, '
        f'got drop_path_rate {drop_path_rate!r} and drop_path_schedule {schedule!r}'
    )


def expected_depth(probs: Sequence[float]) -> float:
    """Mean number of active blocks in a step, E(L~) = sum of p_l in `probs` (section 3, "Expected network depth")."""
    return math.fsum(probs)


def _checked_sequence(depth: int, schedule: Any) -> tuple[float, ...]:
    values = tuple(schedule) if isinstance(schedule, Iterable) else ()
    if all(_is_number(p) and 0 < p <= 1 for p in values):
        if len(values) == depth:
            return tuple(map(float, values))
        if len(values) == 2 and depth > 2:
            first, last = map(float, values)
            return (*(first + (last - first) * l / (depth - 1) for l in range(depth - 1)), last)
    raise ValueError(_schedule_message(depth, schedule))


def _schedule_message(depth: int, schedule: Any) -> str:
    names = ', '.join(repr(name) for name in SCHEDULES)
    pair = ' or a pair (first, last) of them' if depth > 2 else ''
    allowed = f'one of {names}, or a sequence of {depth} probabilities in (0, 1]{pair}'
    return f'drop_path_schedule must be {allowed}, got {schedule!r}'


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
