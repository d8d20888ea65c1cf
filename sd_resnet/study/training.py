"""One cell of the parity study, in a process of its own: `python -m sd_resnet.study.training SETTINGS`, in JSON."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from torchvision.datasets import FashionMNIST

from ..analysis.datasets import SIZE, write_fashion_mnist
from ..bench.measure import saved_bytes
from .cells import write_record
from .parity import ARMS, NETWORKS, SEARCH, TIME, Cell, Parity, Scale
from .running import alone_in, run_process, side_by_side, where_it_ran

MEAN, STD = 0.286, 0.353
PAD = 2  # pixels
TEST_BATCH = 250
DRAWS = 8  # training passes over which the bytes saved for backward are averaged
RACES, EPOCHS = 3, 2  # of a `time` cell: races that count, after one that does not; and epochs of each
TESTED_ON = {'held out': 'held-out training images', 'test': 'test images'}
MODES = {'subset': 'subset', 'batch': 'batch', 'decay': 'subset'}  # the other arms are timm's


def run_parity(cells: Sequence[Cell], scale: Scale, data: Path | None, work: Path, out: Path, jobs: int = 1) -> None:
    """Run the cells that have no record in `out` yet, from the start, `jobs` of them side by side, one thread each.

    First those of the search for the rates, which the others take; in the end those of time. For `data` see
    `write_fashion_mnist`; `work` is for images and logs. A RuntimeError says which cells failed, or that a rate is not
    found yet.
    """
    missing = Parity(out, scale).missing
    waiting = [cell for cell in cells if cell.name in missing]
    print(f'{len(cells) - len(waiting)} cells are finished, {len(waiting)} to run', flush=True)
    if not waiting:
        return
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(work):
        write_fashion_mnist(work / 'all_images', source=data)
        for arms in ({SEARCH}, {*ARMS}, {TIME}):
            chosen = [cell for cell in waiting if cell.arm in arms]
            parity = Parity(out, scale)
            if unknown := {cell.network: None for cell in chosen if parity.rate(cell) is None}:
                raise RuntimeError(
                    f'the rate of {", ".join(unknown)} is not found yet: run the cells of its search first'
                )
            side_by_side(lambda cell: _run_cell(cell, scale, work, out), chosen, jobs, work)


def _run_cell(cell: Cell, scale: Scale, work: Path, out: Path) -> bool:
    settings = {'cell': asdict(cell), 'scale': asdict(scale), 'work': str(work.absolute()), 'out': str(out.absolute())}

    def result() -> str:
        record = Parity(out, scale).found[cell.name]
        return 'the arms were raced' if cell.arm == TIME else f'error {record["error"]:.2f} %'

    return run_process(f'{__package__}.training', settings, cell.name, work, result)


def main(settings: dict[str, Any]) -> None:
    """In the cell's process: train, test, write the record."""
    torch.set_num_threads(1)
    cell, scale, out = Cell(**settings['cell']), Scale(**settings['scale']), Path(settings['out'])
    rate = Parity(out, scale).rate(cell)
    if rate is None:
        raise RuntimeError(f'no rate was found yet for {cell.name}')

    def stop() -> None:
        if os.getppid() != settings['parent']:
            sys.exit('the study was killed: whoever starts it again starts this cell again')

    record = {
        **asdict(cell),
        'rate_used': rate,
        'seed': cell.seed,
        'recipe': cell.recipe,
        'scale': asdict(scale),
        **where_it_ran(),
    }
    torch.manual_seed(cell.seed)
    data = Path(settings['work']) / 'all_images'
    if cell.arm == TIME:
        rates = {arm: Parity(out, scale).rate(replace(cell, arm=arm)) or 0.0 for arm in ARMS}
        record['cpu_seconds'] = raced(cell, rates, scale, data, stop)
    else:
        training = Training(cell, rate, scale, data)
        while len(training.epochs) < scale.epochs[cell.network]:
            training.epoch()
            stop()
        record |= training.results()
    write_record(record, out / f'{cell.name}.json')


def raced(
    cell: Cell, rates: dict[str, float], scale: Scale, data: Path, stop: Callable[[], None]
) -> dict[str, list[list[float]]]:
    """CPU seconds of each step of each race, by arm: short trainings in one process, all arms one step each in turn.

    Each is a whole one, from the first to the last learning rate; a falling rate falls to 0 in it. `stop` is called
    after each and may end the process.
    """
    short, found = replace(scale, epochs={cell.network: EPOCHS}), {arm: list[list[float]]() for arm in ARMS}
    for _ in range(1 + RACES):
        trainings = {arm: Training(replace(cell, arm=arm), rates[arm], short, data) for arm in ARMS}
        seconds = [each for _ in range(EPOCHS) for each in zip(*(t.steps() for t in trainings.values()), strict=True)]
        for arm, own in zip(trainings, zip(*seconds)):
            found[arm].append([*own])
        stop()
    return {arm: races[1:] for arm, races in found.items()}


