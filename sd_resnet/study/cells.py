"""What the study runs, cells, each one training run; and its records of them, one JSON file for each finished cell.

Everything here was fixed before any result was seen: sd_resnet32_cifar (L = 15) on 2,000 images of Fashion-MNIST for
150 epochs, because stochastic depth needs many epochs and its gain shows where the constant-depth net overfits. timm's
script drops the last, incomplete batch of an epoch: 15 steps of 128 images. Added when seeds 0 to 2, which both methods
share, had left the first claim undecided: three seeds more of each method without augmentation, none of them shared.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from ..analysis.datasets import NAME
from ..files import written_whole

COMMAND = 'python -m sd_resnet.study'
CONSTANT, STOCHASTIC = 'constant', 'linear-0.5'  # the methods that most claims compare


@dataclass(frozen=True)
class Scale:
    """What all cells share."""

    model: str = 'sd_resnet32_cifar'
    images: int = 2000  # for training, as many of each class
    batch: int = 128
    epochs: int = 150  # the learning rate is divided by 10 at 1/2 and 3/4
    val_interval: int = 10  # test every so many epochs
    networks: int = 32  # sampled sub-networks of the ensemble
    removals: int = 5  # random sets of removed blocks for each number of them

    def arguments(self) -> list[str]:
        """Of timm's `train.py`; bias and BatchNorm have no weight decay there."""
        return (
            f'--dataset {NAME} --val-split test --model {self.model} --num-classes 10 --in-chans 1 '
            '--input-size 1 28 28 --mean 0.286 --std 0.353 --crop-pct 1.0 --interpolation bilinear '
            f'-b {self.batch} --opt sgd --lr 0.1 --momentum 0.9 --weight-decay 1e-4 --smoothing 0 '
            f'--sched multistep --decay-milestones {self.epochs // 2} {self.epochs * 3 // 4} --decay-rate 0.1 '
            f'--warmup-epochs 0 --epochs {self.epochs} --val-interval {self.val_interval} '
            '--amp --amp-dtype bfloat16 --channels-last --device cpu --no-prefetcher --workers 1 '
            '--checkpoint-hist 1 --log-interval 1000'
        ).split()


@dataclass(frozen=True)
class Cell:
    """One training run. Cells of one method and augmentation differ in their seed alone."""

    method: str  # how blocks are dropped
    flags: tuple[str, ...]  # the method's arguments of `train.py`
    seed: int = 0  # of weights, order, augmentation and decisions
    augmented: bool = False  # the paper's: pad by 4 pixels, crop at a random place, flip; otherwise none
    analysed: bool = False  # measure sub-networks, their averages, and the net with blocks removed, too

    @property
    def name(self) -> str:
        """Of its record."""
        return f'{"augmented-" * self.augmented}{self.method}-seed{self.seed}'

    def arguments(self) -> list[str]:
        """What it adds to the scale's."""
        flags = [*self.flags] if '--model-kwargs' in self.flags else [*self.flags, '--model-kwargs']
        if 'drop_path_rescale=train' not in flags:
            flags.append('drop_path_rescale=test')  # the paper's letter
        crop = '--train-crop-mode rrc --scale 0.605 0.605 --ratio 1 1 --hflip 0.5 --color-jitter 0'
        return [*flags, '--seed', str(self.seed), *(crop if self.augmented else '--no-aug').split()]


def _drop(p_last: float, *model_kwargs: str) -> tuple[str, ...]:
    return ('--drop-path', f'{1 - p_last:g}', *(('--model-kwargs', *model_kwargs) if model_kwargs else ()))


CELLS = (
    *(
        Cell(method, flags, seed, augmented, analysed=seed == 0)
        for augmented in (False, True)
        for seed in (0, 1, 2)
        for method, flags in ((CONSTANT, _drop(1)), (STOCHASTIC, _drop(0.5)))
    ),
    *(Cell(CONSTANT, _drop(1), seed) for seed in (3, 4, 5)),
    *(Cell(STOCHASTIC, _drop(0.5), seed) for seed in (6, 7, 8)),
    Cell('row-0.5', _drop(0.5, 'drop_path_mode=row', 'drop_path_schedule=timm', 'drop_path_rescale=train')),
    Cell('subset-0.5', _drop(0.5, 'drop_path_mode=subset')),
    Cell('uniform-0.5', _drop(0.5, 'drop_path_schedule=uniform')),
    *(Cell(f'linear-{p_last}', _drop(p_last)) for p_last in (0.2, 0.8)),
    *(Cell(f'uniform-{p_last}', _drop(p_last, 'drop_path_schedule=uniform')) for p_last in (0.2, 0.8)),
)


