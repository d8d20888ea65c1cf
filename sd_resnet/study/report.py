"""Tables of the study, from its records alone: the same records give the same bytes.

Whatever cells are there are used; what is missing is named. `study_plots` draws the pictures.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..core.schedules import expected_depth
from .cells import CELLS, Cell
from .claims import MISSING, claims_table, table
from .records import (
    CONSTANT,
    STOCHASTIC,
    Record,
    Records,
    cpu_seconds,
    final_error,
    late_gradient,
    observed_depth,
    sweep,
)

TABLES = 'tables.md'
CLAIMS = ('<!-- claims: written by sd-resnet study --report -->', '<!-- end of claims -->')
ALTERNATIVES = {  # text of each picture
    'curves': 'Test error and training loss per epoch, constant depth against stochastic depth (Fig. 3 of the paper)',
    'gradient': 'Mean absolute gradient of the first convolution per epoch (Fig. 7 of the paper)',
    'sweep': 'Test error over the survival probability of the last block, linear and uniform (Fig. 8 of the paper)',
    'sub_networks': 'Test error of averages of sub-networks, and with blocks removed at test time',
}


def write_report(folder: Path, card: Path | None = None, cells: Sequence[Cell] = CELLS) -> Records:
    """Write `tables.md` beside the records, and the claims into a card, between its two markers.

    Args:
        folder: Of the records.
        card: A Markdown file with the markers; None for none.
        cells: What the study consists of.

    Raises:
        ValueError: There is no record, one is damaged, or the card has no markers.
    """
    records = Records(folder, cells)
    if not records.found:
        raise ValueError(f'{folder} holds no record of a cell; run some with sd-resnet study first')
    parts = ['# The study: tables', _preface(records), '## Claims', claims_table(records)]
    parts += ['## Cells', cells_table(records), '## Sub-networks', ensemble_table(records)]
    parts += ['## Blocks removed at test time', removal_table(records), '## Pictures', _pictures(records, '')]
    (folder / TABLES).write_text('\n\n'.join(parts) + '\n', encoding='utf-8')
    if card is not None:
        text = card.read_text(encoding='utf-8')
        before, start, rest = text.partition(CLAIMS[0])
        _, end, after = rest.partition(CLAIMS[1])
        if not start or not end or any(text.count(marker) > 1 for marker in CLAIMS):
            raise ValueError(f'{card} must hold the lines {CLAIMS[0]} and {CLAIMS[1]}, each once')
        claims = f'{claims_table(records)}\n\n{_pictures(records, f"{os.path.relpath(folder, card.parent)}/")}'
        card.write_text(f'{before}{CLAIMS[0]}\n{claims}\n{CLAIMS[1]}{after}', encoding='utf-8')
    return records


def _preface(records: Records) -> str:
    any_record = next(iter(records.found.values()))
    scale = any_record['scale']
    lines = [
        f'Written by `sd-resnet study --report` from the records in this folder. {scale["model"]}, '
        f'L = {len(any_record["survival_probs"])} blocks, {scale["images"]:,} training images of Fashion-MNIST, '
        f'{scale["epochs"]} epochs of {any_record["steps_per_epoch"]} steps, tested on all 10,000 test images after '
        'the last epoch. Mean ± standard deviation over seeds. CPU seconds: of the training steps, in one thread.'
    ]
    if records.missing:
        lines.append(f'Missing cells: {", ".join(records.missing)}.')
    return '\n\n'.join(lines)


def drawn(records: Records) -> list[str]:
    """Names of the pictures that there are records for."""
    both = bool(records.of(CONSTANT) and records.of(STOCHASTIC))
    possible = {
        'curves': both,
        'gradient': both,
        'sweep': len(sweep(records, 'linear')) > 1,
        'sub_networks': any(record['analysis'] for record in records.found.values()),
    }
    return [name for name in ALTERNATIVES if possible[name]]


def _pictures(records: Records, folder: str) -> str:
    return '\n\n'.join(f'![{ALTERNATIVES[name]}]({folder}{name}.png)' for name in drawn(records)) or f'{MISSING}.'


def cells_table(records: Records) -> str:
    """One row per cell."""
    rows = [
        [
            name,
            f'{final_error(record):.2f}',
            f'{record["epochs"]["train_loss"][-1]:.4f}',
            f'{observed_depth(record):.2f}',
            f'{expected_depth(record["survival_probs"]):.2f}',
            f'{late_gradient(record):.2e}',
            f'{cpu_seconds(record):.0f}',
            _share_of_constant(records, record),
        ]
        for name, record in records.found.items()
    ]
    header = (
        *('cell', 'test error (%)', 'last training loss', 'branches run per step', 'mean number of active blocks'),
        *('gradient, last quarter', 'CPU seconds', "of constant depth's"),
    )
    note = (
        'Branches run are counted, active blocks are the sum of p_l: row mode computes every branch. The last column '
        'divides by the constant-depth cell of the same seed.'
    )
    return f'{note}\n\n{table(*header, rows=rows)}'


def _share_of_constant(records: Records, record: Record) -> str:
    constant = [r for r in records.of(CONSTANT, record['augmented']) if r['seed'] == record['seed']]
    return f'{cpu_seconds(record) / cpu_seconds(constant[0]):.2f}' if constant else ''


def ensemble_table(records: Records) -> str:
    """Errors of sub-networks and of their averages, seed 0."""
    analysed = {name: record['analysis'] for name, record in records.found.items() if record['analysis']}
    if not analysed:
        return f'{MISSING.capitalize()}.'
    sizes = list(dict.fromkeys(n for analysis in analysed.values() for n in analysis['averages']))
    rows = [[name, f'{a["full"]:.2f}', *(_mean(a['averages'].get(n)) for n in sizes)] for name, a in analysed.items()]
    note = (
        'Test error in percent of the whole network, as it is tested, and of averages of n sub-networks, drawn with '
        'p_L = 0.5 and unscaled as in training; mean over the groups of n that the sample holds. In bfloat16 as the '
        'test errors above, but in batches of another size: a few images come out otherwise.'
    )
    return f'{note}\n\n{table("cell", "whole", *(f"n = {n}" for n in sizes), rows=rows)}'


def removal_table(records: Records) -> str:
    """Errors after removing n blocks."""
    analysed = {name: record['analysis']['removed'] for name, record in records.found.items() if record['analysis']}
    if not analysed:
        return f'{MISSING.capitalize()}.'
    counts = list(dict.fromkeys(n for removed in analysed.values() for n in removed))
    rows = [[n, *(_mean(removed.get(n)) for removed in analysed.values())] for n in counts]
    note = 'Mean test error in percent; n = 1: each block once; else random sets of blocks, the same for all cells.'
    return f'{note}\n\n{table("blocks removed", *analysed, rows=rows)}'


def _mean(values: Sequence[float] | None) -> str:
    return f'{statistics.fmean(values):.2f}' if values else ''
