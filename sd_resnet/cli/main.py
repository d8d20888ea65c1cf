"""The command `sd-resnet`: argument parsing only. Exit status 0 on success, 2 on wrong usage, 1 with a reason."""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from . import converted as cli_converted
from . import zoo as cli_zoo
from .arguments import UsageError, output_file, positive

GROWTH = ('sd_resnet50', 'sd_resnet101', 'sd_resnet152')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, without the program's name; None is the process's own."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except KeyboardInterrupt as error:
        print(f'\nsd-resnet {args.command}: interrupted; {error}'.rstrip('; '), file=sys.stderr)
        return 1
    except UsageError as error:
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
    sub.add_argument('--epochs', type=positive, default=None, metavar='N', help='passes over the training images')
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
        sub.add_argument('--img-size', type=positive, metavar='PX', help="height and width (the model's)")
        if name == 'plot':
            sub.add_argument('--out', type=output_file, metavar='FILE', help='picture to write (MODEL.png)')

    sub = command(
        'bench',
        'measure training steps of this package beside constant depth and other drop paths',
        'bench --model sd_resnet50 --batch 16 --size 128 --steps 60',
        _bench,
    )
    sub.add_argument('--model', default='sd_resnet50', metavar='NAME', help='architecture (%(default)s)')
    sub.add_argument('--batch', type=positive, default=16, metavar='N', help='images of a step (%(default)s)')
    sub.add_argument('--size', type=positive, metavar='PX', help="height and width (the model's)")
    sub.add_argument('--drop-path', type=float, default=0.5, metavar='RATE', help='1 - p_L (%(default)s)')
    sub.add_argument(
        '--schedule', type=_schedule, metavar='NAME', help="of this package's modes, uniform of all drop paths (own)"
    )
    sub.add_argument('--steps', type=positive, default=60, metavar='N', help='of each contestant (%(default)s)')
    sub.add_argument(
        '--saved-steps', type=positive, default=200, metavar='N', help='to count bytes kept for backward (%(default)s)'
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
    sub.add_argument('--json', type=output_file, metavar='FILE', help="write every step's time")
    sub.add_argument('--plot', type=output_file, metavar='FILE', help='draw a bar chart')

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
    sub.add_argument('--batch', type=positive, default=16, metavar='N', help='images of a step (%(default)s)')
    sub.add_argument('--size', type=positive, metavar='PX', help="height and width (the model's)")
    sub.add_argument('--steps', type=positive, default=40, metavar='N', help='of each contestant (%(default)s)')
    sub.add_argument('--device', default='cpu', help='for example cuda (%(default)s)')
    sub.add_argument('--json', type=output_file, metavar='FILE', help="write every step's time")
    sub.add_argument('--plot', type=output_file, metavar='FILE', help='draw the ratios against the share of FLOPs')

    cli_zoo.add_commands(command)
    cli_converted.add_commands(command)

    sub = command(
        'export',
        'write a checkpoint as a plain timm ResNet',
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
    sub.add_argument('--checkpoint', metavar='FILE', help='in DIR, or last, or checkpoint-9 (model_best, else last)')
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
    sub.add_argument('target', metavar='REPO[@REVISION]|DIR', help='of the Hub (or its copy in the cache), or a folder')
    sub.add_argument('--fix', action='store_true', help='download damaged files of the cache again')
    return parser


def _quickstart(args: argparse.Namespace) -> None:
    from .. import quickstart

    options = {} if args.epochs is None else {'epochs': args.epochs}
    quickstart.run(args.out, seed=args.seed, resume=args.resume, compare=args.compare, **options)


def _info(args: argparse.Namespace) -> None:
    from ..analysis.costs import cost_table, network_cost

    print(cost_table(network_cost(args.model, args.img_size, args.drop_path, args.schedule)))


def _plot(args: argparse.Namespace) -> None:
    from ..analysis.costs import network_cost, plot_costs

    cost = network_cost(args.model, args.img_size, args.drop_path, args.schedule)
    out = args.out or Path(f'{args.model}.png')
    plot_costs(cost, out)
    print(f'wrote {out}')


def _bench(args: argparse.Namespace) -> None:
    from .. import figures as plots
    from ..bench import measure as bench
    from ..bench import report as bench_report

    if args.plot:
        plots.figure_class()
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
        schedule=args.schedule,
    )
    rows = bench.run(settings)
    print(bench_report.table(settings, rows))
    if args.json:
        bench_report.save_record(settings, rows, args.json)
    if args.plot:
        bench_report.plot_bench(settings, rows, args.plot)


def _growth(args: argparse.Namespace) -> None:
    from .. import figures as plots
    from ..bench import measure as bench
    from ..bench import report as bench_report

    if args.plot:
        plots.figure_class()
    settings = bench.Settings(batch=args.batch, size=args.size, steps=args.steps, device=args.device)
    rows = bench.grow(settings, args.models, [1 - p for p in args.survival])
    print(bench_report.growth_table(settings, rows))
    if args.json:
        bench_report.save_record(settings, rows, args.json)
    if args.plot:
        bench_report.plot_growth(settings, rows, args.plot)


def _export(args: argparse.Namespace) -> None:
    from ..resnets.checkpoints import NO_PLAIN_CIFAR, export

    architecture, model_args = export(args.checkpoint, args.out, args.model, use_ema=not args.no_ema)
    if architecture.startswith('sd_'):
        print(f'note: {NO_PLAIN_CIFAR}')
    given = ', '.join(f'{key}={value!r}' for key, value in {**model_args, 'checkpoint_path': str(args.out)}.items())
    print(f'wrote {args.out}; load it with timm.create_model({architecture!r}, {given})')


def _push(args: argparse.Namespace) -> None:
    from ..hub import repository as hub

    written = ('checkpoint', 'no_ema', 'plain', 'license', 'dataset')
    if args.all:
        _refuse(args, '--all', 'source', 'repo_id', 'revision', 'private', *written)
    elif args.source is None or args.repo_id is None:
        raise UsageError('give DIR and --repo-id USER/NAME, or --all')
    elif args.dry_run:
        _refuse(args, '--dry-run', 'private', 'revision', 'message')

    def send(source: Path, repo_id: str, private: bool | None) -> None:
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
        print(f'{"url" if done.changed else "no change":<9}  {done.url}\nrevision   {done.revision}')
        print(f'sha256     {done.sha256}  model.safetensors\nload it    {done.line}')

    options = {name: getattr(args, name) for name in written}
    if args.all:
        entries = hub.read_listing(args.repos)
        print(f'{args.repos}: {len(entries)} to publish')
        for folder, repo_id, private in entries:
            send(folder, repo_id, private)
    else:
        send(args.source, args.repo_id, args.private or None)


def _verify(args: argparse.Namespace) -> None:
    from ..hub.verify import verify

    verify(args.target, args.fix)


def _refuse(args: argparse.Namespace, option: str, *names: str) -> None:
    for name in names:
        if getattr(args, name):
            raise UsageError(f'{name if name == "source" else "--" + name.replace("_", "-")} does not go with {option}')


def _schedule(text: str) -> str | list[float]:
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return list(value) if isinstance(value, (list, tuple)) else text


if __name__ == '__main__':
    sys.exit(main())