def write_record(content: dict[str, Any], path: Path) -> None:
    """A line per entry, numbers to seven digits; whole, or not at all."""
    rounded = json.loads(json.dumps(content), parse_float=lambda digits: float(f'{float(digits):.7g}'))
    lines = ',\n'.join(f'  {json.dumps(key)}: {json.dumps(value)}' for key, value in rounded.items())
    with written_whole(path) as part:
        part.write_text(f'{{\n{lines}\n}}\n', encoding='utf-8')


def read_record(path: Path, cell: dict[str, Any], entries: set[str], scale: dict[str, Any]) -> dict[str, Any]:
    """Of a cell and scale, with further entries; a damaged file, or of something else, is a ValueError."""
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    if not (isinstance(content, dict) and content.keys() >= {*entries, 'scale'} and content | cell == content):
        raise ValueError(f'{path} is not a record of {path.stem}; remove it to run that cell again')
    if content['scale'] != scale:
        raise ValueError(f'{path} is a record of another scale; give another --out')
    return content


class Record:
    """A finished cell, and what tables say of it; see `read_record`."""

    def __init__(self, path: Path, cell: Cell, scale: Scale) -> None:
        expected = {**asdict(cell), 'flags': [*cell.flags]}
        entries = {'survival_probs', 'steps_per_epoch', 'epochs', 'analysis'}
        content = read_record(path, expected, entries, asdict(scale))
        self.cell, self.content, self.analysis = cell, content, content['analysis']
        self.epochs = epochs = content['epochs']
        self.error: float = epochs['test_error'][-1]  # percent, after the last epoch: none is chosen on the test set
        self.loss: float = epochs['train_loss'][-1]
        self.depth = fmean(epochs['depth'])  # branches run in a training step
        self.gradient = fmean(epochs['gradient'][len(epochs['gradient']) * 3 // 4 :])  # in the last quarter
        self.seconds: float = sum(epochs['cpu_seconds'])  # of all training steps


class Records:
    """The records found in a folder, by their cells' names and in their order, and the names of the missing cells."""

    def __init__(self, folder: Path, cells: Sequence[Cell] = CELLS, scale: Scale | None = None) -> None:
        paths = {cell: folder / f'{cell.name}.json' for cell in cells}
        self.folder = folder
        self.found = {c.name: Record(path, c, scale or Scale()) for c, path in paths.items() if path.is_file()}
        self.missing = [cell.name for cell in cells if cell.name not in self.found]
        self.analysed = {name: record.analysis for name, record in self.found.items() if record.analysis}

    def of(self, method: str, augmented: bool = False) -> list[Record]:
        """Those of one method, by seed."""
        return [r for r in self.found.values() if (r.cell.method, r.cell.augmented) == (method, augmented)]

    def constant(self, record: Record) -> Record | None:
        """Constant depth with the same seed and augmentation."""
        return self.found.get(replace(record.cell, method=CONSTANT).name)

    def pairs(self, augmented: bool = False) -> list[tuple[Record, Record]]:
        """Constant depth and p_L = 0.5 of the same seed."""
        return [(constant, r) for r in self.of(STOCHASTIC, augmented) if (constant := self.constant(r))]

    def sweep(self, schedule: str) -> dict[float, float]:
        """Test error in percent over p_L, of seed 0 without augmentation; constant depth is p_L = 1."""
        methods = {p_last: f'{schedule}-{p_last}' for p_last in (0.2, 0.5, 0.8)} | {1.0: CONSTANT}
        return {p_last: r.error for p_last, method in methods.items() for r in self.of(method) if r.cell.seed == 0}
