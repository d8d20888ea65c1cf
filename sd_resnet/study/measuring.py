"""What is measured in a cell beside what timm's script records: training steps, and parts of the trained network."""

import os
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..analysis.evaluation import loader, open_images
from ..core.schedules import survival_probs
from ..resnets.paper_rescaling import evaluation_factor
from .cells import Scale

AVERAGES = (1, 2, 4, 8, 16, 32)  # sub-networks in an average
SAMPLED_RATE = 0.5  # 1 - p_L of the sampled sub-networks, linear, whatever the net was trained with


class Recorder:
    """Watches the training steps of a ResNet of this package, from the forward pass to the end of the optimiser's step.

    `epochs` has of each the learning rate, the means of training loss, branches run and absolute gradient of the first
    convolution, and this process's CPU seconds in all steps: neither the loader's nor other work on the machine counts.
    `block_runs` is how often each block's branch ran; in subset mode rows are counted.
    """

    def __init__(self, model: Any, steps: int, parent: int) -> None:
        self.epochs: list[dict[str, float]] = []
        self.block_runs = [0.0] * len(model.survival_probs)
        self._model, self._steps, self._parent = model, steps, parent
        self._sums: defaultdict[str, float] = defaultdict(float)  # of the steps of an epoch
        model.register_forward_pre_hook(self._before_forward)
        for index, block in enumerate(model.blocks()):
            block.conv1.register_forward_hook(lambda _, args, output, index=index: self._block_ran(index, args[0]))
        register_module_forward_hook(self._after_loss)
        register_optimizer_step_post_hook(self._after_step)

    def _before_forward(self, model: nn.Module, args: Any) -> None:
        if model.training:
            self._rows, self._start = len(args[0]), time.process_time()

    def _block_ran(self, index: int, x: Tensor) -> None:
        if self._model.training:
            self.block_runs[index] += len(x) / self._rows
            self._sums['depth'] += len(x) / self._rows

    def _after_loss(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.CrossEntropyLoss) and self._model.training:
            self._sums['train_loss'] += output.item()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._sums['cpu_seconds'] += time.process_time() - self._start
        self._sums['gradient'] += self._model.conv1.weight.grad.abs().mean().item()
        self._sums['steps'] += 1
        if self._sums['steps'] == self._steps:
            means = {name: self._sums[name] / self._steps for name in ('train_loss', 'depth', 'gradient')}
            lr, seconds = optimizer.param_groups[0]['lr'], self._sums['cpu_seconds']
            self.epochs.append({'lr': lr, **means, 'cpu_seconds': seconds})
            self._sums.clear()
        if os.getppid() != self._parent:
            os._exit(1)  # the study was killed: whoever starts it again starts this cell again


@torch.no_grad()
def analyse(model: Any, data: Path, scale: Scale, seed: int) -> dict[str, Any]:
    """Test errors in percent of a trained network in evaluation mode, and of its parts.

    Returns:
        `full`: as it is tested. `averages`: for each n the errors of averaged probabilities, one for every n of the
        sampled sub-networks, unscaled as in training. `removed`: for each n the errors with n blocks removed from the
        tested network; for n = 1 one for each block.
    """
    dataset = open_images(data, 'test', model, 'model')
    images, labels = zip(*loader(dataset, range(len(dataset)), 500))
    model = model.to(memory_format=torch.channels_last)
    batches = [x.contiguous(memory_format=torch.channels_last) for x in images]

    def probabilities(factors: Sequence[float]) -> Tensor:
        with torch.autocast('cpu', torch.bfloat16):  # as the script tests
            return torch.cat([_logits(model, x, factors) for x in batches]).float().softmax(-1)

    def error(probabilities: Tensor) -> float:
        return 100 * (probabilities.argmax(-1) != torch.cat(labels)).float().mean().item()

    L = len(model.survival_probs)
    tested = [evaluation_factor(block) for block in model.blocks()]
    draw, p = random.Random(seed), survival_probs(L, SAMPLED_RATE)
    sampled = [probabilities([float(draw.random() < p_l) for p_l in p]) for _ in range(scale.networks)]
    averages = {
        n: [error(torch.stack(sampled[i : i + n]).mean(0)) for i in range(0, len(sampled) - n + 1, n)]
        for n in AVERAGES
        if n <= len(sampled)
    }
    gone = {1: [[l] for l in range(L)]}
    gone |= {n: [draw.sample(range(L), n) for _ in range(scale.removals)] for n in range(2, 2 * L // 3 + 1)}
    removed = {
        n: [error(probabilities([0.0 if l in each else f for l, f in enumerate(tested)])) for each in sets]
        for n, sets in gone.items()
    }
    return {'full': error(probabilities(tested)), 'averages': averages, 'removed': removed}


def _logits(model: Any, x: Tensor, factors: Sequence[float]) -> Tensor:
    """The network with block l's branch multiplied by factor l; where that is 0 it is not run."""
    _, x = model.forward_stem(x)
    for block, factor in zip(model.blocks(), factors):
        shortcut = block.shortcut(x)
        x = block.activate(torch.add(shortcut, block.branch(x), alpha=factor) if factor else shortcut.clone())
    return model.forward_head(x)
