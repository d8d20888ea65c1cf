"""The command line's part for networks cut to size."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from .cli_arguments import positive


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add them to a parser.

    Args:
        command: Makes a command from its name, summary, example and function.
    """
    sub = command(
        'prune',
        'remove the blocks of a trained network that it can best do without, and measure what is gained and lost',
        'prune output/train/RUN --data images --out small --plot pruned.png',
        _prune,
    )
    sub.add_argument(
        'models', nargs='+', metavar='MODEL', help="run folder of timm's train.py, or timm's name of pretrained weights"
    )
    sub.add_argument('--data', type=Path, required=True, metavar='DIR', help='Fashion-MNIST, or folders of images')
    sub.add_argument(
        '--share', type=float, default=0.5, metavar='S', help="of the branches' FLOPs that may be left (%(default)s)"
    )
    sub.add_argument(
        '--images', type=positive, default=1000, metavar='N', help='training images to choose on (%(default)s)'
    )
    sub.add_argument('--out', type=Path, metavar='DIR', help="write the first model's smallest network to a new folder")
    sub.add_argument('--json', type=Path, metavar='FILE', help='write all figures')
    sub.add_argument('--plot', type=Path, metavar='FILE', help='draw error against FLOPs and latency')


def _prune(args: argparse.Namespace) -> None:
    from . import pruning

    if args.out and args.out.exists():
        raise FileExistsError(f'{args.out} exists; remove it, or choose another folder')
    records = []
    for index, source in enumerate(args.models):
        name = Path(source).name if Path(source).is_dir() else source
        record, network = pruning.prune(pruning.load(source), name, args.data, args.share, args.images)
        records.append(record)
        if args.out and index == 0:
            line = pruning.save(network, args.out)
    print(pruning.table(records))
    if args.json:
        pruning.save_record(records, args.json)
    if args.plot:
        from .plots import plot_pruning

        plot_pruning(records, args.plot)
    if args.out:
        print(f'\nwrote {args.out}; load it with {line}')
