"""Does it pay to drop attention and MLP apart? `python docs/branch_by_branch.py > docs/branch_by_branch.txt`

`sd_resnet.convert` drops a ViT's block as one unit. Here each block is taken apart into two residual blocks, attention
and MLP, so that `convert` draws for each of them, as timm does. The contestants take turns, step by step.
"""

import argparse
import statistics
import time

import timm
import torch
from torch import nn

import sd_resnet
from sd_resnet.bench_report import environment


class Attention(nn.Module):
    """The first half of timm's ViT block."""

    def __init__(self, block):
        super().__init__()
        self.norm, self.branch, self.scale, self.drop_path = block.norm1, block.attn, block.ls1, block.drop_path1

    def forward(self, x):
        return x + self.drop_path(self.scale(self.branch(self.norm(x))))


class Mlp(Attention):
    """The second half."""

    def __init__(self, block):
        nn.Module.__init__(self)
        self.norm, self.branch, self.scale, self.drop_path = block.norm2, block.mlp, block.ls2, block.drop_path2


def contestant(name, rate, mode, apart):
    torch.manual_seed(0)
    model = timm.create_model(name, drop_path_rate=rate, num_classes=10)
    if apart:
        model.blocks = nn.Sequential(*[half for block in model.blocks for half in (Attention(block), Mlp(block))])
    if mode:
        sd_resnet.convert(model, rate, 'uniform', mode)
    return model.train()


def step_of(model, images, labels):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step():
        start = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return time.perf_counter() - start

    return step


def main():
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
    seconds = {name: [] for name in steps}
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
