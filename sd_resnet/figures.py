"""Pictures, drawn with matplotlib, which is imported only when something is drawn."""

from pathlib import Path
from typing import Any

from .files import written_whole

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
    with written_whole(path) as part:
        figure.savefig(part, format=path.suffix.lstrip('.') or 'png')
