"""What `sd-resnet bench`, `growth` and `sweep` print and keep."""

from __future__ import annotations

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

from .bench import CONSTANT, TIMM, Growth, Row, Settings, ratio


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
