"""Running cells with timm's unmodified `train.py`, each in a process of its own, which ends in its record.

That process is `python -m sd_resnet.study.running SETTINGS`, SETTINGS in JSON.
"""

import json
import os
import platform
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from filelock import FileLock, Timeout

from ..analysis.datasets import write_fashion_mnist
from ..analysis.runs import read_run
from .cells import Cell, Records, Scale, write_record
from .measuring import Recorder, analyse

COLUMNS = ('lr', 'train_loss', 'test_loss', 'test_error', 'depth', 'gradient', 'cpu_seconds')


def run(cells: Sequence[Cell], scale: Scale, script: Path, data: Path, work: Path, out: Path, jobs: int = 1) -> None:
    """Run the cells that have no record in `out` yet, from the start, `jobs` of them side by side, one thread each.

    `script` is timm's `train.py`, in a clone, and `data` what `sd-resnet data fashion-mnist` writes; `work` is for
    images, runs and logs. A RuntimeError says which cells failed; the others were finished.
    """
    if not script.is_file():
        raise FileNotFoundError(f"{script} is not a file: give train.py of a clone of timm's repository")
    missing = Records(out, cells, scale).missing
    print(f'{len(cells) - len(missing)} cells are finished, {len(missing)} to run', flush=True)
    if not missing:
        return
    out.mkdir(parents=True, exist_ok=True)
    waiting = [cell for cell in cells if cell.name in missing]
    with alone_in(work):
        write_fashion_mnist(work / 'images', images=scale.images, source=data)
        write_fashion_mnist(work / 'images_padded', pad=4, images=scale.images, source=data)
        side_by_side(lambda cell: _run_cell(cell, scale, script, work, out), waiting, jobs, work)


def _run_cell(cell: Cell, scale: Scale, script: Path, work: Path, out: Path) -> bool:
    """Did it end with a record?"""
    settings: dict[str, Any] = {'cell': asdict(cell), 'scale': asdict(scale)}
    settings |= {key: str(path.absolute()) for key, path in (('script', script), ('work', work), ('out', out))}

    def result() -> str:
        record = Records(out, [cell], scale).found[cell.name]
        return f'test error {record.error:.2f} %, {record.seconds:.0f} CPU seconds in steps'

    # There as `python train.py`: the clone's timm
    return run_process(f'{__package__}.running', settings, cell.name, work, result, script.absolute().parent)


@contextmanager
def alone_in(work: Path) -> Iterator[None]:
    """Make the folder; a RuntimeError where another study runs in it."""
    work.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(work / 'lock', timeout=0):
            yield
    except Timeout as error:
        raise RuntimeError(f'another study runs in {work}; give another --work') from error


def side_by_side(run_cell: Callable[[Any], bool], cells: Sequence[Any], jobs: int, work: Path) -> None:
    """Run all, `jobs` at once; a RuntimeError says which failed, after the others were finished."""
    with ThreadPoolExecutor(jobs) as pool:
        finished = list(pool.map(run_cell, cells))
    if failed := [cell.name for cell, done in zip(cells, finished) if not done]:
        raise RuntimeError(f'failed: {", ".join(failed)}; the logs are in {work}')


def run_process(
    module: str, settings: dict[str, Any], name: str, work: Path, result: Callable[[], str], cwd: Path | None = None
) -> bool:
    """Run a cell in a process of its own, one thread, with a log in `work`; did it end well?"""
    print(f'{name}: started', flush=True)
    settings = {**settings, 'parent': os.getpid()}
    python_path = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get('PYTHONPATH'))))
    with (work / f'{name}.log').open('wb') as log:
        process = subprocess.run(
            [sys.executable, '-m', module, json.dumps(settings)],
            cwd=cwd,
            env={**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': python_path},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    print(f'{name}: {result() if process.returncode == 0 else f"failed, see {log.name}"}', flush=True)
    return process.returncode == 0


def where_it_ran() -> dict[str, Any]:
    """Versions and hardware, for a record."""
    versions = {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__}
    return {'versions': versions, 'hardware': f'{platform.machine()}, one thread'}


def main(settings: dict[str, Any]) -> None:
    """In the cell's process: train, measure, write the record."""
    torch.set_num_threads(1)
    cell, scale = Cell(**settings['cell']), Scale(**settings['scale'])
    script, work, out = settings['script'], Path(settings['work']), Path(settings['out'])
    folder, data = work / cell.name, work / ('images_padded' if cell.augmented else 'images')
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted run left
    arguments, steps = [*scale.arguments(), *cell.arguments()], scale.images // scale.batch
    recorders, create_model = [], timm.models.create_model

    def create_watched(*args: Any, **kwargs: Any) -> Any:
        model = create_model(*args, **kwargs)
        recorders.append(Recorder(model, steps, settings['parent']))
        return model

    timm.models.create_model = create_watched
    sys.argv = [script, *arguments, '--data-dir', str(data), '--output', str(work), '--experiment', cell.name]
    runpy.run_path(script, run_name='__main__')

    (recorder,) = recorders
    trained = read_run(folder, 'last.pth.tar')
    if len(recorder.epochs) != scale.epochs or trained.checkpoint.epoch != scale.epochs - 1:
        raise RuntimeError(f'{folder} holds {len(recorder.epochs)} epochs instead of {scale.epochs}')
    for tested in trained.epochs:
        errors = {'test_loss': tested['eval_loss'], 'test_error': 100 - tested['eval_top1']}
        recorder.epochs[int(tested['epoch'])].update(errors)
    model: Any = trained.model()
    record = {
        **asdict(cell),
        'survival_probs': model.survival_probs,
        'scale': asdict(scale),
        'steps_per_epoch': steps,
        'block_runs': recorder.block_runs,
        'arguments': ' '.join(arguments),
        **where_it_ran(),
        'epochs': {name: [epoch.get(name) for epoch in recorder.epochs] for name in COLUMNS},
        'analysis': analyse(model, data, scale, cell.seed) if cell.analysed else None,
    }
    write_record(record, out / f'{cell.name}.json')


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
