"""`sd-resnet sweep`: from which drop-path rate on is it worth it? Step times over rates, model by model."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..analysis.costs import network_cost
from .measure import CONSTANT, TIMM, Settings, run
from .report import environment

RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
MODES = ('subset', 'batch')


@dataclass
class Swept:
    """One model at one rate.

    Attributes:
        model: Architecture.
        rate: 1 - p_L.
        flops: Share of the undropped network's FLOPs that is left, by modes: in subset mode in every step, where a
            whole number of rows survives; in batch mode on average.
        ratios: Of mean step times to the undropped network, by `'timm'` and the modes.
        medians: The same of the medians.
        seconds: Time of each counted step, by `'undropped'`, `'timm'` and the modes.
    """

    model: str
    rate: float
    flops: dict[str, float]
    ratios: dict[str, float]
    medians: dict[str, float]
    seconds: dict[str, list[float]]

    def rate_of(self, mode: str) -> float:
        """The rate of the work that was dropped. Of 10 rows, rate 0.05 drops none in subset mode: that is 0."""
        return self.rate * (1 - self.flops[mode]) / (1 - self.flops['batch'])


def sweep(
    settings: Settings, models: Sequence[str], rates: Sequence[float] = RATES, progress: bool = True
) -> list[Swept]:
    """Measure the modes and timm's own drop path beside the undropped network, at each rate.

    Args:
        settings: Of every measurement, but for model, rate, modes and peers.
        models: Architectures of this package, or timm's under `sd_` names.
        rates: 1 - p_L, in (0, 1), each once.
        progress: Show a bar.

    Raises:
        ValueError: An argument is outside what is allowed.
    """
    if len(set(rates)) < len(rates) or not all(0 < rate < 1 for rate in rates):
        raise ValueError(f'rates must be different numbers between 0 and 1, got {list(rates)}')
    for model in models:  # what is wrong with the last one is said before the first is measured
        if network_cost(model, settings.size, max(rates), settings.schedule).expected_share == 1:
            raise ValueError(f'model must have blocks that drop at rate {max(rates)} and this schedule, got {model!r}')
    swept = []
    for model in models:
        for rate in rates:
            own = replace(settings, model=model, rate=rate, modes=MODES, peers=('timm',), saved_steps=0)
            rows = {row.name: row for row in run(own, progress)}
            named = {'undropped': rows[CONSTANT], **({'timm': rows[TIMM]} if TIMM in rows else {})}
            named.update({mode: rows[f'{model}, {mode}'] for mode in MODES})
            seconds = {name: row.seconds for name, row in named.items()}
            bound, subset = named['batch'].bound, named['subset'].observed
            assert bound is not None
            assert subset is not None
            ratios, medians = (
                {name: mean(times) / mean(seconds['undropped']) for name, times in seconds.items()}
                for mean in (statistics.fmean, statistics.median)
            )
            swept.append(Swept(model, rate, {'subset': subset, 'batch': bound}, ratios, medians, seconds))
    return swept


def break_even(swept: Sequence[Swept], mode: str) -> float | None:
    """The rate from which on a step is quicker than the undropped network's, on the line through the medians.

    Args:
        swept: Of one model, at two rates or more; see `Swept.rate_of`.
        mode: `'subset'` or `'batch'`.

    Returns:
        The rate, 0 if every rate pays, infinity if none does, or None if the rates do not differ.
    """
    rates = [round(s.rate_of(mode), 6) for s in swept]
    if len(set(rates)) == 1:
        return None
    slope, height = statistics.linear_regression(rates, [s.medians[mode] for s in swept])
    if slope >= 0:
        return 0.0 if max(s.medians[mode] for s in swept) < 1 else math.inf
    rate = (1 - height) / slope
    return math.inf if rate >= 1 else max(rate, 0.0)


def table(settings: Settings, swept: Sequence[Swept]) -> str:
    """The table that `sd-resnet sweep` prints."""
    lines = [
        f'batch {settings.batch}, schedule {settings.schedule or "of the model"}, {settings.precision}, '
        f'{settings.steps} steps; ratios of step times to the undropped network, mean (median)',
        environment(),
        '',
        f'{"":<34}{"rate":>6}{"timm":>16}{"subset":>16}{"FLOPs":>8}{"batch":>16}{"FLOPs":>8}',
    ]
    for s in swept:
        cells = ''.join(
            f'{f"{s.ratios[name]:.3f} ({s.medians[name]:.3f})" if name in s.ratios else "-":>16}'
            f'{f"{s.flops[name]:8.3f}" if name in s.flops else ""}'
            for name in ('timm', *MODES)
        )
        lines.append(f'{s.model:<34}{s.rate:>6.2f}{cells}')
    lines.append('')
    for model in dict.fromkeys(s.model for s in swept):
        own = [s for s in swept if s.model == model]
        if len(own) > 1:
            texts = []
            for mode in MODES:
                rate = break_even(own, mode)
                text = 'unknown' if rate is None else 'never' if rate == math.inf else f'from {rate:.3f}'
                texts.append(f'{mode} {text}')
            lines.append(f'break-even of {model}: {", ".join(texts)}')
    lines += [
        'FLOPs: share left, the bound; subset drops whole rows, the same number in every step, batch on average;',
        'break-even: on the line through the medians over the rate of the work that was dropped',
    ]
    return '\n'.join(lines)
