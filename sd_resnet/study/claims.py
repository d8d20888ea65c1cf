"""The paper's claims. The function of each says what is found here and whether the claim, its docstring, holds."""

import math
from collections.abc import Sequence
from statistics import fmean, stdev, variance
from typing import Any

from ..analysis.costs import network_cost
from ..analysis.datasets import SIZE
from .cells import COMMAND, CONSTANT, STOCHASTIC, Records

MISSING = 'no record yet'
TESTED = 10_000  # images
PAIRS = '{constant,linear-0.5}-seed{0,1,2}'
STOCHASTIC_SEEDS = 'linear-0.5-seed{0,1,2,6,7,8}'
SEEDS = f'constant-seed{{0,1,2,3,4,5}},{STOCHASTIC_SEEDS}'


class TooFew(Exception):
    """Records of what a claim is about; says so for the table."""


def _error(records: Records, augmented: bool = False) -> tuple[str, str]:
    """lower test error than constant depth, without augmentation"""
    constant, stochastic = _both(records, 'error', augmented, least=2)
    here = f'constant {_spread(constant)}, p_L = 0.5 {_spread(stochastic)} %'
    return here, _judged(*welch(constant, stochastic))


def welch(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """First mean less the second, and the 95 % interval of Welch's t test, as of independent values, two or more each.

    Raises:
        ModuleNotFoundError: scipy is missing.
    """
    try:
        from scipy.stats import ttest_ind
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('scipy is needed for intervals: pip install "sd-resnet[quickstart]"') from error
    interval = ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    return fmean(first) - fmean(second), float(interval.low), float(interval.high)


def _judged(gain: float, low: float, high: float) -> str:
    """By an interval."""
    judged = 'yes' if low > 0 else 'no' if high < 0 else 'undecided'
    return f'{judged}: {gain:+.2f} points ({low:+.2f} to {high:+.2f})'


def _judged_by_error(gain: float, error: float) -> str:
    """By two standard errors."""
    return f'{_judged(gain, gain - 2 * error, gain + 2 * error).split(" (")[0]}, standard error {error:.2f}'


def _error_of_one(records: Records) -> float:
    """Standard error of the difference of two single cells: what seeds differ by, pooled, times the root of 2."""
    groups = [[r.error for r in records.of(method)] for method in (CONSTANT, STOCHASTIC)]
    spreads = [(variance(errors), len(errors) - 1) for errors in groups if len(errors) > 1]
    return math.sqrt(2 * sum(v * n for v, n in _enough(spreads)) / sum(n for _, n in spreads))


def _augmented_error(records: Records) -> tuple[str, str]:
    """lower test error than constant depth, with pad-and-crop and flips"""
    return _error(records, augmented=True)


def _curves(records: Records) -> tuple[str, str]:
    """constant depth ends with the lower training loss and the higher test error (Fig. 3)"""
    losses, errors = (_both(records, name, least=2) for name in ('loss', 'error'))
    (loss, *interval), gain = welch(*reversed(losses)), welch(*errors)
    here = 'loss {:.4f} and {:.4f}, {:+.4f} ({:+.4f} to {:+.4f})'.format(*map(fmean, losses), loss, *interval)
    verdicts = (_judged(loss, *interval).split(':')[0], _judged(*gain))
    return f'{here}, without augmentation', 'loss {}; error {}'.format(*verdicts)


def _time(records: Records) -> tuple[str, str]:
    """shorter training, p_L = 0.5"""
    pairs = _enough(records.pairs() + records.pairs(augmented=True), least=2)
    ratios = [s.seconds / c.seconds for c, s in pairs]
    share = network_cost(pairs[0][0].content['scale']['model'], SIZE, 0.5).expected_share
    here = f'{_spread(ratios, "pairs")} of the CPU time; share of FLOPs left {share:.3f}'
    verdict = f'{"yes" if max(ratios) < 1 else "no"}: {min(ratios):.2f} to {max(ratios):.2f}'
    error = stdev(ratios) / math.sqrt(len(ratios))
    return here, f'{verdict}; {fmean(ratios) - share:+.3f} from the share of FLOPs, standard error {error:.3f}'


def _depth(records: Records) -> tuple[str, str]:
    """mean number of active blocks is (3L - 1)/4"""
    found = _enough(records.of(STOCHASTIC))  # with augmentation the same seeds draw the same
    p = found[0].content['survival_probs']
    steps = sum(len(r.epochs['depth']) * r.content['steps_per_epoch'] for r in found)
    error = math.sqrt(sum(p_l * (1 - p_l) for p_l in p) / steps)  # of the mean of that many draws
    mean, theory = fmean(r.depth for r in found), (3 * len(p) - 1) / 4
    verdict = f'{"yes" if abs(mean - theory) <= 3 * error else "no"}: {mean - theory:+.3f}, standard error {error:.3f}'
    return f'{mean:.3f} in {steps:,} steps; L = {len(p)}: {theory:.2f}', verdict


def _gradient(records: Records) -> tuple[str, str]:
    """larger gradients of the first convolution, most of all late (Fig. 7)"""
    constant, stochastic = _both(records, 'gradient')
    here = f'{fmean(stochastic):.1e} against {fmean(constant):.1e} in the last quarter'
    if pairs := records.pairs(augmented=True):
        means = [fmean(record.gradient for record in found) for found in zip(*pairs)]
        here += f', with augmentation {means[1]:.1e} against {means[0]:.1e}'
    verdict = 'yes' if min(stochastic) > max(constant) else 'no' if max(stochastic) < min(constant) else 'undecided'
    if ratios := [s.gradient / c.gradient for c, s in records.pairs()]:
        verdict += f': {min(ratios):.0f} to {max(ratios):.0f} times without augmentation, by seed'
        if len(ratios) > 1:
            verdict += f', standard error {stdev(ratios) / math.sqrt(len(ratios)):.0f}'
    return here, verdict


def _best_rate(records: Records) -> tuple[str, str]:
    """best p_L is about 0.5 (Fig. 8, linear, seed 0)"""
    errors = _enough(records.sweep('linear'), least=4)
    best = min(errors, key=lambda p_last: errors[p_last])
    here = ', '.join(f'{p_last:g}: {error:.2f} %' for p_last, error in errors.items())
    gain = min(error for p_last, error in errors.items() if p_last != 0.5) - errors[0.5]
    return f'{here}; best at {best:g}', f'{_judged_by_error(gain, _error_of_one(records))}, to the next'


def _schedules(records: Records) -> tuple[str, str]:
    """linear decay beats uniform (seed 0)"""
    linear, uniform = records.sweep('linear'), records.sweep('uniform')
    both = {p_last: (linear[p_last], uniform[p_last]) for p_last in linear if p_last in uniform and p_last < 1}
    here = ', '.join(f'p_L = {p_last:g}: {l:.2f} against {u:.2f} %' for p_last, (l, u) in both.items())
    error = _error_of_one(records)
    verdict = _counted('better by two standard errors', [u - l > 2 * error for l, u in both.values()])
    return here, f'{verdict}, standard error {error:.2f}'


def _ensemble(records: Records) -> tuple[str, str]:
    """an implicit ensemble: the whole net, or an average of sub-networks, beats a sub-network"""
    analysis = _enough([record.analysis for record in records.of(STOCHASTIC) if record.analysis])[0]
    whole, averages = analysis['full'], analysis['averages']
    last = max(averages, key=int)
    single, many = fmean(averages['1']), fmean(averages[last])
    here = f'whole {whole:.2f} %, one sub-network {single:.2f} %, average of {last} {many:.2f} %'
    error = math.sqrt(2 * single * (100 - single) / TESTED)  # of test images; at most, for all see the same ones
    return here, f'{_judged_by_error(single - min(whole, many), error)}; one network'


def _removal(records: Records) -> tuple[str, str]:
    """it loses less than constant depth when blocks are removed (not in the paper; Veit et al., 2016)"""
    pair = _enough([(c.analysis, s.analysis) for c, s in records.pairs() if c.analysis and s.analysis])[0]
    constant, stochastic = (
        {n: fmean(errors) - analysis['full'] for n, errors in analysis['removed'].items()} for analysis in pair
    )
    shown = (n for n in ('1', '2', '4', '8') if n in constant)
    here = ', '.join(f'{n} removed: {constant[n]:+.1f} and {stochastic[n]:+.1f} points' for n in shown)
    less = sum(stochastic[n] < constant[n] for n in constant)
    return (
        f'constant and p_L = 0.5; {here}',
        f'undecided, one network of each: less at {less} of {len(constant)} numbers',
    )


def _enough(found: Any, least: int = 1) -> Any:
    if len(found) < least:
        raise TooFew('too few records yet' if found else MISSING)
    return found


def _both(records: Records, name: str, augmented: bool = False, least: int = 1) -> list[list[float]]:
    """An attribute of the records of constant depth, and of those of p_L = 0.5."""
    found = (_enough(records.of(method, augmented), least) for method in (CONSTANT, STOCHASTIC))
    return [[getattr(record, name) for record in each] for each in found]


def _counted(what: str, held: Sequence[bool]) -> str:
    judged = 'yes' if all(_enough(held)) else 'in part' if any(held) else 'no'
    return f'{judged}: {what} at {sum(held)} of {len(held)}'


def _spread(values: Sequence[float], of: str = 'seeds') -> str:
    return f'{fmean(values):.2f} ± {stdev(values):.2f} ({len(values)} {of})'


CLAIMS = (  # each with what the paper found, and the cells that it is about
    (_error, 'CIFAR-10: 13.63 to 11.66 %', f'{{{SEEDS}}}'),
    (_augmented_error, 'CIFAR-10+: 6.41 to 5.25 %', f'augmented-{PAIRS}'),
    (_curves, 'so in the figure', f'{{{SEEDS}}}'),
    (_time, '0.73 (15 h 07 of 20 h 42, CIFAR-10+)', f'{{augmented-,}}{PAIRS}'),
    (_depth, 'L = 54: 40.25, by theory', STOCHASTIC_SEEDS),
    (_gradient, 'larger, no figure', f'{{augmented-{PAIRS},{SEEDS}}}'),
    (_best_rate, 'best near 0.5', f'{{linear-{{0.2,0.8}}-seed0,{SEEDS}}}'),
    (_schedules, 'linear better at every p_L', f'{{linear-{{0.2,0.8}}-seed0,uniform-{{0.2,0.5,0.8}}-seed0,{SEEDS}}}'),
    (_ensemble, 'said, not measured', 'linear-0.5-seed0'),
    (_removal, 'not measured', '{constant,linear-0.5}-seed0'),
)


def claims_table(records: Records) -> str:
    """Each claim of the paper: here, there, and whether it holds at this scale; a claim needs its records."""
    rows = []
    for measure, paper, cells in CLAIMS:
        try:
            here, verdict = measure(records)
        except TooFew as error:
            here = verdict = str(error)
        rows.append((measure.__doc__, here, paper, verdict, f'`{cells}`'))
    return table(('claim of the paper', 'here', 'in the paper', 'holds at this scale', f'`{COMMAND} --cells`'), rows)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """In Markdown; numbers with two decimals, and where there is no row, no record."""
    if not rows:
        return f'{MISSING}.'
    lines = (header, ['---'] * len(header), *rows)
    texts = ([f'{each:.2f}' if isinstance(each, float) else str(each) for each in line] for line in lines)
    return '\n'.join(f'| {" | ".join(line)} |' for line in texts)
