"""The records of the study's finished cells, and what is read from them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cells import CELLS, Cell, read_record

Record = dict[str, Any]
CONSTANT, STOCHASTIC = 'constant', 'linear-0.5'


class Records:
    """The finished cells.

    Args:
        folder: Of the records.
        cells: What the study consists of.

    Raises:
        ValueError: A record is damaged, another cell's, or of another scale than the rest.
    """

    def __init__(self, folder: Path, cells: Sequence[Cell] = CELLS) -> None:
        self.found: dict[str, Record] = {}
        self.missing: list[str] = []
        for cell in cells:
            path = folder / f'{cell.name}.json'
            if not path.is_file():
                self.missing.append(cell.name)
                continue
            self.found[cell.name] = read_record(path, cell)
        if len({json.dumps(record['scale'], sort_keys=True) for record in self.found.values()}) > 1:
            raise ValueError(f'{folder} holds records of several scales; keep one scale in a folder')

    def of(self, method: str, augmented: bool = False) -> list[Record]:
        """The records of one method, by seed."""
        return [r for r in self.found.values() if r['method'] == method and r['augmented'] == augmented]

    def pairs(self, augmented: bool = False) -> list[tuple[Record, Record]]:
        """Constant depth and p_L = 0.5 of the same seed."""
        constant = {record['seed']: record for record in self.of(CONSTANT, augmented)}
        return [(constant[r['seed']], r) for r in self.of(STOCHASTIC, augmented) if r['seed'] in constant]

    def analysis(self, method: str) -> dict[str, Any] | None:
        """What was measured of sub-networks and removed blocks; of one seed, None for no record."""
        return next((record['analysis'] for record in self.of(method) if record['analysis']), None)


def final_error(record: Record) -> float:
    """In percent, after the last epoch: no epoch is chosen on the test set."""
    return record['epochs']['test_error'][-1]


def cpu_seconds(record: Record) -> float:
    """Of all training steps."""
    return math.fsum(record['epochs']['cpu_seconds'])


def observed_depth(record: Record) -> float:
    """Mean number of branches run in a training step."""
    return statistics.fmean(record['epochs']['depth'])


def late_gradient(record: Record) -> float:
    """Mean absolute gradient of the first convolution in the last quarter of the training."""
    gradient = record['epochs']['gradient']
    return statistics.fmean(gradient[len(gradient) * 3 // 4 :])


def sweep(records: Records, schedule: str) -> dict[float, float]:
    """Test error in percent over p_L, of seed 0 without augmentation; constant depth is p_L = 1."""
    points = {
        float(record['method'].rpartition('-')[2]): final_error(record)
        for record in records.found.values()
        if record['method'].startswith(f'{schedule}-') and record['seed'] == 0 and not record['augmented']
    }
    points.update((1.0, final_error(record)) for record in records.of(CONSTANT) if record['seed'] == 0)
    return dict(sorted(points.items()))