class Training:
    """A network on its way: timm's model, optimiser and learning rate, over images in memory."""

    def __init__(self, cell: Cell, rate: float, scale: Scale, data: Path) -> None:
        self.scale, self.recipe, self.epochs = scale, NETWORKS[cell.network], list[dict[str, float]]()
        self.layout = torch.channels_last if self.recipe.bfloat16 else torch.contiguous_format
        self.steps_of_epoch = scale.images // scale.batch
        total = self.steps_of_epoch * scale.epochs[cell.network]
        self.name, kwargs = self.recipe.model, dict(self.recipe.kwargs)
        if cell.arm in MODES or self.name.startswith('sd_'):  # of the CIFAR net row mode is timm's drop path
            self.name = f'sd_{self.name.removeprefix("sd_")}'
            kwargs |= {'drop_path_mode': MODES.get(cell.arm, 'row'), 'drop_path_schedule': 'timm'}
        if cell.arm == 'decay':
            kwargs['drop_path_ramp'] = ('decay', total)
        self.model: Any = timm.create_model(self.name, num_classes=10, in_chans=1, drop_path_rate=rate, **kwargs)
        self.model.to(memory_format=self.layout).train()
        self.optimizer = create_optimizer_v2(self.model, **self.recipe.optimizer)
        self.schedule = CosineLRScheduler(
            self.optimizer, t_initial=total, t_in_epochs=False, warmup_t=max(1, total // 20), warmup_lr_init=1e-6
        )
        self.images, self.labels = chosen_images(data, scale, 'train')
        part = 'held out' if cell.arm == SEARCH else 'test'
        self.tested, self.tested_on = chosen_images(data, scale, part), TESTED_ON[part]

    def epoch(self) -> None:
        """All images once, in an order of its own; CPU time is of the steps alone."""
        seconds = sum(self.steps())
        self.epochs[-1]['cpu_seconds'] = seconds

    def steps(self) -> Iterator[float]:
        """Those of an epoch: the CPU seconds of each, from forward to the update."""
        losses, order = list[float](), torch.randperm(len(self.images))
        for rows in order[: self.steps_of_epoch * self.scale.batch].split(self.scale.batch):
            x, y = augment(self.images[rows]), self.labels[rows]
            started = time.process_time()
            loss = self.loss(x, y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            seconds = time.process_time() - started
            losses.append(loss.item())
            self.schedule.step_update(len(self.epochs) * self.steps_of_epoch + len(losses))
            yield seconds
        self.epochs.append({'lr': self.optimizer.param_groups[0]['lr'], 'train_loss': fmean(losses)})

    def results(self) -> dict[str, Any]:
        """For the record of a cell."""
        return {
            'model': self.name,
            'tested_on': self.tested_on,
            'error': self.error(),
            'saved_bytes': self.saved_bytes(),
            'parameters': sum(parameter.numel() for parameter in self.model.parameters()),
            'epochs': {name: [epoch[name] for epoch in self.epochs] for name in self.epochs[0]},
        }

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(self.logits(x), y)

    def logits(self, x: Tensor) -> Tensor:
        with torch.autocast('cpu', torch.bfloat16, enabled=self.recipe.bfloat16):
            return self.model(normalised(x).contiguous(memory_format=self.layout)).float()

    @torch.no_grad()
    def error(self) -> float:
        """In percent, of the images that it is tested on."""
        self.model.eval()
        batches = zip(*(each.split(TEST_BATCH) for each in self.tested))
        wrong = sum((self.logits(x).argmax(-1) != y).sum().item() for x, y in batches)
        return 100 * wrong / len(self.tested[0])

    def saved_bytes(self) -> float:
        """What a training step of the trained network keeps for backward, mean over draws; a decay has ended there."""
        self.model.train()
        x, y = self.images[: self.scale.batch], self.labels[: self.scale.batch]
        return fmean(saved_bytes(self.model, lambda: self.loss(x, y)) for _ in range(DRAWS))


def chosen_images(data: Path, scale: Scale, part: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 28, 28) in bytes, and labels: the first of each class, the last training images, or the test's."""
    dataset = FashionMNIST(data, train=part != 'test')
    images, labels = dataset.data.unsqueeze(1), dataset.targets
    if part == 'train':
        each = scale.images // 10
        rows = torch.cat([(labels == label).nonzero()[:each, 0] for label in range(10)])
        return images[rows], labels[rows]
    return (images, labels) if part == 'test' else (images[-scale.held_out :], labels[-scale.held_out :])


def normalised(x: Tensor) -> Tensor:
    return (x.float() / 255 - MEAN) / STD


def augment(x: Tensor) -> Tensor:
    """Pad, crop each image at a place of its own, flip half of them."""
    n, pixels = len(x), torch.arange(SIZE)
    rows, columns = (torch.randint(2 * PAD + 1, (n, 1)) + pixels for _ in range(2))
    columns = torch.where(torch.rand(n, 1) < 0.5, columns, columns.flip(1))
    return pad(x, (PAD,) * 4)[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
