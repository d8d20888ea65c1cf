"""`sd-resnet sweep`: from which drop-path rate on is it worth it? Step times over rates, model by model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .bench import CONSTANT, TIMM, Settings, environment, run

RATES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
MODES = ('subset', 'batch')


@dataclass
class Swept:
    """One model at one rate.

    Attributes:
        model: Architecture.
        rate: 1 - p_L.
        flops: Share of the undropped network's FLOPs that is left on average.
        ratios: Of mean step times to the undropped network, by `'timm'` and the modes.
        medians: The same of the medians.
        seconds: Time of each counted step, by `'undropped'`, `'timm'` and the modes.
    """

    model: str
    rate: float
    flops: float
    ratios: dict[str, float]
    medians: dict[str, float]
    seconds: dict[str, list[float]]


def sweep(
    settings: Settings, models: Sequence[str], rates: Sequence[float] = RATES, progress: bool = True
) -> list[Swept]:
    """Measure the modes and timm's own drop path beside the undropped network, at each rate.

    Args:
        settings: Of every measurement, but for model, rate, modes and peers.
        models: Architectures of this package, or timm's under `sd_` names.
        rates: 1 - p_L, in (0, 1).
        progress: Show a bar.

    Raises:
        ValueError: An argument is outside what is allowed.
    """
    swept = []
    for model in models:
        for rate in rates:
            own = replace(settings, model=model, rate=rate, modes=MODES, peers=('timm',), saved_steps=0)
            rows = {row.name: row for row in run(own, progress)}
            named = {'undropped': rows[CONSTANT], **({'timm': rows[TIMM]} if TIMM in rows else {})}
            named.update({mode: rows[f'{model}, {mode}'] for mode in MODES})
            seconds = {name: row.seconds for name, row in named.items()}
            bound = named['batch'].bound
            assert bound is not None
            ratios, medians = (
                {name: mean(times) / mean(seconds['undropped']) for name, times in seconds.items()}
                for mean in (statistics.fmean, statistics.median)
            )
            swept.append(Swept(model, rate, bound, ratios, medians, seconds))
    return swept


def break_even(swept: Sequence[Swept], mode: str) -> float | None:
    """The rate from which on a step is quicker than the undropped network's, on the line through the medians.

    Args:
        swept: Of one model, at two rates or more.
        mode: `'subset'` or `'batch'`.

    Returns:
        The rate, 0 if every rate pays, or None if none does.
    """
    slope, height = statistics.linear_regression([s.rate for s in swept], [s.medians[mode] for s in swept])
    if slope >= 0:
        return 0.0 if max(s.medians[mode] for s in swept) < 1 else None
    rate = (1 - height) / slope
    return None if rate >= 1 else max(rate, 0.0)


def table(settings: Settings, swept: Sequence[Swept]) -> str:
    """The table that `sd-resnet sweep` prints."""
    lines = [
        f'batch {settings.batch}, schedule {settings.schedule or "of the model"}, {settings.precision}, '
        f'{settings.steps} steps; ratios of step times to the undropped network, mean (median)',
        environment(),
        '',
        f'{"":<34}{"rate":>6}{"FLOPs":>8}{"timm":>16}{"subset":>16}{"batch":>16}',
    ]
    for s in swept:
        cells = ''.join(
            f'{f"{s.ratios[name]:.3f} ({s.medians[name]:.3f})" if name in s.ratios else "-":>16}'
            for name in ('timm', *MODES)
        )
        lines.append(f'{s.model:<34}{s.rate:>6.2f}{s.flops:>8.3f}{cells}')
    lines.append('')
    for model in dict.fromkeys(s.model for s in swept):
        own = [s for s in swept if s.model == model]
        if len(own) > 1:
            texts = []
            for mode in MODES:
                rate = break_even(own, mode)
                texts.append(f'{mode} {"never" if rate is None else f"from {rate:.3f}"}')
            lines.append(f'break-even of {model}: {", ".join(texts)}')
    lines.append('FLOPs: share left on average, the bound; break-even: on the line through the medians')
    return '\n'.join(lines)
