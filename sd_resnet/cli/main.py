"""What can be typed after `sd-resnet`, in the order in which a user meets it."""

import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import run_command
from . import commands

# What the first edition had under another name: answered with the new one.
MOVED = {
    'plot': 'sd-resnet info MODEL --plot FILE',
    'sweep': 'sd-resnet bench --drop-path RATE ...',
    'growth': 'sd-resnet bench --growth',
    'study': 'python -m sd_resnet.study',
    'release': 'python -m sd_resnet.hub release',
    'push --all': 'python -m sd_resnet.hub push-all',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, the process's own if None, and give the exit status: see `errors.run_command`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for old, new in MOVED.items():
        if argv[:1] == old.split()[:1] and set(old.split()) <= set(argv):
            print(f'sd-resnet {old}: error: now it is {new}', file=sys.stderr)
            return 2
    return run_command(_parser(), argv)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog='sd-resnet', description='Stochastic depth for timm: try, look, measure, train, cut, export, publish.'
    )
    parser.add_argument('-V', '--version', action='version', version=f'%(prog)s {__version__}')
    subparsers = parser.add_subparsers(title='commands', dest='command', required=True, metavar='COMMAND')

    def command(run: Callable[[Namespace], None], example: str) -> ArgumentParser:
        name, summary = run.__name__, run.__doc__ or ''
        sub = subparsers.add_parser(name, help=summary[:1].lower() + summary[1:].rstrip('.'), description=summary)
        sub.formatter_class, sub.epilog = RawDescriptionHelpFormatter, f'example: sd-resnet {name} {example}'
        sub.add_argument('--debug', action='store_true', help='show the traceback of an error')
        sub.set_defaults(run=run)
        return sub

    add = command(commands.quickstart, '--compare').add_argument
    add('--out', type=Path, default=Path('quickstart'), metavar='DIR', help='new folder (%(default)s)')
    add('--epochs', type=_positive, metavar='N', help='passes over the training images')
    add('--seed', type=int, default=0, metavar='N', help='of all random numbers (%(default)s)')
    add('--resume', action='store_true', help='go on where an interrupted run stopped')
    add('--compare', action='store_true', help='train the constant-depth network beside it')

    add = command(commands.info, 'sd_resnet50').add_argument
    add('model', metavar='MODEL', help='for example sd_resnet50 or sd_resnet110_cifar')
    add('--drop-path', type=float, metavar='RATE', help="1 - p_L, in [0, 1) (the model's)")
    add('--schedule', type=_schedule, metavar='NAME|LIST', help='linear, uniform, timm, 1,0.5 or [p_1, ...]')
    add('--img-size', type=_positive, metavar='PX', help="height and width (the model's)")
    add('--plot', type=_picture, metavar='FILE', help='draw them, too')

    example = '--model sd_vit_tiny_patch16_224 sd_convnext_atto --drop-path 0.1 0.2 0.4 --schedule uniform --batch 10'
    add = command(commands.bench, example).add_argument
    add('--model', dest='models', nargs='+', metavar='NAME', help='architectures (sd_resnet50)')
    add('--drop-path', '--rates', dest='rates', nargs='+', type=float, metavar='RATE', help='1 - p_L (0.5)')
    add('--batch', dest='batches', nargs='+', type=_positive, metavar='N', help='images of a step (16)')
    add('--size', dest='sizes', nargs='+', type=_positive, metavar='PX', help="height and width (the model's)")
    add('--growth', action='store_true', help='in their place: how the saving grows with depth, batch and size')
    add('--peers', action='store_true', help="beside torchvision's, DINOv2's and Composer's too; and what breaks")
    add('--schedule', type=_schedule, metavar='NAME', help="of this package's modes, uniform of timm's too (own)")
    add('--modes', nargs='+', choices=('batch', 'row', 'subset'), help='of this package (batch subset)')
    add('--steps', type=_count, metavar='N', help='of each contestant, 0 to count FLOPs only (60)')
    add('--seeds', type=_positive, metavar='N', help='runs of as many steps, each with draws of its own (1)')
    add('--saved-steps', type=_count, metavar='N', help='to count bytes kept for backward, 0 for none (20)')
    add('--amp', action='store_true', help='bfloat16 autocast')
    add('--channels-last', action='store_true', help='memory format of images and weights')
    add('--compile', action='store_true', help='run every contestant through torch.compile')
    add('--device', help='cpu, or cuda, with the peak memory of a step (cpu)')
    add('--json', type=_output_file, metavar='FILE', help="write every step's time")
    add('--plot', type=_picture, metavar='FILE', help='draw bars, or ratios over whatever takes several values')

    add = command(commands.recipe, 'fmnist').add_argument
    add('name', nargs='?', metavar='NAME', help='print its path; without it, list all')

    add = command(commands.data, 'fashion-mnist images --pad 4').add_argument
    add('name', choices=('fashion-mnist',), help='of the data set')
    add('folder', type=Path, metavar='DIR', help="for timm's --data-dir")
    add('--pad', type=int, default=0, metavar='PX', help='zeros around each training image (%(default)s)')
    add('--images', type=_positive, metavar='N', help='training images, equally many of each class (all)')

    data: dict[str, Any] = dict(type=Path, required=True, metavar='DIR', help='Fashion-MNIST, or folders of images')
    add = command(commands.evaluate, 'sd_resnet32_cifar.fmnist --data images').add_argument
    add('model', metavar='MODEL', help="timm's name of pretrained weights, hf-hub:REPO or local-dir:DIR")
    add('--data', **data)
    add('--images', type=_positive, metavar='N', help='only the first ones (all)')
    add('--json', action='store_true', help='print JSON')

    add = command(commands.prune, 'output/train/RUN --data images --out small --plot pruned.png').add_argument
    add('models', nargs='+', metavar='MODEL', help="run folder of timm's train.py, or a name of weights")
    add('--data', **data)
    add('--share', type=float, default=0.5, metavar='S', help="of the branches' FLOPs left (%(default)s)")
    add('--images', type=_positive, default=1000, metavar='N', help='that are chosen on (%(default)s)')
    add('--out', type=Path, metavar='DIR', help="write the first model's smallest network to a new folder")
    add('--json', type=_output_file, metavar='FILE', help='write all figures')
    add('--plot', type=_picture, metavar='FILE', help='draw error against FLOPs and latency')

    no_ema: dict[str, Any] = dict(action='store_true', help='take the raw weights where averaged ones are there too')
    add = command(commands.export, 'output/train/RUN/model_best.pth.tar --out resnet50.safetensors').add_argument
    add('checkpoint', type=Path, metavar='CHECKPOINT', help="of timm's train.py, or safetensors")
    add('--out', type=Path, required=True, metavar='FILE', help='safetensors file to write')
    add('--model', metavar='NAME', help='architecture, where the checkpoint does not tell')
    add('--no-ema', **no_ema)

    example = 'output/train/RUN --repo-id me/sd_resnet50.mine --license apache-2.0 --dataset ILSVRC/imagenet-1k'
    add = command(commands.push, example).add_argument
    add('source', type=Path, metavar='DIR', help="run folder of timm's train.py, or a repository folder")
    add('--repo-id', required=True, metavar='USER/NAME', help='created if it does not exist')
    add('--dry-run', type=Path, metavar='OUT', help='write what would be sent to a new folder only')
    add('--checkpoint', metavar='FILE', help='in DIR, or last, or checkpoint-9 (model_best, else last)')
    add('--no-ema', **no_ema)
    add('--plain', action='store_true', help='fold into an ordinary timm ResNet that needs no plugin')
    add('--license', metavar='NAME', help="the weights' licence by its name on the Hub")
    add('--dataset', metavar='NAME', help="the data set's name on the Hub")
    add('--private', action='store_true', help='readable with your token only')
    add('--revision', metavar='BRANCH', help='created if it does not exist (main)')
    add('--message', metavar='TEXT', help='of the commit')

    add = command(commands.verify, 'me/sd_resnet50.mine@main --fix').add_argument
    add('target', metavar='REPO[@REVISION]|DIR', help='of the Hub (or its copy in the cache), or a folder')
    add('--fix', action='store_true', help='download damaged files of the cache again')
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ArgumentTypeError(f'must be a whole number of at least 1, got {text!r}')
    return int(text)


def _count(text: str) -> int:
    return 0 if text == '0' else _positive(text)


def _output_file(text: str) -> Path:
    """A file that is written after much work: that its folder is there is seen before."""
    path = Path(text)
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise ArgumentTypeError(f'must be a file in a folder that exists, got {text!r}')
    return path


def _picture(text: str) -> Path:
    """Of a kind that matplotlib writes without anything else."""
    if Path(text).suffix not in ('.png', '.pdf', '.svg'):
        raise ArgumentTypeError(f'must end in .png, .pdf or .svg, got {text!r}')
    return _output_file(text)


def _schedule(text: str) -> str | list[float]:
    """The name of a schedule, or survival probabilities, with brackets or without."""
    try:
        return [float(prob) for prob in text.strip('[()] ').rstrip(', ').split(',')]
    except ValueError:
        return text


if __name__ == '__main__':
    sys.exit(main())
