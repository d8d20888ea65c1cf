"""The commands for any timm model: step times over rates, and networks cut to size."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from .arguments import output_file, positive


def add_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add them to a parser.

    Args:
        command: Makes a command from its name, summary, example and function.
    """
    sub = command(
        'sweep',
        "measure training steps over drop-path rates, beside timm's drop path: from which rate on is it worth it?",
        'sweep sd_vit_tiny_patch16_224 sd_convnext_atto --batch 10 --schedule uniform',
        _sweep,
    )
    sub.add_argument('models', nargs='+', metavar='MODEL', help='for example sd_vit_tiny_patch16_224')
    sub.add_argument('--rates', type=float, nargs='+', default=None, metavar='RATE', help='(0.05 0.1 0.2 0.3 0.4 0.5)')
    sub.add_argument('--batch', type=positive, default=10, metavar='N', help='images of a step (%(default)s)')
    sub.add_argument('--size', type=positive, metavar='PX', help="height and width (the model's)")
    sub.add_argument('--schedule', choices=('uniform', 'linear', 'timm'), help="(the model's)")
    sub.add_argument('--steps', type=positive, default=40, metavar='N', help='of each contestant (%(default)s)')
    sub.add_argument('--device', default='cpu', help='for example cuda (%(default)s)')
    sub.add_argument('--json', type=output_file, metavar='FILE', help="write every step's time")

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
    sub.add_argument('--json', type=output_file, metavar='FILE', help='write all figures')
    sub.add_argument('--plot', type=output_file, metavar='FILE', help='draw error against FLOPs and latency')


def _sweep(args: argparse.Namespace) -> None:
    from ..bench import measure as bench
    from ..bench import report as bench_report
    from ..bench import sweep

    settings = bench.Settings(
        batch=args.batch, size=args.size, steps=args.steps, device=args.device, schedule=args.schedule
    )
    swept = sweep.sweep(settings, args.models, args.rates or sweep.RATES)
    print(sweep.table(settings, swept))
    if args.json:
        bench_report.save_record(settings, swept, args.json)


def _prune(args: argparse.Namespace) -> None:
    from .. import figures as plots
    from ..analysis import pruning

    if args.out and args.out.exists():
        raise FileExistsError(f'{args.out} exists; remove it, or choose another folder')
    if args.plot:
        plots.figure_class()
    models = [pruning.load(source) for source in args.models]
    if args.out:
        pruning.check_savable(models[0])
    pruned = []
    for source, model in zip(args.models, models):
        name = Path(source).name if Path(source).is_dir() else source
        pruned.append(pruning.prune(model, name, args.data, args.share, args.images))
    records = [record for record, _ in pruned]
    networks = [network for _, own in pruned for network in own]
    pruning.measure_latency([point for record in records for point in record.points], networks)
    print(pruning.table(records))
    if args.out:
        print(f'\nwrote {args.out}; load it with {pruning.save(pruned[0][1][-1], args.out)}')
    if args.json:
        pruning.save_record(records, args.json)
    if args.plot:
        pruning.plot_pruning(records, args.plot)
