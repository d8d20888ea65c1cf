"""Does it pay to drop attention and MLP apart? `python docs/branch_by_branch.py > docs/branch_by_branch.txt`

`sd_resnet.convert` drops a ViT's block as one unit. Here each block is taken apart into two residual blocks, attention
and MLP, so that `convert` draws for each of them, as timm does. The contestants take turns, step by step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

import sd_resnet
from sd_resnet.bench.report import environment


class Half(nn.Module):
    """One of the two residual blocks in timm's ViT block."""

    def __init__(self, norm: nn.Module, branch: nn.Module, scale: nn.Module, drop_path: nn.Module) -> None:
        super().__init__()
        self.norm, self.branch, self.scale, self.drop_path = norm, branch, scale, drop_path

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.scale(self.branch(self.norm(x))))


def halves(block: Any) -> list[Half]:
    """Attention and MLP."""
    return [
        Half(block.norm1, block.attn, block.ls1, block.drop_path1),
        Half(block.norm2, block.mlp, block.ls2, block.drop_path2),
    ]


def contestant(name: str, rate: float, mode: str | None, apart: bool) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=rate, num_classes=10)
    if apart:
        model.blocks = nn.Sequential(*[half for block in model.blocks for half in halves(block)])
    if mode:
        converted = sd_resnet.convert(model, rate, 'uniform', mode).survival_probs
        assert len(converted) == len(model.blocks), converted
    return model.train()


def step_of(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--model', default='vit_tiny_patch16_224')
    parser.add_argument('--drop-path', type=float, default=0.4)
    parser.add_argument('--batch', type=int, default=10)
    parser.add_argument('--steps', type=int, default=40)
    args = parser.parse_args()

    images, labels = torch.randn(args.batch, 3, 224, 224), torch.randint(10, (args.batch,))
    steps = {'undropped': step_of(contestant(args.model, 0.0, None, False), images, labels)}
    for mode in ('subset', 'batch'):
        for how, apart in (('one unit', False), ('branch by branch', True)):
            steps[f'{mode}, {how}'] = step_of(contestant(args.model, args.drop_path, mode, apart), images, labels)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(args.steps + 3):  # the first three are not counted
        for name, step in steps.items():
            taken = step()
            if index >= 3:
                seconds[name].append(taken)

    print(f'{args.model}, batch {args.batch}, uniform rate {args.drop_path}, float32, {args.steps} steps')
    print(environment())
    print(f'\n{"":<28}{"mean":>8}{"median":>8}{"ms":>8}{"sd":>6}')
    whole = seconds['undropped']
    for name, taken in seconds.items():
        mean, median = statistics.fmean(taken), statistics.median(taken)
        shares = f'{mean / statistics.fmean(whole):>8.3f}{median / statistics.median(whole):>8.3f}'
        print(f'{name:<28}{shares}{1000 * mean:>8.0f}{1000 * statistics.stdev(taken):>6.0f}')


if __name__ == '__main__':
    main()
