"""Tables of the study, from its records alone: the same records give the same bytes.

Whatever cells are there are used; what is missing is named. `study_plots` draws the pictures.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .costs import network_cost
from .schedules import expected_depth
from .study import CELLS, Cell, read_record

Record = dict[str, Any]
TABLES = 'tables.md'
CLAIMS = ('<!-- claims: written by sd-resnet study --report -->', '<!-- end of claims -->')
CONSTANT, STOCHASTIC = 'constant', 'linear-0.5'
MISSING = 'no record yet'
ALTERNATIVES = {  # text of each picture
    'curves': 'Test error and training loss per epoch, constant depth against stochastic depth (Fig. 3 of the paper)',
    'gradient': 'Mean absolute gradient of the first convolution per epoch (Fig. 7 of the paper)',
    'sweep': 'Test error over the survival probability of the last block, linear and uniform (Fig. 8 of the paper)',
    'sub_networks': 'Test error of averages of sub-networks, and with blocks removed at test time',
}
IMAGE_SIZE = 28


class Records:
    """The finished cells.

    Args:
        folder: Of the records.
        cells: What the study consists of.

    Raises:
        ValueError: A record is damaged, another cell's, or of another scale than the rest.
    """

    def __init__(self, folder: Path, cells: Sequence[Cell] = CELLS) -> None:
        self.found: dict[str, Record] = {}
        self.missing: list[str] = []
        for cell in cells:
            path = folder / f'{cell.name}.json'
            if not path.is_file():
                self.missing.append(cell.name)
                continue
            self.found[cell.name] = read_record(path, cell)
        if len({json.dumps(record['scale'], sort_keys=True) for record in self.found.values()}) > 1:
            raise ValueError(f'{folder} holds records of several scales; keep one scale in a folder')

    def of(self, method: str, augmented: bool = False) -> list[Record]:
        """The records of one method, by seed."""
        return [r for r in self.found.values() if r['method'] == method and r['augmented'] == augmented]

    def pairs(self, augmented: bool = False) -> list[tuple[Record, Record]]:
        """Constant depth and p_L = 0.5 of the same seed."""
        constant = {record['seed']: record for record in self.of(CONSTANT, augmented)}
        return [(constant[r['seed']], r) for r in self.of(STOCHASTIC, augmented) if r['seed'] in constant]


def final_error(record: Record) -> float:
    """In percent, after the last epoch: no epoch is chosen on the test set."""
    return record['epochs']['test_error'][-1]


def cpu_seconds(record: Record) -> float:
    """Of all training steps."""
    return math.fsum(record['epochs']['cpu_seconds'])


def observed_depth(record: Record) -> float:
    """Mean number of branches run in a training step."""
    return statistics.fmean(record['epochs']['depth'])


def late_gradient(record: Record) -> float:
    """Mean absolute gradient of the first convolution in the last quarter of the training."""
    gradient = record['epochs']['gradient']
    return statistics.fmean(gradient[len(gradient) * 3 // 4 :])


def spread(values: Iterable[float], of: str = 'seed') -> str:
    """Mean and standard deviation over seeds, or pairs of cells."""
    values = list(values)
    if len(values) < 2:
        return f'{values[0]:.2f} (one {of})' if values else MISSING
    return f'{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)} {of}s)'


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


def claims_table(records: Records) -> str:
    """Each claim of the paper: here, there, and whether it holds at this scale."""
    pairs = '{constant,linear-0.5}-seed{0,1,2}'
    first, both = '{constant,linear-0.5}-seed0', f'{{augmented-,}}{pairs}'
    linear, uniform = '{constant,linear-0.2,linear-0.5,linear-0.8}-seed0', '{linear,uniform}-{0.2,0.5,0.8}-seed0'
    rows = [
        [*row, f'`{cells}`']
        for row, cells in (
            (_error_claim(records, augmented=False), pairs),
            (_error_claim(records, augmented=True), f'augmented-{pairs}'),
            (_curves_claim(records), pairs),
            (_time_claim(records), both),
            (_depth_claim(records), both.replace('{constant,linear-0.5}', 'linear-0.5')),
            (_gradient_claim(records), both),
            (_sweep_claim(records), linear),
            (_uniform_claim(records), uniform),
            (_ensemble_claim(records), 'linear-0.5-seed0'),
            (_removal_claim(records), first),
        )
    ]
    header = ('claim of the paper', 'here', 'in the paper', 'holds at this scale', '`sd-resnet study --cells`')
    return table(*header, rows=rows)


def _error_claim(records: Records, augmented: bool) -> list[str]:
    constant = [final_error(r) for r in records.of(CONSTANT, augmented)]
    stochastic = [final_error(r) for r in records.of(STOCHASTIC, augmented)]
    how = 'with pad-and-crop and flips' if augmented else 'without augmentation'
    paper = 'CIFAR-10+: 6.41 to 5.25 %' if augmented else 'CIFAR-10: 13.63 to 11.66 %'
    here = verdict = MISSING
    if constant and stochastic:
        here = f'constant {spread(constant)}, p_L = 0.5 {spread(stochastic)} %'
    if len(constant) > 1 and len(stochastic) > 1:
        gain = statistics.fmean(constant) - statistics.fmean(stochastic)
        error = math.sqrt(
            statistics.variance(constant) / len(constant) + statistics.variance(stochastic) / len(stochastic)
        )
        judged = 'yes' if gain > 2 * error else 'no' if gain < -2 * error else 'undecided'
        verdict = f'{judged}: {gain:+.2f} points, standard error {error:.2f}'
    return [
        f'lower test error than constant depth, {how}',
        here,
        paper,
        verdict,
    ]


def _curves_claim(records: Records) -> list[str]:
    claim = 'constant depth ends with the lower training loss and the higher test error (Fig. 3)'
    constant, stochastic = records.of(CONSTANT), records.of(STOCHASTIC)
    if not constant or not stochastic:
        return [claim, MISSING, 'so in the figure', MISSING]
    losses, errors = (
        [statistics.fmean(map(value, method)) for method in (constant, stochastic)]
        for value in (lambda record: record['epochs']['train_loss'][-1], final_error)
    )
    held = (losses[0] < losses[1]) + (errors[0] > errors[1])
    return [
        claim,
        f'loss {losses[0]:.4f} and {losses[1]:.4f}, error {errors[0]:.2f} and {errors[1]:.2f} %, without augmentation',
        'so in the figure',
        ('no', 'in part', 'yes, by the means over seeds')[held],
    ]


def _time_claim(records: Records) -> list[str]:
    ratios = [cpu_seconds(s) / cpu_seconds(c) for augmented in (False, True) for c, s in records.pairs(augmented)]
    here, verdict = spread(ratios, of='pair'), MISSING
    if ratios:
        model = next(iter(records.found.values()))['scale']['model']
        share = network_cost(model, IMAGE_SIZE, 0.5).expected_share
        here += f' of the CPU time; share of FLOPs left {share:.3f}'
        above = f'{statistics.fmean(ratios) - share:+.3f} from the share of FLOPs'
        verdict = f'{"yes" if max(ratios) < 1 else "no"}: {min(ratios):.2f} to {max(ratios):.2f}; {above}'
    return ['shorter training, p_L = 0.5', here, '0.73 (15 h 07 of 20 h 42, CIFAR-10+)', verdict]


def _depth_claim(records: Records) -> list[str]:
    found = [r for augmented in (False, True) for r in records.of(STOCHASTIC, augmented)]
    claim = 'mean number of active blocks is (3L - 1)/4'
    if not found:
        return [claim, MISSING, 'L = 54: 40.25, by theory', MISSING]
    p = found[0]['survival_probs']
    steps = sum(len(r['epochs']['depth']) * r['steps_per_epoch'] for r in found)
    error = math.sqrt(sum(p_l * (1 - p_l) for p_l in p) / steps)  # of the mean of that many draws
    mean, theory = statistics.fmean(map(observed_depth, found)), (3 * len(p) - 1) / 4
    return [
        claim,
        f'{mean:.3f} in {steps:,} steps; L = {len(p)}: {theory:.2f}',
        'L = 54: 40.25, by theory',
        f'{"yes" if abs(mean - theory) <= 3 * error else "no"}: {mean - theory:+.3f}, standard error {error:.3f}',
    ]


def _gradient_claim(records: Records) -> list[str]:
    constant = [late_gradient(r) for r in records.of(CONSTANT)]
    stochastic = [late_gradient(r) for r in records.of(STOCHASTIC)]
    here, verdict = MISSING, MISSING
    if constant and stochastic:
        here = f'{statistics.fmean(stochastic):.1e} against {statistics.fmean(constant):.1e} in the last quarter'
        if pairs := records.pairs(augmented=True):
            means = (statistics.fmean(map(late_gradient, cells)) for cells in zip(*pairs))
            here += ', with augmentation {1:.1e} against {0:.1e}'.format(*means)
        ratios = [late_gradient(s) / late_gradient(c) for c, s in records.pairs()]
        judged = 'yes' if min(stochastic) > max(constant) else 'no' if max(stochastic) < min(constant) else 'undecided'
        verdict = (
            f'{judged}: {min(ratios):.0f} to {max(ratios):.0f} times without augmentation, by seed'
            if ratios
            else judged
        )
    return ['larger gradients of the first convolution, most of all late (Fig. 7)', here, 'larger, no figure', verdict]


def _sweep_claim(records: Records) -> list[str]:
    points = sweep(records, 'linear')
    claim = 'best p_L is about 0.5 (Fig. 8, linear, seed 0)'
    here = ', '.join(f'{p:g}: {error:.2f} %' for p, error in points.items()) or MISSING
    if set(points) != {0.2, 0.5, 0.8, 1.0}:
        return [claim, here, 'best near 0.5', MISSING]
    best = min(points, key=lambda p: points[p])
    return [claim, here, 'best near 0.5', f'{"yes" if best == 0.5 else "no"}: best at {best:g}']


def _uniform_claim(records: Records) -> list[str]:
    linear, uniform = sweep(records, 'linear'), sweep(records, 'uniform')
    both = [p for p in uniform if p in linear and p < 1]
    here = ', '.join(f'p_L = {p:g}: {linear[p]:.2f} against {uniform[p]:.2f} %' for p in both) or MISSING
    better = sum(linear[p] < uniform[p] for p in both)
    judged = 'yes' if better == len(both) else 'no' if better == 0 else 'in part'
    verdict = f'{judged}: better at {better} of {len(both)}' if both else MISSING
    return ['linear decay beats uniform (seed 0)', here, 'linear better at every p_L', verdict]


def _ensemble_claim(records: Records) -> list[str]:
    claim = 'an implicit ensemble: the whole net beats its sub-networks'
    analysis = _analysis(records, STOCHASTIC)
    if analysis is None:
        return [claim, MISSING, 'said, not measured', MISSING]
    averages, whole = analysis['averages'], analysis['full']
    last = max(averages, key=int)
    single, many = statistics.fmean(averages['1']), statistics.fmean(averages[last])
    return [
        claim,
        f'whole {whole:.2f} %, one sub-network {single:.2f} %, average of {last} {many:.2f} %',
        'said, not measured',
        'yes' if whole < single and many < single else 'no',
    ]


def _removal_claim(records: Records) -> list[str]:
    claim = 'it loses less than constant depth when blocks are removed (not in the paper; Veit et al., 2016)'
    constant, stochastic = _analysis(records, CONSTANT), _analysis(records, STOCHASTIC)
    if constant is None or stochastic is None:
        return [claim, MISSING, 'not measured', MISSING]
    lost = {
        n: [statistics.fmean(a['removed'][n]) - a['full'] for a in (constant, stochastic)]
        for n in constant['removed']
        if n in stochastic['removed']
    }
    shown = {n: lost[n] for n in ('1', '2', '4', '8') if n in lost}
    here = ', '.join(f'{n} removed: {c:+.1f} and {s:+.1f} points' for n, (c, s) in shown.items())
    less = sum(s < c for c, s in lost.values())
    judged = 'yes' if less == len(lost) else 'no' if less == 0 else 'in part'
    return [
        claim,
        f'constant and p_L = 0.5; {here}',
        'not measured',
        f'{judged}: less at {less} of {len(lost)} numbers',
    ]


def sweep(records: Records, schedule: str) -> dict[float, float]:
    """Test error in percent over p_L, of seed 0 without augmentation; constant depth is p_L = 1."""
    points = {
        float(record['method'].rpartition('-')[2]): final_error(record)
        for record in records.found.values()
        if record['method'].startswith(f'{schedule}-') and record['seed'] == 0 and not record['augmented']
    }
    points.update((1.0, final_error(record)) for record in records.of(CONSTANT) if record['seed'] == 0)
    return dict(sorted(points.items()))


def _analysis(records: Records, method: str) -> dict[str, Any] | None:
    return next((record['analysis'] for record in records.of(method) if record['analysis']), None)


def _mean(values: Sequence[float] | None) -> str:
    return f'{statistics.fmean(values):.2f}' if values else ''


def table(*header: str, rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)
