"""The commands of the zoo: data, recipes, the study, evaluation and release."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

from .arguments import UsageError, positive


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add them to a parser.

    Args:
        command: Makes a command from its name, summary, example and function.
    """
    sub = command(
        'data',
        "write a data set as timm's scripts read it, with fewer or padded training images",
        'data fashion-mnist images --pad 4',
        _data,
    )
    sub.add_argument('name', choices=('fashion-mnist',), help='of the data set')
    sub.add_argument('folder', type=Path, metavar='DIR', help="for timm's --data-dir")
    sub.add_argument('--pad', type=int, default=0, metavar='PX', help='zeros around each training image (%(default)s)')
    sub.add_argument('--images', type=positive, metavar='N', help='training images, equally many of each class (all)')

    sub = command(
        'study',
        "measure the paper's claims with timm's train.py, cell by cell; go on where it was stopped",
        'study --script pytorch-image-models/train.py --data images --jobs 2',
        _study,
    )
    sub.add_argument('--script', type=Path, metavar='FILE', help="train.py in a clone of timm's repository")
    sub.add_argument('--data', type=Path, metavar='DIR', help='written by sd-resnet data fashion-mnist DIR')
    sub.add_argument('--out', type=Path, default=Path('docs/study'), metavar='DIR', help='of records (%(default)s)')
    sub.add_argument('--work', type=Path, default=Path('study'), metavar='DIR', help='of images and runs (%(default)s)')
    sub.add_argument('--cells', nargs='+', default=(), metavar='NAME', help='to run (all); --list names them')
    sub.add_argument('--jobs', type=positive, default=1, metavar='N', help='cells side by side (%(default)s)')
    sub.add_argument('--report', action='store_true', help='run nothing: tables and pictures from the records in --out')
    sub.add_argument('--card', type=Path, metavar='FILE', help='with --report: put the claims between its markers')
    sub.add_argument('--list', action='store_true', help="name the cells and their arguments of timm's script")

    sub = command('recipe', "list recipes for timm's train.py --config, or print one's path", 'recipe fmnist', _recipe)
    sub.add_argument('name', nargs='?', metavar='NAME', help='print its path; without it, list all')

    sub = command(
        'evaluate',
        'measure the accuracy of a model on a test set',
        'evaluate sd_resnet32_cifar.fmnist --data images',
        _evaluate,
    )
    sub.add_argument('model', metavar='MODEL', help="timm's name of pretrained weights, hf-hub:REPO or local-dir:DIR")
    sub.add_argument('--data', type=Path, required=True, metavar='DIR', help='Fashion-MNIST, or folders of images')
    sub.add_argument('--images', type=positive, metavar='N', help='only the first ones (all)')
    sub.add_argument('--json', action='store_true', help='print JSON')

    sub = command(
        'release',
        'write the weights of a training run on Fashion-MNIST as a pretrained tag, and the index of all',
        'release output/train/RUN --tag fmnist --data images',
        _release,
    )
    sub.add_argument('run_folder', type=Path, nargs='?', metavar='RUN', help='without it, only the index is written')
    sub.add_argument('--tag', metavar='NAME', help='of the weights')
    sub.add_argument('--data', type=Path, metavar='DIR', help='written by sd-resnet data fashion-mnist DIR')
    sub.add_argument('--weights', type=Path, default=Path('weights'), metavar='DIR', help='of all (%(default)s)')
    sub.add_argument('--user', default='USER', metavar='NAME', help='owner of the repository, for the card')
    sub.add_argument('--notes', metavar='TEXT', help='for the card, for example how the images were prepared')
    sub.add_argument('--hardware', metavar='TEXT', help='that it was trained on, for the card')
    sub.add_argument('--baseline', metavar='TEXT', help='what the same recipe reaches otherwise, for the card')


def _data(args: argparse.Namespace) -> None:
    from ..analysis.datasets import write_fashion_mnist

    folder = write_fashion_mnist(args.folder, args.pad, args.images)
    print(f'wrote {folder}; train with --dataset torch/fashion_mnist --data-dir {folder} --val-split test')


def _study(args: argparse.Namespace) -> None:
    from ..study import cells as study

    if args.list:
        for cell in study.CELLS:
            print(f'{cell.name:<28}{" ".join(cell.arguments())}')
        return
    if args.card and not args.report:
        raise UsageError('--card goes with --report')
    if args.report:
        if args.cells:
            raise UsageError('--report takes all records: give it without --cells')
        from ..figures import figure_class
        from ..study.pictures import plot_study
        from ..study.report import TABLES, write_report

        figure_class()  # or its absence is found when half is written
        records = write_report(args.out, args.card)
        for path in (args.out / TABLES, *plot_study(records, args.out)):
            print(f'wrote {path}')
        if records.missing:
            print(f'missing cells: {", ".join(records.missing)}')
        return
    if args.script is None or args.data is None:
        raise UsageError('give --script and --data, or --report, or --list')
    study.run(args.script, args.data, args.work, args.out, args.cells, args.jobs)


def _recipe(args: argparse.Namespace) -> None:
    from ..recipes import recipes

    found = recipes()
    if args.name is None:
        for name, (_, summary) in found.items():
            print(f'{name:<22}{summary}')
    elif args.name in found:
        print(found[args.name][0])
    else:
        raise ValueError(f'recipe must be one of {", ".join(found)}, got {args.name!r}')


def _evaluate(args: argparse.Namespace) -> None:
    from ..analysis.evaluation import evaluate

    found = evaluate(args.model, args.data, args.images, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps({'model': args.model, **dataclasses.asdict(found)}))
    else:
        print(
            f'{args.model}: top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, error {100 - found.top1:.2f} %, '
            f'{found.images} images'
        )


def _release(args: argparse.Namespace) -> None:
    from ..hub.release import release, write_index

    if args.run_folder is None:
        if any((args.tag, args.data, args.notes, args.hardware, args.baseline)):
            raise UsageError('give RUN, the folder of a training run')
        print(f'wrote {write_index(args.weights)}')
        return
    if args.tag is None or args.data is None:
        raise UsageError('give --tag and --data with a run')
    options = {name: getattr(args, name) for name in ('user', 'notes', 'hardware', 'baseline')}
    folder, found = release(args.run_folder, args.tag, args.data, args.weights, **options)
    print(f'wrote {folder}, top-1 {found.top1:.2f} %, error {100 - found.top1:.2f} %')
