"""Pictures, drawn with matplotlib, which is imported only when something is drawn."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .bench import Growth, Row, Settings
    from .costs import NetworkCost
    from .pruning import Pruning
    from .quickstart import Result

# The same colour for the same thing in every picture (Okabe and Ito's palette, safe for colour-blind readers).
KEPT, DROPPED, PROBABILITY, OTHER = '#0072B2', '#D5D9DE', '#D55E00', '#8C96A0'
METHODS = {
    'constant': OTHER,
    'linear-0.5': KEPT,
    'uniform-0.5': '#CC79A7',
    'row-0.5': '#E69F00',
    'subset-0.5': '#009E73',
}


def figure_class() -> Any:
    """matplotlib's `Figure`; called before long work that ends in a picture, too.

    Raises:
        ModuleNotFoundError: matplotlib is missing; the message says how to install it.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('matplotlib is needed to draw: pip install "sd-resnet[plot]"') from error
    return Figure


def new_figure(columns: int, height: float = 3.6, rows: int = 1, sharex: Any = False) -> tuple[Any, Any]:
    """A figure of README width and its axes."""
    figure = figure_class()(figsize=(9.6, height), dpi=150, layout='constrained')
    axes = figure.subplots(rows, columns, squeeze=False, sharex=sharex)
    for axis in axes.flat:
        axis.spines[['top', 'right']].set_visible(False)
    return figure, axes


def save_figure(figure: Any, path: Path) -> None:
    """Write a picture whole, or not at all."""
    part = path.with_name(f'{path.name}.part')
    try:
        figure.savefig(part, format=path.suffix.lstrip('.') or 'png')
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def plot_costs(cost: NetworkCost, path: Path) -> None:
    """Draw p_l and, per block, the FLOPs that a training step computes on average and those it saves."""
    figure, ((axis,),) = new_figure(1)
    blocks = range(1, len(cost.blocks) + 1)
    always = [b.shortcut_flops / 1e6 for b in cost.blocks]
    kept = [b.survival_prob * b.branch_flops / 1e6 for b in cost.blocks]
    saved = [(1 - b.survival_prob) * b.branch_flops / 1e6 for b in cost.blocks]
    axis.bar(blocks, always, 0.8, color=OTHER, label='shortcut, always computed')
    axis.bar(blocks, kept, 0.8, bottom=always, color=KEPT, label='branch, computed on average')
    bottom = [a + k for a, k in zip(always, kept)]
    axis.bar(blocks, saved, 0.8, bottom=bottom, color=DROPPED, label='branch, skipped on average')
    axis.set_xlabel('block l')
    axis.set_ylabel('FLOPs per image and forward pass (millions)')
    top = max(a + k + s for a, k, s in zip(always, kept, saved))
    axis.set_ylim(0, top * 1.28)
    axis.set_title(
        f'{cost.architecture}, {cost.image_size} px: {cost.expected_depth:.2f} of {len(cost.blocks)} blocks and '
        f'{cost.expected_share:.1%} of the FLOPs remain on average',
        fontsize=11,
    )
    right = axis.twinx()
    right.spines['top'].set_visible(False)
    marker = 'o' if len(cost.blocks) <= 60 else None
    right.plot(
        blocks,
        [b.survival_prob for b in cost.blocks],
        color=PROBABILITY,
        marker=marker,
        markersize=4,
        label='survival probability p_l',
    )
    right.set_ylim(0, 1.28)
    right.set_yticks([0, 0.25, 0.5, 0.75, 1])
    right.set_ylabel('survival probability', color=PROBABILITY)
    handles, labels = axis.get_legend_handles_labels()
    extra_handles, extra_labels = right.get_legend_handles_labels()
    right.legend(handles + extra_handles, labels + extra_labels, ncols=2, fontsize=8, loc='upper center', frameon=False)
    save_figure(figure, path)


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


