"""Four ways to compile batch mode, whose decisions no compiler may see: `python -m docs.compiled_designs`.

All train timm's `resnet50` (batch 16, 128 px, float32) with the same linear draws, p_L = 0.5, in turns, step by step,
with compiled constant depth. The compiler gets a graph for each kept block and each projection of a dropped one:

- `activation apart`: but for the last activation, which runs eagerly; this is what the package does
- `activation inside`: all of the block
- `mask left to the next`: all of the block, whose ReLU passes its gradient on unmasked; the next block's graph masks it
- `pairs`: the same, and two neighbours that are both kept are one graph
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from timeit import timeit
from types import FunctionType
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.autograd import Function

from sd_resnet import survival_probs
from sd_resnet.bench.report import environment
from sd_resnet.core.skipping import skip

DESIGNS = ('activation apart', 'activation inside', 'mask left to the next', 'pairs')
Step = Callable[[Sequence[bool]], None]  # a training step; which blocks are kept


class UnmaskedReLU(Function):
    """A ReLU whose gradient the next block masks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Masking(Function):
    """Nothing in forward; in backward the mask of the ReLU that `x` came out of."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.where(ctx.saved_tensors[0] <= 0, 0, grad)


def compiled(function: Any, name: str) -> Any:
    """With a code object of its own name, by which the compiler knows its past inputs."""
    code = function.__code__.replace(co_name=name)
    return torch.compile(FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__))


def block_sum(block: Any, x: Tensor, factor: float) -> Tensor:
    """A bottleneck, but for its last activation."""
    branch = block.act1(block.bn1(block.conv1(x)))
    branch = block.bn3(block.conv3(block.act2(block.bn2(block.conv2(branch)))))
    return torch.add(x if block.downsample is None else block.downsample(x), branch, alpha=factor)


class Network:
    """timm's `resnet50`, run block by block from a frame that is not compiled."""

    def __init__(self, design: str, model: Any) -> None:
        self.design, self.model = design, model
        self.blocks = [block for stage in (model.layer1, model.layer2, model.layer3, model.layer4) for block in stage]
        self.factors = [1 / p_l for p_l in survival_probs(len(self.blocks))]
        masks, apart, name = design in DESIGNS[2:], design == DESIGNS[0], design.replace(' ', '_')

        def entered(x: Tensor) -> Tensor:
            return Masking.apply(x) if masks else x

        def left(x: Tensor) -> Tensor:
            return x if apart else UnmaskedReLU.apply(x) if masks else x.relu()

        def kept(block: Any, factor: float) -> Any:
            return lambda x: left(block_sum(block, entered(x), factor))

        def dropped(block: Any) -> Any:
            return lambda x: left(block.downsample(entered(x)))

        def pair(first: Any, second: Any, factors: Sequence[float]) -> Any:
            return lambda x: left(block_sum(second, block_sum(first, entered(x), factors[0]).relu(), factors[1]))

        def stem(x: Tensor) -> Tensor:
            x = x.contiguous(memory_format=torch.channels_last)
            return model.maxpool(model.act1(model.bn1(model.conv1(x))))

        def head(x: Tensor) -> Tensor:
            return model.fc(model.global_pool(entered(x)))

        numbered = list(enumerate(zip(self.blocks, self.factors)))
        self.kept = [compiled(kept(block, factor), f'kept_{i}_{name}') for i, (block, factor) in numbered]
        self.dropped = [compiled(dropped(block), f'dropped_{i}_{name}') for i, (block, _) in numbered]
        self.pairs = {
            i: compiled(pair(*self.blocks[i : i + 2], self.factors[i : i + 2]), f'pair_{i}')
            for i in (range(0, len(self.blocks) - 1, 2) if design == DESIGNS[3] else ())
        }
        self.stem, self.head = compiled(stem, f'stem_{name}'), compiled(head, f'head_{name}')

    def __call__(self, x: Tensor, keeps: Sequence[bool]) -> Tensor:
        """Images to logits."""
        x, i, apart = self.stem(x), 0, self.design == DESIGNS[0]
        while i < len(self.blocks):
            if i in self.pairs and all(keeps[i : i + 2]):
                x, i = self.pairs[i](x), i + 2
                continue
            if keeps[i]:
                x = self.kept[i](x)
                x = x.relu_() if apart else x
            else:
                if self.blocks[i].downsample is not None:
                    x = self.dropped[i](x)
                    x = x.relu_() if apart else x
                x = skip(
                    x, [p for n, m in self.blocks[i].named_children() if n != 'downsample' for p in m.parameters()]
                )
            i += 1
        return self.head(x)


def training(design: str | None, images: Tensor, labels: Tensor) -> Step:
    """The step of a design, or of compiled constant depth."""
    torch.manual_seed(0)
    model = timm.create_model('resnet50', num_classes=10).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    network = torch.compile(model) if design is None else Network(design, model)

    def step(keeps: Sequence[bool]) -> None:
        optimizer.zero_grad()
        logits = network(images) if design is None else network(images, keeps)
        nn.functional.cross_entropy(logits, labels).backward()
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    parser.add_argument('--steps', type=int, default=40, help='of each design (%(default)s)')
    parser.add_argument('--batch', type=int, default=16, help='images of a step (%(default)s)')
    parser.add_argument('--size', type=int, default=128, help='their height and width in pixels (%(default)s)')
    args = parser.parse_args()
    torch.manual_seed(0)
    images, labels = torch.randn(args.batch, 3, args.size, args.size), torch.randint(10, (args.batch,))
    steps = {design: training(design, images, labels) for design in (None, *DESIGNS)}
    probs = torch.tensor(survival_probs(16))
    draws = [(torch.rand(16) < probs).tolist() for _ in range(args.steps)]
    patterns = [[kept] * 16 for kept in (True, False)] + [[i % 2 == first for i in range(16)] for first in (0, 1)]
    for step in steps.values():
        for keeps in patterns + patterns:  # now all is compiled
            step(keeps)
    seconds: dict[str | None, list[float]] = {design: [] for design in steps}
    for keeps in draws:
        for design, step in steps.items():
            seconds[design].append(timeit(lambda step=step, keeps=keeps: step(keeps), number=1))
    print(
        f'resnet50, batch {args.batch}, {args.size} px, linear p_L = 0.5, compiled, {args.steps} steps, {environment()}'
    )
    print(f'\n{"":<24}{"mean ms":>9}{"median":>9}{"ratio":>9}{"median":>9}')
    constant = seconds[None]
    for design, own in seconds.items():
        mean, median = statistics.fmean(own), statistics.median(own)
        ratios = f'{mean / statistics.fmean(constant):>9.3f}{median / statistics.median(constant):>9.3f}'
        print(f'{design or "constant depth":<24}{mean * 1e3:>9.1f}{median * 1e3:>9.1f}{ratios}')
    print('\nratio, median: to compiled constant depth')


if __name__ == '__main__':
    main()
