"""What `sd-resnet bench` prints, draws and keeps."""

import json
import math
import platform
import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict
from itertools import chain, cycle
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch

from ..figures import KEPT, METHODS, OTHER, PROBABILITY, new_figure, save_figure
from .measure import CONSTANT_DEPTH, TIMM, Race, Settings

_SHARES = ('ratio', 's.e.', 'median', 'no luck', 'FLOPs', 'saved', 'most', 'peak')
_COLUMNS = {'ms': '.1f', **dict.fromkeys(_SHARES, '.3f'), 'MiB': ',.0f'}  # and their formats
_LEGEND = """
ratio: of mean step times to constant depth in the same run (of DINOv2 and Composer, to their own code undropped), in
the mean over runs; s.e.: its standard error over runs; median: the same of medians; no luck: the ratio, less what the
draw left out or added; FLOPs: share left on average, the floor; saved, most: bytes kept for backward on average and at
most, as a share; peak, MiB: memory of a step at most"""
_BREAK_EVEN = (
    '\nbreak-even: where a step is as quick as at constant depth, on the line through the medians over the dropped work'
)

_COLOURS = {'batch': KEPT, 'subset': METHODS['subset-0.5'], 'row': METHODS['row-0.5'], TIMM: OTHER}
_FLOOR = 'share of FLOPs left on average, the floor'
_AXES = {
    'rate': 'drop path rate, 1 - p_L',
    'batch': 'images of a step',
    'size': 'pixels, height and width',
    'model': '',
}


def table(settings: Settings, races: Sequence[Race]) -> str:
    """Times, ratios, FLOPs and memory, race by race; of three rates or more also the one that breaks even."""
    runs = f' in each of {settings.seeds} runs' * (settings.seeds > 1)
    rows = [[(name, _figures(name, race)) for name in race.contestants] for race in races]
    columns = [column for column in _COLUMNS if any(column in figures for own in rows for _, figures in own)]
    lines = [
        f'{_conditions(settings)}, {settings.steps} steps{runs}',
        environment(settings.device),
        '',
        _row('', columns),
    ]
    for race, own in zip(races, rows):
        lines.append(_title(race))
        for name, figures in own:
            cells = [format(figures[each], _COLUMNS[each]) if each in figures else '-' for each in columns]
            lines.append(_row(f'  {name}', cells))
    skips = [mode for mode in settings.modes if mode != 'row']
    groups = _grouped(races, 'model', 'batch', 'size') if skips and settings.steps and len(settings.rates) > 2 else {}
    lines += [''] * bool(groups)
    for group in groups.values():
        said = ', '.join(f'{mode} {break_even(group, mode)}' for mode in skips)
        lines.append(f'break-even of {_title(group[0], ("rate",))}: {said}')
    return '\n'.join((*lines, _LEGEND + _BREAK_EVEN * bool(groups)))


def _figures(name: str, race: Race) -> dict[str, float]:
    """By columns, what there is to say of a contestant."""
    each, constant = race.contestants[name], race.undropped(name)
    found = {'FLOPs': each.bound}
    if each.seconds:
        found['ms'] = statistics.fmean(chain.from_iterable(each.seconds)) * 1e3
        found |= {'ratio': each.ratio(constant), 's.e.': standard_error(each.ratios(constant))}
        found['median'] = each.ratio(constant, statistics.median)
        if without := each.ratios_without_luck(constant):
            found['no luck'] = statistics.fmean(without)
    if each.saved_bytes:
        most = constant.saved_bytes[0]
        found |= {'saved': statistics.fmean(each.saved_bytes) / most, 'most': max(each.saved_bytes) / most}
    if each.peak_bytes:
        peak = max(each.peak_bytes)
        found |= {'peak': peak / max(constant.peak_bytes), 'MiB': peak / 2**20}
    return {column: figure for column, figure in found.items() if figure is not None}


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None of a single one."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def _row(name: str, cells: Sequence[str]) -> str:
    return f'{name:<36}' + ''.join(f'{cell:>8}' for cell in cells)


def _title(race: Race, unsaid: Collection[str] = ()) -> str:
    said = {
        'model': race.model,
        'rate': f'drop path {race.rate:g}',
        'batch': f'batch {race.batch}',
        'size': f'{race.size} px',
    }
    return ', '.join(text for key, text in said.items() if key not in unsaid)


def _grouped(races: Sequence[Race], *keys: str) -> dict[tuple[Any, ...], list[Race]]:
    groups: dict[tuple[Any, ...], list[Race]] = {}
    for race in races:
        groups.setdefault(tuple(getattr(race, key) for key in keys), []).append(race)
    return groups


def break_even(races: Sequence[Race], mode: str) -> str:
    """The rate from which on a step is quicker than constant depth's, on the line through the medians.

    It is `from` a rate, `below` the lowest that was measured, `never`, or `unknown` if they do not differ. What counts
    is the rate of the work that was dropped: where none was, in two rows at rate 0.05, for example, that is 0.
    """
    rates, medians = [], []
    for race in races:
        own = race.contestants[mode]
        left = statistics.fmean(own.observed or [own.bound or 0])
        dropped = 0.0 if own.bound == 1 else (1 - left) / (1 - (own.bound or 0))
        rates.append(round(race.rate * dropped, 6))
        medians.append(own.ratio(race.contestants[CONSTANT_DEPTH], statistics.median))
    if len(set(rates)) == 1:
        return 'unknown'
    slope, height = statistics.linear_regression(rates, medians)
    lowest, rate = min(race.rate for race in races), 0.0 if max(medians) < 1 else 1.0
    if slope < 0:
        rate = (1 - height) / slope
    if rate >= 1:
        return 'never'
    return f'below {lowest:g}' if rate < lowest else f'from {max(rate, 0):.2f}'


