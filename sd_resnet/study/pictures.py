"""Pictures of the study, from its records. The same method has the same colour in all of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..figures import METHODS, new_figure, save_figure
from .records import CONSTANT, STOCHASTIC, Record, Records, final_error, sweep
from .report import drawn

TITLES = {CONSTANT: 'constant depth', STOCHASTIC: 'stochastic depth, $p_L$ = 0.5'}
SETTINGS = ((False, 'no augmentation'), (True, 'pad, crop and flip'))


def plot_study(records: Records, folder: Path) -> list[Path]:
    """Draw what there are records for.

    Args:
        records: The finished cells.
        folder: To write to.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    functions = {
        'curves': _plot_curves,
        'gradient': _plot_gradient,
        'sweep': _plot_sweep,
        'sub_networks': _plot_parts,
    }
    paths = {name: folder / f'{name}.png' for name in drawn(records)}
    for name, path in paths.items():
        functions[name](records, path)
    return list(paths.values())


def _plot_curves(records: Records, path: Path) -> None:
    """Fig. 3 of the paper: training loss and test error, thin lines for seeds."""
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, axes = new_figure(2, height=6.2, rows=2, sharex='col')
    for (augmented, setting), (errors, losses) in zip(SETTINGS, axes.T):
        for method, title in TITLES.items():
            of_method = records.of(method, augmented)
            _draw(errors, of_method, 'test_error', METHODS[method], title, marker='.')
            _draw(losses, of_method, 'train_loss', METHODS[method], title)
        errors.set_title(setting, fontsize=11)
        errors.set_ylabel('test error (%)')
        losses.set_ylabel('training loss (cross entropy)')
        losses.set_yscale('log')
        losses.set_xlabel('epoch')
        errors.set_yscale('log')
        errors.yaxis.set_major_locator(FixedLocator([10, 12, 15, 20, 30, 50, 90]))
        errors.yaxis.set_major_formatter('{x:g}')
        errors.yaxis.set_minor_locator(NullLocator())
        for axis in (errors, losses):
            if axis.has_data():
                axis.legend(fontsize=8, frameon=False)
            else:
                axis.text(0.5, 0.5, 'no record yet', ha='center', transform=axis.transAxes)
    save_figure(figure, path)


def _plot_gradient(records: Records, path: Path) -> None:
    """Fig. 7 of the paper."""
    figure, axes = new_figure(2)
    for (augmented, setting), axis in zip(SETTINGS, axes.flat):
        for method, title in TITLES.items():
            _draw(axis, records.of(method, augmented), 'gradient', METHODS[method], title, smooth=5)
        axis.set_yscale('log')
        axis.set_xlabel('epoch')
        axis.set_ylabel('mean absolute gradient, first convolution')
        axis.set_title(setting, fontsize=11)
        if axis.has_data():
            axis.legend(fontsize=8, frameon=False)
        else:
            axis.text(0.5, 0.5, 'no record yet', ha='center', transform=axis.transAxes)
    save_figure(figure, path)


def _plot_sweep(records: Records, path: Path) -> None:
    """Fig. 8 of the paper."""
    figure, ((axis,),) = new_figure(1)
    for schedule, marker in (('linear', 'o'), ('uniform', 's')):
        points, color = sweep(records, schedule), METHODS[f'{schedule}-0.5']
        axis.plot(list(points), list(points.values()), f'{marker}-', color=color, markersize=6, label=schedule)
    hollow = {'markersize': 9, 'markerfacecolor': 'none', 'markeredgewidth': 1.5}  # linear's point shows through
    for method, label in (('row-0.5', "row mode, timm's rule"), ('subset-0.5', 'subset mode, linear')):
        for record in records.of(method):
            axis.plot(0.5, final_error(record), 'D', color=METHODS[method], **hollow, label=label)
    constant = sweep(records, 'linear').get(1.0)
    if constant is not None:
        axis.axhline(constant, color=METHODS[CONSTANT], linestyle='--', label='constant depth')
    axis.set_xlabel('survival probability of the last block, $p_L$')
    axis.set_ylabel('test error (%)')
    axis.set_title('Seed 0, no augmentation', fontsize=11)
    axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def _plot_parts(records: Records, path: Path) -> None:
    """Averages of sub-networks, and blocks removed at test time."""
    figure, ((ensemble, removal),) = new_figure(2)
    for method, title in TITLES.items():
        analysis = records.analysis(method)
        if analysis is None:
            continue
        color = METHODS[method]
        means = {int(n): statistics.fmean(errors) for n, errors in analysis['averages'].items()}
        ensemble.plot(list(means), list(means.values()), 'o-', color=color, markersize=5, label=f'{title}: average')
        ensemble.axhline(analysis['full'], color=color, linestyle='--', linewidth=1, label=f'{title}: whole net')
        removed = {0: [analysis['full']], **{int(n): errors for n, errors in analysis['removed'].items()}}
        for n, errors in removed.items():
            removal.plot([n] * len(errors), errors, '.', color=color, alpha=0.35, markersize=5)
        means = {n: statistics.fmean(errors) for n, errors in removed.items()}
        removal.plot(list(means), list(means.values()), 'o-', color=color, markersize=5, label=title)
    ensemble.set_xscale('log', base=2)
    ensemble.set_xticks([1, 2, 4, 8, 16, 32], ['1', '2', '4', '8', '16', '32'])
    ensemble.set_yscale('log')
    ensemble.yaxis.set_major_formatter('{x:g}')
    ensemble.yaxis.set_minor_formatter('{x:g}')
    ensemble.set_xlabel('sub-networks in the average')
    ensemble.set_ylabel('test error (%)')
    ensemble.set_title('Sampled sub-networks, $p_L$ = 0.5', fontsize=11)
    removal.set_xlabel('blocks removed at test time')
    removal.set_ylabel('test error (%)')
    removal.set_title('Blocks removed', fontsize=11)
    for axis in (ensemble, removal):
        axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def _draw(
    axis: Any, records: Sequence[Record], key: str, color: str, title: str, smooth: int = 1, marker: str = ''
) -> None:
    """Each seed thin, their mean thick; epochs without a value are left out."""
    curves = []
    for record in records:
        values = record['epochs'][key]
        points = {epoch: value for epoch, value in enumerate(values, start=1) if value is not None}
        numbers = list(points.values())
        curve = [statistics.fmean(numbers[max(0, i - smooth + 1) : i + 1]) for i in range(len(numbers))]
        curves.append(curve)
        axis.plot(list(points), curve, color=color, linewidth=0.6, alpha=0.5, marker=marker, markersize=3)
    if curves:
        mean = [statistics.fmean(values) for values in zip(*curves)]
        axis.plot(list(points), mean, color=color, linewidth=1.8, label=title)
