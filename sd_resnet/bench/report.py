"""What `sd-resnet bench`, `growth` and `sweep` print and keep."""

from __future__ import annotations

import itertools
import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

from ..figures import KEPT, OTHER, PROBABILITY, new_figure, save_figure
from .measure import CONSTANT, TIMM, Growth, Row, Settings, ratio


def table(settings: Settings, rows: Sequence[Row]) -> str:
    """The table that `sd-resnet bench` prints: milliseconds, ratios of means, spread as quartiles' distance."""
    names = {row.name: row for row in rows}
    constant, drop_path = names[CONSTANT], names.get(TIMM)
    lines = [
        f'{settings.model}, batch {settings.batch}, {settings.size or "default"} px, drop path {settings.rate}'
        f'{f" {settings.schedule}" if settings.schedule else ""}, '
        f'{settings.precision}{", channels_last" if settings.channels_last else ""}'
        f'{", compiled" if settings.compile else ""}, {settings.steps} steps',
        f'{environment()}',
        '',
        f'{"":<34}{"mean ms":>9}{"median":>9}{"spread":>9}{"ratio":>8}{"median":>8}{"no luck":>9}'
        f'{"FLOPs":>8}{"to timm":>9}{"saved":>8}{"most":>8}',
    ]
    for row in rows:
        quartiles = statistics.quantiles(row.seconds, n=4)
        share = ratio(row, constant, statistics.fmean)
        luck = None if row.bound is None or row.observed is None else share - (row.observed - row.bound)
        lines.append(
            f'{row.name:<34}{statistics.fmean(row.seconds) * 1e3:>9.1f}{statistics.median(row.seconds) * 1e3:>9.1f}'
            f'{(quartiles[2] - quartiles[0]) * 1e3:>9.1f}{share:>8.3f}'
            f'{ratio(row, constant, statistics.median):>8.3f}{_text(luck, 9)}{_text(row.bound, 8)}'
            f'{_text(None if drop_path is None else ratio(row, drop_path, statistics.fmean), 9)}'
            f'{statistics.fmean(row.saved_bytes) / constant.saved_bytes[0]:>8.3f}'
            f'{max(row.saved_bytes) / constant.saved_bytes[0]:>8.3f}'
        )
    lines += [
        '',
        'ratio, median: of step times to constant depth; no luck: the ratio, less what the draw left out or added;',
        "FLOPs: share of FLOPs left on average, the bound; to timm: ratio to timm's drop_path_rate;",
        'saved, most: bytes kept for backward on average and at most, as a share of constant depth',
    ]
    return '\n'.join(lines)


def growth_table(settings: Settings, growths: Sequence[Growth]) -> str:
    """The table that `sd-resnet growth` prints."""
    lines = [
        f'batch mode, batch {settings.batch}, {settings.size or "default"} px, {settings.steps} steps; '
        'ratios of mean step times to constant depth',
        environment(),
        '',
        f'{"":<22}{"p_L":>6}{"FLOPs":>9}{"ratio":>9}{"no luck":>9}{"above":>9}',
    ]
    lines += [
        f'{g.model:<22}{g.survival_prob:>6.2f}{g.bound:>9.3f}{g.ratio:>9.3f}{g.without_luck:>9.3f}'
        f'{g.without_luck - g.bound:>9.3f}'
        for g in growths
    ]
    lines += ['', 'FLOPs: share left on average, the bound; above: of the ratio without the luck of the draw']
    return '\n'.join(lines)


def _text(value: float | None, width: int) -> str:
    return f'{"-" if value is None else format(value, ".3f"):>{width}}'


def environment() -> str:
    """Versions and processor, for the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return (
        f'torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}, {device}, '
        f'{torch.get_num_threads()} threads'
    )


def save_record(settings: Settings, rows: Sequence[Any], path: Path) -> None:
    """Every step's time as JSON; `rows` are dataclasses."""
    record = {'environment': environment(), 'settings': asdict(settings), 'rows': [asdict(row) for row in rows]}
    path.write_text(json.dumps(record, indent=1) + '\n')


def plot_bench(settings: Settings, rows: Sequence[Row], path: Path) -> None:
    """Draw each contestant's mean step time as a share of constant depth, with the FLOPs bound."""
    figure, ((axis,),) = new_figure(1, height=0.5 * len(rows) + 1.4)
    constant = statistics.fmean(rows[0].seconds)
    for place, row in enumerate(rows):
        quartiles = statistics.quantiles(row.seconds, n=4)
        ratio = statistics.fmean(row.seconds) / constant
        axis.barh(place, ratio, 0.7, color=KEPT if row.bound is not None else OTHER)
        axis.hlines(place, quartiles[0] / constant, quartiles[2] / constant, color='black', linewidth=1)
        axis.text(0.01, place, f'{ratio:.2f}', va='center', color='white', fontsize=9)
    bounded = [(place, row.bound) for place, row in enumerate(rows) if row.bound is not None and row.bound < 1]
    for index, (place, bound) in enumerate(bounded):
        label = None if index else 'share of FLOPs left on average'
        axis.vlines(bound, place - 0.4, place + 0.4, color=PROBABILITY, linewidth=2, label=label)
    if bounded:
        axis.legend(loc='lower right', fontsize=8, frameon=False)
    axis.set_yticks(range(len(rows)), [row.name for row in rows])
    axis.set_ylim(len(rows) - 0.1, -0.6)  # the first on top, room for the legend below
    axis.set_xlabel('mean time of a training step, as a share of constant depth; thin lines: middle half of the steps')
    axis.set_title(
        f'{settings.model}, batch {settings.batch}, drop path {settings.rate}, {settings.precision}'
        f'{", channels_last" if settings.channels_last else ""}{", compiled" if settings.compile else ""}',
        fontsize=11,
    )
    save_figure(figure, path)


def plot_growth(settings: Settings, growths: Sequence[Growth], path: Path) -> None:
    """Draw the measured ratios, without the luck of the draw, against the shares of FLOPs that are left."""
    figure, ((axis,),) = new_figure(1, height=5)
    lowest = min(0.3, *(min(g.bound, g.without_luck) - 0.03 for g in growths))
    axis.plot([lowest, 1.05], [lowest, 1.05], color='black', linewidth=1, label='ratio = share of FLOPs')
    axis.fill_between([lowest, 1.05], [lowest - 0.05, 1.0], [lowest + 0.05, 1.1], color='0.9', label='within 0.05')
    for model, marker in zip(dict.fromkeys(g.model for g in growths), itertools.cycle('osD^vP*')):
        own = [g for g in growths if g.model == model]
        axis.plot([g.bound for g in own], [g.without_luck for g in own], marker, markersize=6, label=model, alpha=0.8)
    axis.set_xlabel('share of FLOPs left on average')
    axis.set_ylabel("step time, as a share of constant depth's")
    axis.legend(fontsize=8, frameon=False)
    axis.set_title(f'Batch mode, batch {settings.batch}, {settings.precision}', fontsize=11)
    save_figure(figure, path)
