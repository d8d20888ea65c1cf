"""What `sd-resnet bench` prints, draws and keeps."""

import itertools
import json
import math
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from ..figures import KEPT, OTHER, PROBABILITY, new_figure, save_figure
from .measure import CONSTANT_DEPTH, TIMM, Contestant, Race, Settings

_COLUMNS = ('mean ms', 'median', 'spread', 'ratio', 'median', 'no luck', 'FLOPs', 'to timm', 'saved', 'most')


def table(settings: Settings, races: Sequence[Race]) -> str:
    """Times, ratios, FLOPs and memory, race by race; of models at several rates also the rate that breaks even."""
    lines = [f'{_conditions(settings)}, {settings.steps} steps', environment()]
    for race in races:
        lines += ['', _row(f'{race.model}, drop path {race.rate:g}', _COLUMNS)]
        constant, timms = race.contestants[CONSTANT_DEPTH], race.contestants.get(TIMM)
        for name, each in race.contestants.items():
            low, median, high = statistics.quantiles(each.seconds, n=4)
            saved = [kept / constant.saved_bytes[0] for kept in each.saved_bytes]
            shares = [each.ratio(constant), each.ratio(constant, statistics.median), each.ratio_without_luck(constant)]
            shares += [each.bound, each.ratio(timms) if timms else None]
            shares += [statistics.fmean(saved), max(saved)] if saved else [None, None]
            times = [f'{seconds * 1e3:.1f}' for seconds in (statistics.fmean(each.seconds), median, high - low)]
            lines.append(_row(name, times + ['-' if share is None else f'{share:.3f}' for share in shares]))
    lines.append('')
    modes = [mode for mode in settings.modes if mode != 'row' and len(settings.rates) > 1]
    for model in settings.models if modes else ():
        own = [race for race in races if race.model == model]
        texts = {None: 'unknown', math.inf: 'never'}
        found = ((mode, break_even(own, mode)) for mode in modes)
        said = ', '.join(f'{mode} {texts.get(rate) or f"from {rate:.3f}"}' for mode, rate in found)
        lines.append(f'break-even of {model}: {said}')
    lines += [
        'ratio, median: of step times to constant depth; no luck: the ratio, less what the draw left out or added;',
        "FLOPs: share of FLOPs left on average, the bound; to timm: ratio to timm's drop_path_rate;",
        'saved, most: bytes kept for backward on average and at most, as a share of constant depth;',
        'spread: between the quartiles; break-even: on the line through the medians over the rate of the dropped work',
    ]
    return '\n'.join(lines)


def _row(name: str, cells: Sequence[str]) -> str:
    return f'{name:<36}' + ''.join(f'{cell:>8}' for cell in cells)


def break_even(races: Sequence[Race], mode: str) -> float | None:
    """The rate from which on a step is quicker than constant depth's, on the line through the medians.

    It is 0 if every rate pays, infinity if none does, and None if the rates do not differ. What counts is the rate of
    the work that was dropped: where none was, in two rows at rate 0.05, for example, that is 0.
    """
    rates, medians = [], []
    for race in races:
        own = race.contestants[mode]
        dropped = 0.0 if own.bound == 1 else (1 - (own.observed or 0)) / (1 - (own.bound or 0))
        rates.append(round(race.rate * dropped, 6))
        medians.append(own.ratio(race.contestants[CONSTANT_DEPTH], statistics.median))
    if len(set(rates)) == 1:
        return None
    slope, height = statistics.linear_regression(rates, medians)
    if slope >= 0:
        return 0.0 if max(medians) < 1 else math.inf
    rate = (1 - height) / slope
    return math.inf if rate >= 1 else max(rate, 0.0)


def _conditions(settings: Settings) -> str:
    size, schedule = settings.size or 'default', settings.schedule or 'of the model'
    further = ', channels_last' * settings.channels_last + ', compiled' * settings.compile
    return f'batch {settings.batch}, {size} px, schedule {schedule}, {settings.precision}{further}'


def environment() -> str:
    """Versions and processor, for the record."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    versions = f'torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}'
    return f'{versions}, {device}, {torch.get_num_threads()} threads'


def save_record(settings: Settings, races: Sequence[Race], path: Path) -> None:
    """Every step's time as JSON."""
    record = {'environment': environment(), 'settings': asdict(settings), 'races': [asdict(race) for race in races]}
    path.write_text(json.dumps(record, indent=1) + '\n')


def plot(settings: Settings, races: Sequence[Race], path: Path) -> None:
    """Draw mean step times as shares of constant depth's: of one race as bars, of several over the FLOPs left."""
    first, one = races[0], len(races) == 1
    figure, ((axis,),) = new_figure(1, height=0.5 * len(first.contestants) + 1.4 if one else 5)
    axis.set_title(f'{first.model}, drop path {first.rate:g}, ' * one + _conditions(settings), fontsize=11)
    if one:
        _draw_bars(axis, first.contestants)
    else:
        _draw_shares(axis, races)
    save_figure(figure, path)


def _draw_bars(axis: Any, contestants: dict[str, Contestant]) -> None:
    constant = contestants[CONSTANT_DEPTH]
    bounds = [(each.bound, place) for place, each in enumerate(contestants.values()) if (each.bound or 1) < 1]
    for place, each in enumerate(contestants.values()):
        ratio, (low, _, high) = each.ratio(constant), statistics.quantiles(each.seconds, n=4)
        axis.barh(place, ratio, 0.7, color=OTHER if each.bound is None else KEPT)
        mean = statistics.fmean(constant.seconds)
        axis.hlines(place, low / mean, high / mean, color='black', linewidth=1)
        axis.text(0.01, place, f'{ratio:.2f}', va='center', color='white', fontsize=9)
    if bounds:
        x, y = np.array(bounds).T
        axis.vlines(x, y - 0.4, y + 0.4, color=PROBABILITY, linewidth=2, label='share of FLOPs left on average')
        axis.legend(loc='lower right', fontsize=8, frameon=False)
    axis.set_yticks(range(len(contestants)), list(contestants))
    what = 'mean time of a training step, as a share of constant depth; thin lines: middle half of the steps'
    axis.set(xlabel=what, ylim=(len(contestants) - 0.1, -0.6))  # the first on top, room for the legend below


def _draw_shares(axis: Any, races: Sequence[Race]) -> None:
    points: dict[str, list[tuple[float, float]]] = {}
    for race in races:
        for name, each in race.contestants.items():
            share = each.ratio_without_luck(race.contestants[CONSTANT_DEPTH])
            if each.bound is not None and share is not None:
                points.setdefault(f'{race.model}, {name}', []).append((each.bound, share))
    lowest = min(0.3, *(min(point) - 0.03 for own in points.values() for point in own))
    axis.plot([lowest, 1.05], [lowest, 1.05], color='black', linewidth=1, label='ratio = share of FLOPs')
    axis.fill_between([lowest, 1.05], [lowest - 0.05, 1.0], [lowest + 0.05, 1.1], color='0.9', label='within 0.05')
    for (label, own), marker in zip(points.items(), itertools.cycle('osD^vP*')):
        axis.plot(*zip(*own), marker, markersize=6, label=label, alpha=0.8)
    axis.set(xlabel='share of FLOPs left on average', ylabel="step time without luck, share of constant depth's")
    axis.legend(fontsize=8, frameon=False)
