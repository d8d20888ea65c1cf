"""The study: each of the paper's claims, measured at a scale that a CPU can do, with timm's unmodified `train.py`.

A cell is one training run, in a process of its own (`cell`), and ends in one small record. A cell whose record
is there is finished; any other is run from the start. Everything below was fixed before any result was seen:
sd_resnet32_cifar (L = 15) on 2,000 images of Fashion-MNIST for 150 epochs, because stochastic depth needs many epochs
and its gain shows where the constant-depth net overfits. timm's script drops the last, incomplete batch of an epoch:
15 steps of 128 images.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..analysis.datasets import NAME, write_fashion_mnist

PACKAGE = Path(__file__).parents[1]
CONSTANT: tuple[str, ...] = ('--drop-path', '0')
LETTER = 'drop_path_rescale=test'
TIMM_ROW = ('drop_path_mode=row', 'drop_path_schedule=timm', 'drop_path_rescale=train')


@dataclass(frozen=True)
class Scale:
    """What all cells share.

    Attributes:
        model: Architecture.
        images: Training images, as many of each class.
        batch: Images of a step.
        epochs: Passes over them; the learning rate is divided by 10 at 1/2 and 3/4.
        val_interval: Test every so many epochs.
        networks: Sampled sub-networks of the ensemble.
        removals: Random sets of removed blocks for each number of them.
    """

    model: str = 'sd_resnet32_cifar'
    images: int = 2000
    batch: int = 128
    epochs: int = 150
    val_interval: int = 10
    networks: int = 32
    removals: int = 5

    def arguments(self) -> list[str]:
        """Of timm's `train.py`; bias and BatchNorm have no weight decay there."""
        flags = (
            f'--dataset {NAME} --val-split test --model {self.model} --num-classes 10 --in-chans 1 '
            '--input-size 1 28 28 --mean 0.286 --std 0.353 --crop-pct 1.0 --interpolation bilinear '
            f'-b {self.batch} --opt sgd --lr 0.1 --momentum 0.9 --weight-decay 1e-4 --smoothing 0 '
            f'--sched multistep --decay-milestones {self.epochs // 2} {self.epochs * 3 // 4} --decay-rate 0.1 '
            f'--warmup-epochs 0 --epochs {self.epochs} --val-interval {self.val_interval} '
            '--amp --amp-dtype bfloat16 --channels-last --device cpu --no-prefetcher --workers 1 '
            '--checkpoint-hist 1 --log-interval 1000'
        )
        return flags.split()


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        method: How blocks are dropped; cells of one method and augmentation differ in their seed alone.
        flags: The method's arguments of `train.py`.
        seed: Of weights, order, augmentation and decisions.
        augmented: Pad by 4 pixels, crop at a random place, flip: the paper's augmentation. Otherwise none.
        analysed: Measure sub-networks, their averages, and the net with blocks removed, too.
    """

    method: str
    flags: tuple[str, ...]
    seed: int = 0
    augmented: bool = False
    analysed: bool = False

    @property
    def name(self) -> str:
        """Of the record."""
        return f'{"augmented-" * self.augmented}{self.method}-seed{self.seed}'

    def arguments(self) -> list[str]:
        """What it adds to the scale's."""
        crop = '--train-crop-mode rrc --scale 0.605 0.605 --ratio 1 1 --hflip 0.5 --color-jitter 0'
        # The paper's letter, unless the method has another; the script takes one list of them
        rescaled = any(flag.startswith('drop_path_rescale=') for flag in self.flags)
        letter = [] if rescaled else [*(() if '--model-kwargs' in self.flags else ('--model-kwargs',)), LETTER]
        return [*self.flags, *letter, '--seed', str(self.seed), *(crop.split() if self.augmented else ['--no-aug'])]


def _dropping(p_last: float, *model_args: str) -> tuple[str, ...]:
    return ('--drop-path', f'{1 - p_last:g}', *(('--model-kwargs', *model_args) if model_args else ()))


def _cells() -> tuple[Cell, ...]:
    uniform = 'drop_path_schedule=uniform'
    pairs = [
        Cell(method, flags, seed, augmented, analysed=seed == 0)
        for augmented in (False, True)
        for seed in (0, 1, 2)
        for method, flags in (('constant', CONSTANT), ('linear-0.5', _dropping(0.5)))
    ]
    return (
        *pairs,
        Cell('row-0.5', _dropping(0.5, *TIMM_ROW)),
        Cell('subset-0.5', _dropping(0.5, 'drop_path_mode=subset')),
        Cell('uniform-0.5', _dropping(0.5, uniform)),
        Cell('linear-0.2', _dropping(0.2)),
        Cell('linear-0.8', _dropping(0.8)),
        Cell('uniform-0.2', _dropping(0.2, uniform)),
        Cell('uniform-0.8', _dropping(0.8, uniform)),
    )


