"""The paper's claims, one row each: here, there, and whether it holds at this scale."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Any

from ..analysis.costs import network_cost
from .records import (
    CONSTANT,
    STOCHASTIC,
    Records,
    cpu_seconds,
    final_error,
    late_gradient,
    observed_depth,
    sweep,
)

MISSING = 'no record yet'
IMAGE_SIZE = 28


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
    parts = records.analysis(STOCHASTIC)
    if parts is None:
        return [claim, MISSING, 'said, not measured', MISSING]
    averages, whole = parts['averages'], parts['full']
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
    constant, stochastic = records.analysis(CONSTANT), records.analysis(STOCHASTIC)
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


def spread(values: Iterable[float], of: str = 'seed') -> str:
    """Mean and standard deviation over seeds, or pairs of cells."""
    values = list(values)
    if len(values) < 2:
        return f'{values[0]:.2f} (one {of})' if values else MISSING
    return f'{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f} ({len(values)} {of}s)'


def table(*header: str, rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)
