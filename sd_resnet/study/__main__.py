"""`python -m sd_resnet.study`: run the study's cells, or report from their records."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError, run_command
from ..figures import figure_class
from .cells import CELLS, COMMAND, Records, Scale
from .report import plot_study, write_report
from .running import run


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status; see `errors.run_command`."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Measure the paper's claims with timm's train.py, cell by cell; go on where it was stopped.",
    )
    option = parser.add_argument
    option('--script', type=Path, metavar='FILE', help="train.py in a clone of timm's repository")
    option('--data', type=Path, metavar='DIR', help='written by sd-resnet data fashion-mnist DIR')
    option('--out', type=Path, default=Path('docs/study'), metavar='DIR', help='of records (%(default)s)')
    option('--work', type=Path, default=Path('study'), metavar='DIR', help='of images and runs (%(default)s)')
    option('--cells', nargs='+', default=(), metavar='NAME', help='to run (all); a wrong name is answered with all')
    option('--jobs', type=int, default=1, metavar='N', help='cells side by side (%(default)s)')
    option('--report', action='store_true', help='run nothing: tables and pictures from the records in --out')
    option('--card', type=Path, metavar='FILE', help='with --report: put the claims between its markers')
    option('--debug', action='store_true', help='show the traceback of an error')
    parser.set_defaults(run=_study, command='')
    return run_command(parser, argv)


def _study(args: argparse.Namespace) -> None:
    if args.report and args.cells:
        raise UsageError('--report takes all records: give it without --cells')
    if args.report:
        figure_class()  # or its absence is found when half is written
        records = Records(args.out)
        for path in (write_report(records, args.card), *plot_study(records)):
            print(f'wrote {path}')
        if records.missing:
            print(f'missing cells: {", ".join(records.missing)}')
        return
    if args.card:
        raise UsageError('--card goes with --report')
    if args.jobs < 1:
        raise UsageError(f'--jobs must be at least 1, got {args.jobs}')
    if args.script is None or args.data is None:
        raise UsageError('give --script and --data, or --report')
    cells = {cell.name: cell for cell in CELLS}
    if unknown := [name for name in args.cells if name not in cells]:
        raise ValueError(f'cells must be among {", ".join(cells)}, got {", ".join(unknown)}')
    chosen = [cell for name, cell in cells.items() if name in (args.cells or cells)]
    run(chosen, Scale(), args.script, args.data, args.work, args.out, args.jobs)


if __name__ == '__main__':
    sys.exit(main())
