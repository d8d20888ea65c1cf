"""`python -m sd_resnet.study`: run the cells of a study, or report from their records."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import UsageError, run_command
from ..figures import figure_class
from . import cells, parity
from .cells import COMMAND, Records
from .parity_report import write_parity
from .report import plot_study, write_report
from .running import run
from .training import run_parity

OUT = {'paper': Path('docs/study'), 'parity': Path('docs/study/parity')}  # of records


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; see `errors.run_command`."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Measure, cell by cell, the paper's claims with timm's train.py, or whether subset and batch mode "
        "reach the accuracy of timm's drop path in less time; go on where it was stopped.",
    )
    option = parser.add_argument
    option('study', nargs='?', choices=OUT, default='paper', help='which (%(default)s)')
    option('--script', type=Path, metavar='FILE', help="train.py in a clone of timm's repository, for paper")
    option(
        '--data',
        type=Path,
        metavar='DIR',
        help='written by sd-resnet data fashion-mnist DIR; parity reads what that reads, too',
    )
    option('--out', type=Path, metavar='DIR', help='of records (docs/study, docs/study/parity)')
    option('--work', type=Path, default=Path('study'), metavar='DIR', help='of images and runs (%(default)s)')
    option('--cells', nargs='+', default=(), metavar='NAME', help='to run (all); a wrong name is answered with all')
    option('--jobs', type=int, default=1, metavar='N', help='cells side by side (%(default)s)')
    option('--report', action='store_true', help='run nothing: tables and pictures from the records in --out')
    option('--debug', action='store_true', help='show the traceback of an error')
    parser.set_defaults(run=_study, command='')
    return run_command(parser, argv)


def _study(args: argparse.Namespace) -> None:
    paper, out = args.study == 'paper', args.out or OUT[args.study]
    if args.report and args.cells:
        raise UsageError('--report takes all records: give it without --cells')
    if args.script and not paper:
        raise UsageError('--script goes with paper')
    if args.report:
        figure_class()  # or its absence is found when half is written
        records: Any = (Records if paper else parity.Parity)(out)
        paths = (write_report(records), *plot_study(records)) if paper else write_parity(records)
        for path in paths:
            print(f'wrote {path}')
        if records.missing:
            print(f'missing cells: {", ".join(records.missing)}')
        return
    if args.jobs < 1:
        raise UsageError(f'--jobs must be at least 1, got {args.jobs}')
    if paper and None in (args.script, args.data):
        raise UsageError('give --script and --data, or --report')
    known: dict[str, Any] = {cell.name: cell for cell in (cells.CELLS if paper else parity.CELLS)}
    if unknown := [name for name in args.cells if name not in known]:
        raise ValueError(f'cells must be among {", ".join(known)}, got {", ".join(unknown)}')
    chosen = [cell for name, cell in known.items() if name in (args.cells or known)]
    if paper:
        run(chosen, cells.Scale(), args.script, args.data, args.work, out, args.jobs)
    else:
        run_parity(chosen, parity.Scale(), args.data, args.work, out, args.jobs)


if __name__ == '__main__':
    sys.exit(main())
