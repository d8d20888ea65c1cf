"""One cell of the study: `python -m sd_resnet.study.cell SETTINGS`, SETTINGS in JSON as `cells` makes them.

Runs timm's unmodified `train.py`, watches what the script does not record, measures sub-networks of what was trained,
and writes the record in one go.
"""

from __future__ import annotations

import json
import os
import platform
import random
import runpy
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import timm.models
import torch
from timm.data import create_dataset, resolve_model_data_config
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..analysis.datasets import NAME, evaluation_loader
from ..analysis.runs import read_run
from ..core.schedules import survival_probs
from ..resnets.paper_rescaling import evaluation_factor

AVERAGES = (1, 2, 4, 8, 16, 32)  # sub-networks in an average
SAMPLED_RATE = 0.5  # 1 - p_L of the sampled sub-networks, linear, whatever the net was trained with
COLUMNS = ('lr', 'train_loss', 'test_loss', 'test_error', 'depth', 'gradient', 'cpu_seconds')


class Recorder:
    """Watches the training steps of one run: from a step's forward pass to the end of the optimiser's step.

    CPU seconds are this process's, so that neither the loader's process nor other work on the machine counts.

    Args:
        steps: Of an epoch.
        parent: Process that started this one; when it is gone, this one ends.

    Attributes:
        epochs: For each epoch: learning rate, mean training loss, mean number of branches that ran (in subset mode
            counted by rows), mean absolute gradient of the first convolution, CPU seconds of all its steps.
        block_runs: How often each block's branch ran.
    """

    def __init__(self, steps: int, parent: int) -> None:
        self.epochs: list[dict[str, float]] = []
        self.block_runs: list[float] = []
        self._steps = steps
        self._step = 0
        self._rows = 1
        self._start = 0.0
        self._loss = 0.0
        self._sums = dict.fromkeys(('train_loss', 'depth', 'gradient', 'cpu_seconds'), 0.0)
        self._parent = parent

    def watch(self, model: Any) -> None:
        """Record the training of this network."""
        self.model = model
        self.block_runs = [0.0] * len(model.survival_probs)
        model.register_forward_pre_hook(self._before_forward)
        for index, block in enumerate(model.blocks()):
            block.conv1.register_forward_hook(lambda _, args, output, index=index: self._block_ran(index, args[0]))
        register_module_forward_hook(self._after_loss)
        register_optimizer_step_post_hook(self._after_step)

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if model.training:
            self._rows = args[0].shape[0]
            self._start = time.process_time()

    def _block_ran(self, index: int, x: Tensor) -> None:
        if self.model.training:
            share = x.shape[0] / self._rows
            self.block_runs[index] += share
            self._sums['depth'] += share

    def _after_loss(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.CrossEntropyLoss) and self.model.training:
            self._loss = output.item()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._sums['cpu_seconds'] += time.process_time() - self._start
        self._sums['train_loss'] += self._loss
        self._sums['gradient'] += self.model.conv1.weight.grad.abs().mean().item()
        self._step += 1
        if self._step == self._steps:
            means = {name: self._sums[name] / self._steps for name in ('train_loss', 'depth', 'gradient')}
            lr = optimizer.param_groups[0]['lr']
            self.epochs.append({'lr': lr, **means, 'cpu_seconds': self._sums['cpu_seconds']})
            self._sums = dict.fromkeys(self._sums, 0.0)
            self._step = 0
        if os.getppid() != self._parent:
            os._exit(1)  # the study was killed: whoever starts it again starts this cell again


