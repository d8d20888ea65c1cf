"""A training run as a picture, for its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..figures import KEPT, OTHER, new_figure, save_figure


def plot_training(epochs: Sequence[Mapping[str, float]], path: Path, constant: bool = False) -> None:
    """Draw a run's losses and accuracies per epoch, as far as `summary.csv` has them; `constant` is constant depth."""
    figure, ((losses, accuracies),) = new_figure(2)
    color = OTHER if constant else KEPT
    draw_training(losses, accuracies, epochs, color, 'top 1')
    if all('eval_top5' in epoch for epoch in epochs) and any(epoch['eval_top5'] < 100 for epoch in epochs):
        top5 = [epoch['eval_top5'] for epoch in epochs]
        accuracies.plot(_passes(epochs), top5, '--', color=color, label='top 5')
    for axis in (losses, accuracies):
        if axis.has_data():
            axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def draw_training(
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