def plot_pruning(records: Sequence[Pruning], path: Path) -> None:
    """Draw the error of pruned networks against FLOPs and latency."""
    figure, ((flops, latency),) = new_figure(2, height=4)
    for record, color in zip(records, itertools.cycle((KEPT, OTHER, PROBABILITY))):  # a constant-depth twin is grey
        points = record.points
        tested = [p for p in points if p.test_error is not None]
        for axis, xs, ends in (
            (flops, [p.flops / 1e6 for p in points], [p.flops / 1e6 for p in tested]),
            (latency, [p.latency for p in points], [p.latency for p in tested]),
        ):
            errors = [p.held_out_error for p in points]
            axis.plot(xs, errors, '.-', color=color, label=f'{record.model}, held-out training images')
            axis.plot(ends, [p.test_error for p in tested], 'D', color=color, markersize=5, label='test images')
    flops.set_xlabel('FLOPs of one image (millions)')
    latency.set_xlabel('latency of one image (ms, median)')
    for axis in (flops, latency):
        axis.set_ylabel('error (%)')
        axis.set_ylim(bottom=0)
    figure.legend(*flops.get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    figure.suptitle('Blocks removed one by one, from right to left', fontsize=11)
    save_figure(figure, path)


def plot_training(epochs: Sequence[Mapping[str, float]], path: Path, constant: bool = False) -> None:
    """Draw a run's losses and accuracies per epoch, as far as `summary.csv` has them; `constant` is constant depth."""
    figure, ((losses, accuracies),) = new_figure(2)
    color = OTHER if constant else KEPT
    _draw_training(losses, accuracies, epochs, color, 'top 1')
    if all('eval_top5' in epoch for epoch in epochs) and any(epoch['eval_top5'] < 100 for epoch in epochs):
        top5 = [epoch['eval_top5'] for epoch in epochs]
        accuracies.plot(_passes(epochs), top5, '--', color=color, label='top 5')
    for axis in (losses, accuracies):
        if axis.has_data():
            axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def _draw_training(
    losses: Any, accuracies: Any, epochs: Sequence[Mapping[str, float]], color: str, title: str, named: bool = True
) -> None:
    for axis, key, style, label in (
        (losses, 'train_loss', '--', "training, the recipe's loss and images" if named else None),
        (losses, 'eval_loss', '-', 'test images' if named else None),
        (accuracies, 'eval_top1', '-', title),
    ):
        if all(key in epoch for epoch in epochs):
            marker = 'o' if len(epochs) == 1 else None  # one point makes no line
            values = [epoch[key] for epoch in epochs]
            axis.plot(_passes(epochs), values, style, marker=marker, color=color, label=label)
    shown = [value for line in losses.get_lines() for value in line.get_ydata()]
    if shown and max(shown) > 10 * min(shown) > 0:
        losses.set_yscale('log')
    losses.set_ylabel('loss (cross entropy)')
    accuracies.set_ylabel('test accuracy (%)')
    for axis in (losses, accuracies):
        axis.set_xlabel('epoch')
        axis.xaxis.get_major_locator().set_params(integer=True)


def _passes(epochs: Sequence[Mapping[str, float]]) -> list[float]:
    """How often the images had been seen; timm's first epoch is 0, and not every one need be measured."""
    return [epoch.get('epoch', index) + 1 for index, epoch in enumerate(epochs)]


def plot_quickstart(results: Sequence[Result], path: Path) -> None:
    """Draw losses and accuracy per epoch, and how often each block survived beside its survival probability."""
    figure, ((losses, accuracies, survival),) = new_figure(3)
    for result, color in zip(results, (KEPT, OTHER)):
        _draw_training(losses, accuracies, result.history, color, result.title, result is results[0])
    best = max(epoch['eval_top1'] for result in results for epoch in result.history)
    accuracies.set_ylim(min(90.0, best - 5), 100.2)
    final = results[0].history[-1]['eval_top1']
    accuracies.annotate(
        f'{final:.2f} %', (len(results[0].history), final), (0, -28), textcoords='offset points', ha='right', fontsize=9
    )
    losses.set_ylim(top=losses.get_ylim()[1] * (5 if losses.get_yscale() == 'log' else 1.3))  # room for the legend
    losses.legend(fontsize=8, frameon=False, loc='upper right')
    accuracies.legend(fontsize=8, frameon=False, loc='center right')

    result = results[0]
    steps = sum(epoch['steps'] for epoch in result.history)
    observed = [sum(runs) / steps for runs in zip(*(epoch['executions'] for epoch in result.history))]
    blocks = range(1, len(observed) + 1)
    survival.bar(blocks, observed, 0.75, color=KEPT, alpha=0.85, label=f'observed in {steps:,} steps')
    survival.plot(blocks, result.survival_probs, 'o-', color=PROBABILITY, markersize=5, label='survival probability')
    survival.set_ylim(0, 1.3)
    survival.set_yticks([0, 0.25, 0.5, 0.75, 1])
    survival.set_xticks(list(blocks))
    survival.set_xlabel('block l')
    survival.set_ylabel('share of steps in which the branch ran')
    survival.legend(fontsize=8, frameon=False, loc='upper center')
    for axis, title in zip((losses, accuracies, survival), ('Loss', 'Accuracy', 'Survival of the blocks')):
        axis.set_title(title, fontsize=11)
    save_figure(figure, path)