def main(settings: dict[str, Any]) -> None:
    """Train, measure, write the record."""
    torch.set_num_threads(1)
    cell, scale, folder = settings['cell'], settings['scale'], Path(settings['folder'])
    recorder = Recorder(scale['images'] // scale['batch'], settings['parent'])
    create_model = timm.models.create_model

    def create_watched(*args: Any, **kwargs: Any) -> Any:
        model = create_model(*args, **kwargs)
        recorder.watch(model)
        return model

    timm.models.create_model = create_watched
    sys.argv = [
        *(settings['script'], *settings['arguments'], '--data-dir', settings['data']),
        *('--output', str(folder.parent), '--experiment', folder.name),
    ]
    runpy.run_path(settings['script'], run_name='__main__')

    run = read_run(folder, 'last.pth.tar')
    if len(recorder.epochs) != scale['epochs'] or run.checkpoint.epoch != scale['epochs'] - 1:
        raise RuntimeError(f'{folder} holds {len(recorder.epochs)} epochs instead of {scale["epochs"]}')
    tested = {int(epoch['epoch']): epoch for epoch in run.epochs}
    for number, epoch in enumerate(recorder.epochs):
        if number in tested:
            epoch['test_loss'] = tested[number]['eval_loss']
            epoch['test_error'] = 100 - tested[number]['eval_top1']
    model = run.model()
    record = {
        **cell,
        'survival_probs': model.survival_probs,
        'scale': scale,
        'steps_per_epoch': scale['images'] // scale['batch'],
        'block_runs': recorder.block_runs,
        'arguments': ' '.join(settings['arguments']),
        'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'timm': timm.__version__},
        'hardware': f'{platform.machine()}, one thread',
        'epochs': {name: [epoch.get(name) for epoch in recorder.epochs] for name in COLUMNS},
        'analysis': analyse(model, Path(settings['data']), scale, cell['seed']) if cell['analysed'] else None,
    }
    write_record(record, Path(settings['record']))


@torch.no_grad()
def analyse(model: Any, data: Path, scale: dict[str, Any], seed: int) -> dict[str, Any]:
    """Test errors in percent of parts of a trained network.

    Args:
        model: In evaluation mode.
        data: Root of the data set.
        scale: See `study.Scale`.
        seed: Of the sub-networks and of the sets of removed blocks.

    Returns:
        `full`: the network as it is tested. `averages`: for each number n of sampled sub-networks, unscaled as in
        training, the errors of their averaged probabilities, one for every n of the sample. `removed`: for each number
        n of blocks removed from the tested network, the errors; for n = 1 one for each block.
    """
    dataset = create_dataset(NAME, root=str(data), split='test')
    pairs = list(evaluation_loader(dataset, resolve_model_data_config(model), batch_size=500))
    model = model.to(memory_format=torch.channels_last)
    batches = [images.contiguous(memory_format=torch.channels_last) for images, _ in pairs]
    target = torch.cat([labels for _, labels in pairs])

    def probabilities(factors: Sequence[float]) -> Tensor:
        with torch.autocast('cpu', torch.bfloat16):  # as the script tests
            logits = [_logits(model, images, factors) for images in batches]
        return torch.cat(logits).float().softmax(-1)

    def error(probabilities: Tensor) -> float:
        return 100 * (probabilities.argmax(-1) != target).float().mean().item()

    blocks = len(model.survival_probs)
    tested = [evaluation_factor(block) for block in model.blocks()]
    draw = random.Random(seed)
    p = survival_probs(blocks, SAMPLED_RATE)
    sampled = [probabilities([float(draw.random() < p_l) for p_l in p]) for _ in range(scale['networks'])]
    averages = {
        n: [error(torch.stack(sampled[i : i + n]).mean(0)) for i in range(0, len(sampled) - n + 1, n)]
        for n in AVERAGES
        if n <= len(sampled)
    }
    sets = {1: [[index] for index in range(blocks)]}
    for n in range(2, 2 * blocks // 3 + 1):
        sets[n] = [draw.sample(range(blocks), n) for _ in range(scale['removals'])]
    removed = {
        n: [error(probabilities([0.0 if l in gone else f for l, f in enumerate(tested)])) for gone in each]
        for n, each in sets.items()
    }
    return {'full': error(probabilities(tested)), 'averages': averages, 'removed': removed}


def _logits(model: Any, x: Tensor, factors: Sequence[float]) -> Tensor:
    """The network with block l's branch multiplied by factor l; where that is 0 it is not run."""
    _, x = model.forward_stem(x)
    for block, factor in zip(model.blocks(), factors):
        shortcut = block.shortcut(x)
        x = block.activate(torch.add(shortcut, block.branch(x), alpha=factor) if factor else shortcut.clone())
    return model.forward_head(x)


def write_record(record: dict[str, Any], path: Path) -> None:
    """JSON with one line per entry, numbers to seven digits; whole, or not at all."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): rounded(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [rounded(entry) for entry in value]
        return float(f'{value:.7g}') if isinstance(value, float) else value

    def lines(value: Any, indent: str) -> str:
        if not isinstance(value, dict) or not any(isinstance(entry, (dict, list)) for entry in value.values()):
            return json.dumps(value)
        inner = indent + '  '
        entries = ',\n'.join(f'{inner}{json.dumps(key)}: {lines(entry, inner)}' for key, entry in value.items())
        return f'{{\n{entries}\n{indent}}}'

    part = path.with_name(f'{path.name}.part')
    part.write_text(lines(rounded(record), '') + '\n', encoding='utf-8')
    part.replace(path)


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