def _conditions(settings: Settings) -> str:
    further = ', channels_last' * settings.channels_last + ', compiled' * settings.compile
    return f'schedule {settings.schedule or "of the model"}, {"bfloat16" if settings.amp else "float32"}{further}'


def environment(device: str = 'cpu') -> str:
    """Versions, and processor or card, for the record."""
    name = platform.machine() if device == 'cpu' else torch.cuda.get_device_name(device)
    versions = f'torch {torch.__version__}, timm {timm.__version__}, Python {platform.python_version()}'
    return f'{versions}, {name}, {torch.get_num_threads()} threads'


def save_record(settings: Sequence[Settings], races: Sequence[Race], path: Path, breaks: Any = None) -> None:
    """Every step's time as JSON, and what breaks, where that was tried."""
    device = environment(settings[0].device)
    record = {'environment': device, 'settings': [*map(asdict, settings)], 'races': [*map(asdict, races)]}
    record |= {'breaks': breaks} if breaks else {}
    path.write_text(json.dumps(record, indent=1) + '\n')


def plot(settings: Settings, panels: Sequence[Sequence[Race]], path: Path) -> None:
    """Draw step times as shares of constant depth's, a panel each: of one race as bars, of several over what varies."""
    single = len(panels[0]) == 1
    figure, (axes,) = new_figure(len(panels), height=0.5 * len(panels[0][0].contestants) + 1.8 if single else 4.4)
    figure.suptitle(_conditions(settings), fontsize=9)
    for axis, races in zip(axes, panels):
        axis.sharey(axes[0])
        (_draw_bars if single else _draw_shares)(axis, races)
        unsaid = () if single else _varying(races)
        axis.set_title(_title(races[0], unsaid), fontsize=9)
    if not single:
        axes[0].set_ylabel('time of a step, to constant depth,\nwithout the luck of the draw')
        known = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels())}
        figure.legend(known.values(), known, loc='outside lower center', ncols=4, fontsize=8, frameon=False)
    save_figure(figure, path)


def _draw_bars(axis: Any, races: Sequence[Race]) -> None:
    contestants = races[0].contestants
    for place, (name, each) in enumerate(contestants.items()):
        if each.seconds:
            ratios = each.ratios(races[0].undropped(name))
            ratio = statistics.fmean(ratios)
            axis.barh(place, ratio, 0.7, xerr=standard_error(ratios), color=_COLOURS.get(name, OTHER))
            axis.text(0.01, place, f'{ratio:.2f}', va='center', color='white', fontsize=9)
        if (each.bound or 1) < 1:
            axis.vlines(each.bound, place - 0.4, place + 0.4, color=PROBABILITY, linewidth=2, label=_FLOOR)
    axis.set_yticks(range(len(contestants)), list(contestants))
    axis.set(xlabel="mean time of a training step, share of constant depth's", ylim=(len(contestants) - 0.1, -0.6))
    known = dict(zip(*reversed(axis.get_legend_handles_labels())))
    axis.legend(known.values(), known, loc='lower right', fontsize=8, frameon=False)


def _varying(races: Sequence[Race]) -> list[str]:
    """What differs between races, first what is drawn along the axis: the model if it is another one in each."""
    varying = [key for key in _AXES if len({getattr(race, key) for race in races}) > 1]
    return sorted(varying, key=lambda key: key != 'model') if len(_grouped(races, 'model')) == len(races) else varying


def _draw_shares(axis: Any, races: Sequence[Race]) -> None:
    along, *others = _varying(races)
    others = [] if along == 'model' else others
    ticks = list(dict.fromkeys(getattr(race, along) for race in races))
    ticks = ticks if along == 'model' else sorted(ticks)
    axis.axhline(1, color='black', linewidth=1)
    for marker, group in zip(cycle('osD^vP*'), _grouped(races, *others).values()):
        suffix = ''.join(f', {_title(group[0], _AXES.keys() - {key})}' for key in others)
        points: dict[str, list[tuple[int, float, float]]] = {}
        for race in sorted(group, key=lambda race: ticks.index(getattr(race, along))):
            x = ticks.index(getattr(race, along))
            for name, each in race.contestants.items():
                if name != CONSTANT_DEPTH and each.seconds:
                    constant = race.undropped(name)
                    ratios = each.ratios_without_luck(constant) or each.ratios(constant)
                    points.setdefault(name, []).append((x, statistics.fmean(ratios), standard_error(ratios) or 0))
            bound = min(each.bound for each in race.contestants.values() if each.bound is not None)
            points.setdefault(_FLOOR, []).append((x, bound, 0))
        for name, own in points.items():
            x, y, error = np.array(own).T
            look = dict(color=PROBABILITY, fmt='_--', markersize=9) if name == _FLOOR else dict(fmt=f'{marker}-')
            axis.errorbar(x, y, error, **dict(color=_COLOURS.get(name), markersize=5, label=name + suffix) | look)
    slanted = dict(rotation=90, fontsize=7) if along == 'model' else {}
    axis.set_xticks(range(len(ticks)), [str(tick).removeprefix('sd_') for tick in ticks], **slanted)
    axis.set_xlabel(_AXES[along])
