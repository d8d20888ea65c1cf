"""The picture of docs/architecture.md, drawn from the package's imports: `python -m docs.architecture`, in a clone."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

from matplotlib.patches import FancyBboxPatch

from sd_resnet.figures import DROPPED, KEPT, OTHER, PROBABILITY, new_figure, save_figure
from tests.imports import BASE, INIT, ORDER, count_lines, package_sources, wing_imports, wing_of

# Inches. A floor is a box and the space above it.
WIDTH, FLOOR, BOX, ROOM, GAP, MARGIN, BETWEEN = 9.6, 0.86, 0.6, 0.24, 0.05, 0.1, 0.3
LETTER = 0.06  # of small print
PALE, GREY = '#EEF3F8', '#55606B'
LEGEND = """An arrow goes from what is imported
to what imports it. Where a chain of
arrows leads there anyway, none is drawn.
White: what every wing but core may use.
{lines:,} lines in all."""


class Wing:
    """A box: name, purpose and lines, and below them its rooms side by side; or the purpose, if it is one room."""

    def __init__(self, name: str, sources: dict[str, str]) -> None:
        self.name = name
        self.title = 'sd_resnet' if name == INIT else name
        self.rooms = sorted({module.split('.')[-1] for module in sources} - {INIT, name})
        self.lines = sum(map(count_lines, sources.values()))
        docstring = ast.get_docstring(ast.parse(sources.get(f'{name}.{INIT}') or sources[name])) or ''
        first = re.split(r'[:,.;] |\.$', docstring.splitlines()[0])[0].replace('`', '')
        self.purpose = 'Public names' if name == INIT else first
        title, purpose = 0.09 * len(self.title) + 0.75, LETTER * len(self.purpose)
        rooms = sum(self.room_width(room) + GAP for room in self.rooms) - GAP
        self.width = 2 * MARGIN + (max(title + purpose, rooms) if self.rooms else max(title, purpose))
        self.left = self.bottom = 0.0  # until `place`

    def room_width(self, room: str) -> float:
        return LETTER * max(len(room), 5) + 0.14

    @property
    def right(self) -> float:
        return self.left + self.width


def read_wings() -> dict[str, Wing]:
    found: dict[str, dict[str, str]] = {}
    for module, source in package_sources().items():
        found.setdefault(wing_of(module), {})[module] = source
    return {name: Wing(name, sources) for name, sources in found.items()}


def place(wings: dict[str, Wing]) -> list[list[Wing]]:
    """One floor for each place in the order, in the middle; the base rooms share the lowest."""
    upper = [names.split('|') for names in ORDER.split() if names not in BASE]
    floors = [[wings[name] for name in names] for names in (BASE, *upper)]
    for number, floor in enumerate(floors):
        left = (WIDTH - sum(wing.width + BETWEEN for wing in floor) + BETWEEN) / 2
        for wing in floor:
            wing.left, wing.bottom = left, number * FLOOR
            left = wing.right + BETWEEN
    return floors


def arrows() -> list[tuple[str, str]]:
    """Pairs (imported, importing) of wings: all but those that a chain of others stands for, and the base rooms."""
    imports = {wing: others - set(BASE) for wing, others in wing_imports(package_sources()).items()}

    def reached(wing: str) -> set[str]:
        return imports[wing].union(*map(reached, imports[wing]))

    return [
        (other, wing)
        for wing, others in imports.items()
        for other in others
        if not any(other in reached(third) for third in others)
    ]


def draw_box(axis: Any, left: float, bottom: float, width: float, height: float, **colours: Any) -> None:
    style = 'round,pad=0,rounding_size=0.05'
    axis.add_patch(FancyBboxPatch((left, bottom), width, height, boxstyle=style, **colours))


def draw_wing(axis: Any, wing: Wing) -> None:
    base = wing.name in BASE
    colours = {'facecolor': 'white' if base else PALE, 'edgecolor': OTHER if base else KEPT}
    draw_box(axis, wing.left, wing.bottom, wing.width, BOX, linewidth=1, **colours)
    first, second = wing.bottom + BOX - 0.15, wing.bottom + 0.07 + ROOM / 2
    start = wing.left + MARGIN
    title = axis.text(start, first, wing.title, fontsize=9.5, fontweight='bold', va='center')
    axis.text(wing.right - MARGIN, first, f'{wing.lines:,} lines', fontsize=7, color=GREY, va='center', ha='right')
    small = {'fontsize': 7, 'color': GREY, 'va': 'center'}
    if not wing.rooms:
        axis.text(start, second, wing.purpose, **small)
        return
    axis.annotate(wing.purpose, (1, 0.5), (8, 0), xycoords=title, textcoords='offset points', **small)
    taken = sum(wing.room_width(room) + GAP for room in wing.rooms) - GAP
    spare = (wing.width - 2 * MARGIN - taken) / len(wing.rooms)
    for room in wing.rooms:
        width = wing.room_width(room) + spare
        draw_box(axis, start, second - ROOM / 2, width, ROOM, facecolor='white', edgecolor=DROPPED, linewidth=0.8)
        axis.text(start + width / 2, second, room, fontsize=7, va='center', ha='center')
        start += width + GAP


def draw_arrow(axis: Any, low: Wing, high: Wing, wings: list[Wing]) -> None:
    """Straight up, past the boxes of the floors between, and into the side of a box that is not above."""
    passed = [wing for wing in wings if low.bottom < wing.bottom < high.bottom]
    steps = [low.left + MARGIN + step * 0.02 for step in range(int((low.width - 2 * MARGIN) / 0.02))]
    free = [x for x in steps if not any(wing.left - MARGIN < x < wing.right + MARGIN for wing in passed)]
    middle = (max(low.left, high.left) + min(low.right, high.right)) / 2
    x = min(free or steps, key=lambda step: abs(step - middle))
    start, end, bend = (x, low.bottom + BOX), (x, high.bottom), 'arc3'
    if not high.left < x < high.right:
        end, bend = (
            (high.left if x < high.left else high.right, high.bottom + BOX / 2),
            'angle,angleA=90,angleB=0,rad=4',
        )
    style = {'arrowstyle': '-|>', 'color': PROBABILITY, 'linewidth': 1.4, 'shrinkA': 0, 'shrinkB': 0}
    axis.annotate('', end, start, arrowprops={**style, 'connectionstyle': bend}, zorder=0)


def main() -> None:
    wings = read_wings()
    floors = place(wings)
    height = len(floors) * FLOOR
    figure, ((axis,),) = new_figure(1, height)
    axis.set(xlim=(0, WIDTH), ylim=(-0.1, height - 0.1))
    axis.axis('off')
    for wing in wings.values():
        draw_wing(axis, wing)
    for low, high in arrows():
        draw_arrow(axis, wings[low], wings[high], list(wings.values()))
    lines = sum(wing.lines for wing in wings.values())
    axis.text(0, height - FLOOR + BOX, LEGEND.format(lines=lines), fontsize=7, color=GREY, va='top', linespacing=1.5)
    save_figure(figure, Path(__file__).with_suffix('.png'))


if __name__ == '__main__':
    main()
