"""How much shorter should a step be? `python -m docs.time_of_blocks > docs/results/time_of_blocks.txt`

The study's CPU time at p_L = 0.5 is above its share of FLOPs. FLOPs are not time: here the time of each stage is
measured, as what a training step gains when none of its blocks runs, with the study's settings and one thread. How
often each block ran is in the study's records, and so is the time that it took: the two are set side by side.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

from sd_resnet.analysis.costs import network_cost
from sd_resnet.analysis.datasets import SIZE
from sd_resnet.bench.report import environment
from sd_resnet.study.cells import CONSTANT, Records, Scale

NEVER = 1e-9  # a survival probability of 0 is refused


def step_of(model: nn.Module, batch: int) -> Callable[[], float]:
    """A training step of the study, and the CPU seconds it took."""
    model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt='sgd', lr=0.1, momentum=0.9, weight_decay=1e-4)
    images = torch.randn(batch, 1, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))

    def step() -> float:
        start = time.process_time()
        with torch.autocast('cpu', torch.bfloat16):
            loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return time.process_time() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--steps', type=int, default=60)
    parser.add_argument('--records', type=Path, default=Path('docs/study'))
    args = parser.parse_args()
    torch.set_num_threads(1)

    scale = Scale()
    costs = network_cost(scale.model, SIZE, 0.5)
    stages = [block.name.split('.')[0] for block in costs.blocks]
    names = list(dict.fromkeys(stages))
    without = {'whole': [1.0] * len(stages)}
    without |= {name: [NEVER if stage == name else 1.0 for stage in stages] for name in names}
    without['all blocks'] = [NEVER] * len(stages)
    steps = {}
    for name, probabilities in without.items():
        model = timm.create_model(scale.model, num_classes=10, in_chans=1, drop_path_schedule=probabilities)
        steps[name] = step_of(model.train(), scale.batch)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(args.steps + 3):  # the first three are not counted
        for name, step in steps.items():
            taken = step()
            if index >= 3:
                seconds[name].append(taken)

    mean = {name: statistics.fmean(taken) for name, taken in seconds.items()}
    error = {name: statistics.stdev(taken) / math.sqrt(len(taken)) for name, taken in seconds.items()}
    whole = mean['whole']
    print(f'{scale.model}, batch {scale.batch}, {SIZE} px, bfloat16, channels_last, {args.steps} steps')
    print(environment())
    print(f'\n{"never run":<14}{"CPU ms":>8}{"s.e.":>6}{"gain, share of the whole":>28}{"share of FLOPs":>18}')
    for name in steps:
        flops = sum(
            b.branch_flops for b, stage in zip(costs.blocks, stages, strict=True) if name in (stage, 'all blocks')
        )
        shares = f'{1 - mean[name] / whole:>28.3f}{flops / costs.flops:>18.3f}'
        print(f'{name:<14}{1000 * mean[name]:>8.1f}{1000 * error[name]:>6.1f}{shares}')

    block = {name: (1 - mean[name] / whole) / stages.count(name) for name in names}
    records = Records(args.records)
    print(f'\n{"cell of the study":<30}{"FLOPs run":>12}{"time expected":>16}{"time taken":>12}')
    gaps = []
    for name, record in records.found.items():
        constant = records.constant(record)
        if record.cell.method == CONSTANT or 'drop_path_mode' in ' '.join(record.cell.flags) or not constant:
            continue  # row mode computes everything, subset mode copies rows
        block_runs = (each.content['block_runs'] for each in (record, constant))
        idle = [1 - runs / most for runs, most in zip(*block_runs, strict=True)]
        flops = 1 - sum(i * b.branch_flops for i, b in zip(idle, costs.blocks, strict=True)) / costs.flops
        expected = 1 - sum(i * block[stage] for i, stage in zip(idle, stages, strict=True))
        taken = record.seconds / constant.seconds
        gaps.append(taken - expected)
        print(f'{name:<30}{flops:>12.3f}{expected:>16.3f}{taken:>12.3f}')
    print(f'\ntaken less expected: mean {statistics.fmean(gaps):+.3f}, standard deviation {statistics.stdev(gaps):.3f}')


if __name__ == '__main__':
    main()