CELLS = _cells()


def run(
    script: Path,
    data: Path,
    work: Path,
    out: Path,
    names: Sequence[str] = (),
    jobs: int = 1,
    cells: Sequence[Cell] = CELLS,
    scale: Scale | None = None,
) -> None:
    """Run the cells that have no record yet.

    Args:
        script: timm's `train.py`, in a clone.
        data: Fashion-MNIST, as `sd-resnet data fashion-mnist` writes it.
        work: Folder for images, runs and logs.
        out: Folder of the records.
        names: Of the cells to run; empty for all.
        jobs: Cells side by side, one thread each.
        cells: What there is.
        scale: What the cells share; None is the study's.

    Raises:
        FileNotFoundError: The script is missing.
        RuntimeError: A cell failed; the others were finished. Or another study runs in `work`.
        ValueError: There is no cell of that name, a record is another's, or the data set is not the published one.
    """
    scale = scale or Scale()
    if not script.is_file():
        raise FileNotFoundError(f"{script} is not a file: give train.py of a clone of timm's repository")
    known = {cell.name: cell for cell in cells}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f'cells must be among {", ".join(known)}, got {", ".join(unknown)}')
    wanted = [known[name] for name in dict.fromkeys(names or known)]
    waiting = []
    for cell in wanted:
        path = out / f'{cell.name}.json'
        if not path.is_file():
            waiting.append(cell)
        elif read_record(path, cell)['scale'] != dataclasses.asdict(scale):
            raise ValueError(f'{path} is a record of another scale; give another --out')
    print(f'{len(wanted) - len(waiting)} cells are finished, {len(waiting)} to run', flush=True)
    if not waiting:
        return
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / 'lock', timeout=0):
            _run(waiting, scale, script, data, work, out, jobs)
    except Timeout as error:
        raise RuntimeError(f'another study runs in {work}; give another --work') from error


def read_record(path: Path, cell: Cell) -> dict[str, Any]:
    """A finished cell.

    Raises:
        ValueError: The file is damaged, or another cell's.
    """
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path} is damaged: {error}') from error
    own = {**dataclasses.asdict(cell), 'flags': list(cell.flags)}
    complete = isinstance(record, dict) and {'scale', 'survival_probs', 'steps_per_epoch', 'epochs', 'analysis'} <= set(
        record
    )
    if not complete or {key: record.get(key) for key in own} != own:
        raise ValueError(f'{path} is not a record of {cell.name}; remove it to run that cell again')
    return record


def _run(waiting: list[Cell], scale: Scale, script: Path, data: Path, work: Path, out: Path, jobs: int) -> None:
    write_fashion_mnist(work / 'images', images=scale.images, source=data)
    write_fashion_mnist(work / 'images_padded', pad=4, images=scale.images, source=data)
    out.mkdir(parents=True, exist_ok=True)

    running: dict[subprocess.Popen[bytes], Cell] = {}
    failed = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.pop(0)
                running[_start(cell, scale, script, work, out)] = cell
                print(f'{cell.name}: started', flush=True)
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                cell = running.pop(process)
                if process.returncode:
                    failed.append(cell.name)
                    print(f'{cell.name}: failed, see {work / cell.name}.log', flush=True)
                else:
                    final = json.loads((out / f'{cell.name}.json').read_text(encoding='utf-8'))
                    error, seconds = final['epochs']['test_error'][-1], sum(final['epochs']['cpu_seconds'])
                    print(f'{cell.name}: test error {error:.2f} %, {seconds:.0f} CPU seconds in steps', flush=True)
    finally:
        for process in running:
            process.terminate()
    if failed:
        raise RuntimeError(f'failed: {", ".join(failed)}; the logs are in {work}')


def _start(cell: Cell, scale: Scale, script: Path, work: Path, out: Path) -> subprocess.Popen[bytes]:
    shutil.rmtree(work / cell.name, ignore_errors=True)  # what an interrupted run left
    data = work / ('images_padded' if cell.augmented else 'images')
    settings = {
        'cell': dataclasses.asdict(cell),
        'scale': dataclasses.asdict(scale),
        'arguments': [*scale.arguments(), *cell.arguments()],
        'parent': os.getpid(),
        'script': str(script.absolute()),
        'folder': str((work / cell.name).absolute()),
        'data': str(data.absolute()),
        'record': str((out / f'{cell.name}.json').absolute()),
    }
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get('PYTHONPATH'))))
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': path}
    with (work / f'{cell.name}.log').open('wb') as log:
        return subprocess.Popen(
            [sys.executable, '-m', f'{__package__}.cell', json.dumps(settings)],
            cwd=script.absolute().parent,  # as `python train.py` there: the clone's timm
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
