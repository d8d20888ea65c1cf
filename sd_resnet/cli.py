"""The command `sd-resnet`: argument parsing only. Exit status 0 on success, 2 on wrong usage, 1 with a reason."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import __version__

GROWTH = ('sd_resnet50', 'sd_resnet101', 'sd_resnet152')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, without the program's name; None is the process's own."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt as error:
        print(f'\nsd-resnet {args.command}: interrupted; {error}'.rstrip('; '), file=sys.stderr)
        return 1
    except _UsageError as error:
        print(f'sd-resnet {args.command}: error: {error}', file=sys.stderr)
        return 2
    except Exception as error:
        if args.debug:
            raise
        reason = ' '.join(str(error).split()) or type(error).__name__
        print(f'sd-resnet {args.command}: {reason}', file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='sd-resnet',
        description='ResNets with stochastic depth for timm: try, look at, measure, export and publish them.',
    )
    parser.add_argument('--version', action='version', version=f'%(prog)s {__version__}')
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument('--debug', action='store_true', help='show the traceback of an error')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    def command(name: str, summary: str, example: str, run: object) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            parents=[common],
            formatter_class=argparse.RawDescriptionHelpFormatter,
            help=summary,
            description=summary[0].upper() + summary[1:] + '.',
            epilog=f'example: sd-resnet {example}',
        )
        sub.set_defaults(run=run)
        return sub

    sub = command(
        'quickstart',
        'train on digits, publish to a folder, load it back',
        'quickstart --out quickstart --compare',
        _quickstart,
    )
    sub.add_argument('--out', type=Path, default=Path('quickstart'), metavar='DIR', help='new folder (%(default)s)')
    sub.add_argument('--epochs', type=_positive, default=None, metavar='N', help='passes over the training images')
    sub.add_argument('--seed', type=int, default=0, metavar='N', help='of all random numbers (%(default)s)')
    sub.add_argument('--resume', action='store_true', help='go on where an interrupted run stopped')
    sub.add_argument('--compare', action='store_true', help='train the constant-depth network beside it')

    for name, summary, example, run in (
        ('info', 'table of the blocks: survival probability, parameters, FLOPs', 'info sd_resnet50', _info),
        ('plot', 'draw survival probability and FLOPs of the blocks', 'plot sd_resnet50 --out sd_resnet50.png', _plot),
    ):
        sub = command(name, summary, example, run)
        sub.add_argument('model', metavar='MODEL', help='for example sd_resnet50 or sd_resnet110_cifar')
        sub.add_argument('--drop-path', type=float, metavar='RATE', help="1 - p_L, in [0, 1) (the model's: 0.5)")
        sub.add_argument(
            '--schedule', type=_schedule, metavar='NAME|LIST', help='linear, uniform, timm, or 1,0.5 or [p_1, ..., p_L]'
        )
        sub.add_argument('--img-size', type=_positive, metavar='PX', help="height and width (the model's)")
        if name == 'plot':
            sub.add_argument('--out', type=Path, metavar='FILE', help='picture to write (MODEL.png)')

    sub = command(
        'bench',
        'measure training steps of this package beside constant depth and other drop paths',
        'bench --model sd_resnet50 --batch 16 --size 128 --steps 60',
        _bench,
    )
    sub.add_argument('--model', default='sd_resnet50', metavar='NAME', help='architecture (%(default)s)')
    sub.add_argument('--batch', type=_positive, default=16, metavar='N', help='images of a step (%(default)s)')
    sub.add_argument('--size', type=_positive, metavar='PX', help="height and width (the model's)")
    sub.add_argument('--drop-path', type=float, default=0.5, metavar='RATE', help='1 - p_L (%(default)s)')
    sub.add_argument('--steps', type=_positive, default=60, metavar='N', help='of each contestant (%(default)s)')
    sub.add_argument(
        '--saved-steps', type=_positive, default=200, metavar='N', help='to count bytes kept for backward (%(default)s)'
    )
    sub.add_argument('--precision', default='float32', choices=('float32', 'bfloat16', 'float16'))
    sub.add_argument('--channels-last', action='store_true', help='memory format of images and weights')
    sub.add_argument('--compile', action='store_true', help='run every contestant through torch.compile')
    sub.add_argument('--device', default='cpu', help='for example cuda (%(default)s)')
    sub.add_argument('--modes', nargs='+', default=('batch', 'row', 'subset'), choices=('batch', 'row', 'subset'))
    sub.add_argument(
        '--peers', nargs='*', default=('timm', 'torchvision'), choices=('timm', 'torchvision'), help='drop paths (both)'
    )
    sub.add_argument('--others', nargs='+', default=(), metavar='NAME', help='further timm models to measure')
    sub.add_argument('--json', type=Path, metavar='FILE', help="write every step's time")
    sub.add_argument('--plot', type=Path, metavar='FILE', help='draw a bar chart')

    sub = command(
        'growth',
        "measure batch mode's training steps over depth and survival probability",
        'growth --models sd_resnet50 sd_resnet101 --survival 0.2 0.5 --batch 8 --size 96 --steps 40',
        _growth,
    )
    sub.add_argument('--models', nargs='+', default=GROWTH, metavar='NAME', help=f'architectures ({" ".join(GROWTH)})')
    sub.add_argument(
        '--survival', type=float, nargs='+', default=(0.2, 0.5, 0.8, 1.0), metavar='P', help='p_L (0.2 0.5 0.8 1.0)'
    )
    sub.add_argument('--batch', type=_positive, default=16, metavar='N', help='images of a step (%(default)s)')
    sub.add_argument('--size', type=_positive, metavar='PX', help="height and width (the model's)")
    sub.add_argument('--steps', type=_positive, default=40, metavar='N', help='of each contestant (%(default)s)')
    sub.add_argument('--device', default='cpu', help='for example cuda (%(default)s)')
    sub.add_argument('--json', type=Path, metavar='FILE', help="write every step's time")
    sub.add_argument('--plot', type=Path, metavar='FILE', help='draw the ratios against the share of FLOPs')

    sub = command(
        'data',
        "write a data set as timm's scripts read it, with fewer or padded training images",
        'data fashion-mnist images --pad 4',
        _data,
    )
    sub.add_argument('name', choices=('fashion-mnist',), help='of the data set')
    sub.add_argument('folder', type=Path, metavar='DIR', help="for timm's --data-dir")
    sub.add_argument('--pad', type=int, default=0, metavar='PX', help='zeros around each training image (%(default)s)')
    sub.add_argument('--images', type=_positive, metavar='N', help='training images, equally many of each class (all)')

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
    sub.add_argument('--jobs', type=_positive, default=1, metavar='N', help='cells side by side (%(default)s)')
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
    sub.add_argument('--images', type=_positive, metavar='N', help='only the first ones (all)')
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
    sub.add_argument('--half', action='store_true', help='store convolutions and classifier as float16')
    sub.add_argument('--user', default='USER', metavar='NAME', help='owner of the repository, for the card')
    sub.add_argument('--baseline', metavar='TEXT', help='what the same recipe reaches otherwise, for the card')

    sub = command(
        'export',
        'write a checkpoint as a plain timm ResNet, survival probabilities folded into the weights',
        'export output/train/RUN/model_best.pth.tar --out resnet50.safetensors',
        _export,
    )
    sub.add_argument('checkpoint', type=Path, metavar='CHECKPOINT', help="of timm's train.py, or safetensors")
    sub.add_argument('--out', type=Path, required=True, metavar='FILE', help='safetensors file to write')
    sub.add_argument('--model', metavar='NAME', help='architecture, where the checkpoint does not tell')
    sub.add_argument('--no-ema', action='store_true', help='take the raw weights where averaged ones are there too')

    sub = command(
        'push',
        'publish a training run on the Hugging Face Hub: weights, card and record in one commit, verified',
        'push output/train/RUN --repo-id me/sd_resnet50.mine --license apache-2.0 --dataset ILSVRC/imagenet-1k',
        _push,
    )
    sub.add_argument(
        'source',
        type=Path,
        nargs='?',
        metavar='DIR',
        help="run folder of timm's train.py, or a finished repository folder",
    )
    sub.add_argument('--repo-id', metavar='USER/NAME', help='created if it does not exist')
    sub.add_argument('--all', action='store_true', help='publish every entry of --repos instead of DIR')
    sub.add_argument(
        '--repos', type=Path, default=Path('hub/repos.yaml'), metavar='FILE', help='what is where (%(default)s)'
    )
    sub.add_argument(
        '--dry-run', type=Path, metavar='OUT', help='write what would be sent to a new folder, send nothing'
    )
    sub.add_argument('--checkpoint', metavar='FILE', help='in DIR (model_best.pth.tar, else last.pth.tar)')
    sub.add_argument('--no-ema', action='store_true', help='take the raw weights where averaged ones are there too')
    sub.add_argument('--plain', action='store_true', help='fold into an ordinary timm ResNet that needs no plugin')
    sub.add_argument('--license', metavar='NAME', help="the weights' licence by its name on the Hub")
    sub.add_argument('--dataset', metavar='NAME', help="the data set's name on the Hub")
    sub.add_argument('--private', action='store_true', help='readable with your token only')
    sub.add_argument('--revision', metavar='BRANCH', help='created if it does not exist (main)')
    sub.add_argument('--message', metavar='TEXT', help='of the commit')

    sub = command(
        'verify',
        "check a repository's or folder's hashes, tensors, configuration and outputs",
        'verify me/sd_resnet50.mine@main --fix',
        _verify,
    )
    sub.add_argument('target', metavar='REPO[@REVISION]|DIR', help='for example timm/resnet50.a1_in1k')
    sub.add_argument('--fix', action='store_true', help='download damaged files of the cache again')
    return parser


def _quickstart(args: argparse.Namespace) -> None:
    from . import quickstart

    options = {} if args.epochs is None else {'epochs': args.epochs}
    quickstart.run(args.out, seed=args.seed, resume=args.resume, compare=args.compare, **options)


def _info(args: argparse.Namespace) -> None:
    from .costs import cost_table, network_cost

    print(cost_table(network_cost(args.model, args.img_size, args.drop_path, args.schedule)))


def _plot(args: argparse.Namespace) -> None:
    from .costs import network_cost
    from .plots import plot_costs

    cost = network_cost(args.model, args.img_size, args.drop_path, args.schedule)
    out = args.out or Path(f'{args.model}.png')
    plot_costs(cost, out)
    print(f'wrote {out}')


def _bench(args: argparse.Namespace) -> None:
    from . import bench

    settings = bench.Settings(
        model=args.model,
        batch=args.batch,
        size=args.size,
        rate=args.drop_path,
        steps=args.steps,
        precision=args.precision,
        channels_last=args.channels_last,
        compile=args.compile,
        device=args.device,
        others=tuple(args.others),
        modes=tuple(args.modes),
        peers=tuple(args.peers),
        saved_steps=args.saved_steps,
    )
    rows = bench.run(settings)
    print(bench.table(settings, rows))
    if args.json:
        bench.save_record(settings, rows, args.json)
    if args.plot:
        from .plots import plot_bench

        plot_bench(settings, rows, args.plot)


def _growth(args: argparse.Namespace) -> None:
    from . import bench

    settings = bench.Settings(batch=args.batch, size=args.size, steps=args.steps, device=args.device)
    rows = bench.grow(settings, args.models, [1 - p for p in args.survival])
    print(bench.growth_table(settings, rows))
    if args.json:
        bench.save_record(settings, rows, args.json)
    if args.plot:
        from .plots import plot_growth

        plot_growth(settings, rows, args.plot)


def _data(args: argparse.Namespace) -> None:
    from .datasets import write_fashion_mnist

    folder = write_fashion_mnist(args.folder, args.pad, args.images)
    print(f'wrote {folder}; train with --dataset torch/fashion_mnist --data-dir {folder} --val-split test')


def _study(args: argparse.Namespace) -> None:
    from . import study

    if args.list:
        for cell in study.CELLS:
            print(f'{cell.name:<28}{" ".join(cell.arguments())}')
        return
    if args.report:
        from .study_plots import plot_study
        from .study_report import TABLES, write_report

        records = write_report(args.out, args.card)
        for path in (args.out / TABLES, *plot_study(records, args.out)):
            print(f'wrote {path}')
        if records.missing:
            print(f'missing cells: {", ".join(records.missing)}')
        return
    if args.script is None or args.data is None:
        raise _UsageError('give --script and --data, or --report, or --list')
    study.run(args.script, args.data, args.work, args.out, args.cells, args.jobs)


def _recipe(args: argparse.Namespace) -> None:
    from .recipes import recipes

    found = recipes()
    if args.name is None:
        for name, (_, summary) in found.items():
            print(f'{name:<22}{summary}')
    elif args.name in found:
        print(found[args.name][0])
    else:
        raise ValueError(f'recipe must be one of {", ".join(found)}, got {args.name!r}')


def _evaluate(args: argparse.Namespace) -> None:
    from .evaluation import evaluate

    found = evaluate(args.model, args.data, args.images, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps({'model': args.model, **dataclasses.asdict(found)}))
    else:
        print(
            f'{args.model}: top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, error {100 - found.top1:.2f} %, '
            f'{found.images} images'
        )


def _release(args: argparse.Namespace) -> None:
    from .release import release, write_index

    if args.run_folder is None:
        print(f'wrote {write_index(args.weights)}')
        return
    if args.tag is None or args.data is None:
        raise _UsageError('give --tag and --data with a run')
    folder, found = release(
        args.run_folder, args.tag, args.data, args.weights, half=args.half, user=args.user, baseline=args.baseline
    )
    print(f'wrote {folder}, top-1 {found.top1:.2f} %, error {100 - found.top1:.2f} %')


def _export(args: argparse.Namespace) -> None:
    from .checkpoints import NO_PLAIN_CIFAR, export

    architecture = export(args.checkpoint, args.out, args.model, use_ema=not args.no_ema)
    if architecture.startswith('sd_'):
        print(f'note: {NO_PLAIN_CIFAR}')
        rate = ', drop_path_rate=0'
    else:
        rate = ''
    print(
        f'wrote {args.out}; load it with timm.create_model({architecture!r}{rate}, checkpoint_path={str(args.out)!r})'
    )


def _push(args: argparse.Namespace) -> None:
    from . import hub

    written = ('checkpoint', 'no_ema', 'plain', 'license', 'dataset')
    if args.all:
        _refuse(args, '--all', 'source', 'repo_id', 'revision', 'private', *written)
    elif args.source is None or args.repo_id is None:
        raise _UsageError('give DIR and --repo-id USER/NAME, or --all')
    elif args.dry_run:
        _refuse(args, '--dry-run', 'private', 'revision', 'message')

    def send(source: Path, repo_id: str, private: bool) -> None:
        if args.dry_run:
            out = args.dry_run / repo_id.split('/')[-1] if args.all else args.dry_run
            print(
                f'wrote {hub.prepare(source, out, repo_id, **options)}, nothing was sent; look at it, and load it with'
            )
            print(f"  timm.create_model('local-dir:{out}', pretrained=True)")
            return
        with tempfile.TemporaryDirectory() as folder:
            ready = hub.prepare(source, Path(folder) / repo_id.split('/')[-1], repo_id, **options)
            done = hub.push(ready, repo_id, private=private, revision=args.revision, message=args.message)
        print(f'{"url" if done.changed else "no change"}  {done.url}\nrevision   {done.revision}')
        print(f'sha256     {done.sha256}  model.safetensors\nload it    {done.line}')

    options = {name: getattr(args, name) for name in written}
    if args.all:
        entries = hub.read_listing(args.repos)
        print(f'{args.repos}: {len(entries)} to publish')
        for folder, repo_id, private in entries:
            send(folder, repo_id, private)
    else:
        send(args.source, args.repo_id, args.private)


def _verify(args: argparse.Namespace) -> None:
    from .verification import verify

    verify(args.target, args.fix)


class _UsageError(Exception):
    """Wrong usage that argparse cannot see."""


def _refuse(args: argparse.Namespace, option: str, *names: str) -> None:
    for name in names:
        if getattr(args, name):
            raise _UsageError(
                f'{name if name == "source" else "--" + name.replace("_", "-")} does not go with {option}'
            )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text!r}')
    return int(text)


def _schedule(text: str) -> str | list[float]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return list(value) if isinstance(value, (list, tuple)) else text


if __name__ == '__main__':
    sys.exit(main())
