"""`python -m sd_resnet.hub`: the maintainers' part of publishing."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError, run_command
from .push import push, read_listing
from .release import release, rewrite_cards
from .repository import prepare


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`, without the program's name; None is the process's own."""
    parser = argparse.ArgumentParser(prog='python -m sd_resnet.hub', description='Release weights, and publish them.')
    commands = parser.add_subparsers(dest='command', required=True, metavar='COMMAND')

    summary = 'write the weights of a training run on Fashion-MNIST as a pretrained tag, its card, and the index of all'
    sub = commands.add_parser('release', help=summary, description=summary)
    sub.add_argument('run_folder', type=Path, nargs='?', metavar='RUN', help='without it, cards and index are renewed')
    sub.add_argument('--tag', metavar='NAME', help='of the weights')
    sub.add_argument('--data', type=Path, metavar='DIR', help='written by sd-resnet data fashion-mnist DIR')
    sub.add_argument('--weights', type=Path, default='weights', metavar='DIR', help='of all (%(default)s)')
    sub.add_argument('--notes', metavar='TEXT', help='for the card, for example how the images were prepared')
    sub.add_argument('--hardware', metavar='TEXT', help='that it was trained on, for the card')
    sub.add_argument('--baseline', metavar='TEXT', help='what the same recipe reaches otherwise, for the card')
    sub.set_defaults(run=_release)

    summary = 'bring the Hub in line with a listing of folders and repositories'
    sub = commands.add_parser('push-all', help=summary, description=summary)
    sub.add_argument('--repos', type=Path, default='hub/repos.yaml', metavar='FILE', help='which (%(default)s)')
    sub.add_argument('--dry-run', type=Path, metavar='OUT', help='write what would be sent to new folders there only')
    sub.add_argument('--message', metavar='TEXT', help='of the commits')
    sub.set_defaults(run=_push_all)
    for sub in commands.choices.values():
        sub.add_argument('--debug', action='store_true', help='show the traceback of an error')
    return run_command(parser, argv)


def _release(args: argparse.Namespace) -> None:
    said = {name: getattr(args, name) for name in ('notes', 'hardware', 'baseline')}
    given = (args.run_folder, args.tag, args.data)
    if not any((*given, *said.values())):
        for path in rewrite_cards(args.weights):
            print(f'wrote {path}')
        return
    if None in given:
        raise UsageError('give RUN, the folder of a training run, --tag and --data; or none, for cards and index')
    folder, found = release(args.run_folder, args.tag, args.data, args.weights, **said)
    print(f'wrote {folder}, top-1 {found.top1:.2f} %, error {100 - found.top1:.2f} %')


def _push_all(args: argparse.Namespace) -> None:
    entries = read_listing(args.repos)
    print(f'{args.repos}: {len(entries)} to publish')
    for folder, repo_id, private in entries:
        if args.dry_run:
            print(f'wrote {prepare(folder, args.dry_run / repo_id.split("/")[-1], repo_id)}, nothing was sent')
        else:
            push(folder, repo_id, private=private, message=args.message)


if __name__ == '__main__':
    sys.exit(main())
