"""The parity study's page and picture, from its records alone: the same records give the same bytes.

Whatever cells are there are used; what is missing is named.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..figures import KEPT, METHODS, OTHER, new_figure, save_figure
from .cells import COMMAND
from .claims import MISSING, table, welch
from .parity import ARMS, NETWORKS, RATES, TIME, Parity

TITLES = {
    'none': 'no dropping',
    'timm': "timm's drop path",
    'subset': 'subset mode',
    'batch': 'batch mode',
    'decay': 'subset mode, falling rate',
}
COLOURS = {
    'none': OTHER,
    'timm': METHODS['row-0.5'],
    'subset': METHODS['subset-0.5'],
    'batch': KEPT,
    'decay': METHODS['uniform-0.5'],
}
COMPARED = (
    ('none', 'timm'),
    ('subset', 'timm'),
    ('batch', 'timm'),
    ('decay', 'timm'),
    ('subset', 'none'),
    ('batch', 'none'),
)

TOO_FEW = 'fewer than two records of an arm yet'


def write_parity(parity: Parity) -> tuple[Path, Path]:
    """Write the page, `parity.md` beside the folder of the records, and the picture into it.

    Raises:
        ValueError: There is no record.
        ModuleNotFoundError: matplotlib or scipy is missing.
    """
    if not parity.found:
        raise ValueError(f'{parity.folder} holds no record of a cell; run some with {COMMAND} parity first')
    picture, page = parity.folder / 'parity.png', parity.folder.parent / 'parity.md'
    parts = [_preface(parity), f'![Test error over training time]({parity.folder.name}/{picture.name})']
    for name, network in NETWORKS.items():
        parts += [f'## {network.title}: {parity.scale.epochs[name]} epochs', *_sections(parity, name)]
    _plot(parity, picture)
    page.write_text('\n\n'.join(parts) + '\n', encoding='utf-8')
    return page, picture


def _preface(parity: Parity) -> str:
    scale = parity.scale
    missing = f'\n\nMissing cells: {", ".join(parity.missing)}.' if parity.missing else ''
    folder = parity.folder.name
    return f"""# The same accuracy for less time?

Written by `{COMMAND} parity --report` from the records in `{folder}/`. Three small networks of timm, each trained on
{scale.images:,} images of Fashion-MNIST in batches of {scale.batch}, and tested once, on all 10,000 test images after
the last epoch. `sd_resnet/study/parity.py` states the recipe and what was fixed before. No two cells share a seed.

- Test error: mean ± standard error over seeds, in percent. Differences are in points, with 95 % intervals of Welch's t
  test for unequal variances (`scipy.stats.ttest_ind`), each for itself, not corrected for their number. They are over
  seeds: of weights, order, augmentation and draws. All cells train and are tested on the same images.
- Time: of training steps, as a share of the mean step without dropping and with timm's drop path; CPU seconds, one
  thread; forward, backward and the optimiser's step. It is from races: short trainings of all arms in one process,
  which take turns step by step. Mean ± standard error over races. The cells themselves ran on more than one machine.
- Bytes: what a training step keeps for backward, parameters excluded, as a share of no dropping's.
- Rates are those of the last block, by timm's rule; a falling one ends at 0. Dropped: the share of branches that drop,
  mean over blocks and training. The rate was chosen on {scale.held_out:,} other training images, for timm's drop path,
  by one cell for each rate, which cannot tell rates apart that are close.
- Seeds: the fifth and sixth of an arm were added when the first ones had been seen.
- The CIFAR net is none of timm's: there timm's drop path is row mode, the same mask, timed here.{missing}"""


def _sections(parity: Parity, network: str) -> list[str]:
    arms = {arm: found for arm in ARMS if (found := parity.of(network, arm))}
    searched = parity.searched(network)
    tried = [f'{rate:g}: {fmean(searched[rate]):.2f} %' for rate in RATES if rate in searched]
    best = parity.best_rate(network)
    chosen = f'chosen: {best:g}' if best is not None else 'not all cells of the search are there yet'
    search = f"Error of timm's drop path on held-out images, by rate: {', '.join(tried) or MISSING}; {chosen}."
    return [search, _arms(arms, parity.of(network, TIME)), _differences(arms), _statement(arms)]


def time_shares(races: Sequence[dict[str, Any]], arm: str, of: str = 'none') -> list[float]:
    """Of an arm's mean step time in that of another, in each race; none where there was no race yet."""
    return [
        fmean(own) / fmean(other)
        for record in races
        for own, other in zip(record['cpu_seconds'][arm], record['cpu_seconds'][of])
    ]


def _arms(arms: dict[str, list[dict[str, Any]]], races: Sequence[dict[str, Any]]) -> str:
    def bytes_kept(arm: str) -> str:
        if arm == 'decay' or 'none' not in arms:  # measured in the end, where nothing drops any more
            return ''
        kept = fmean(record['saved_bytes'] for record in arms['none'])
        return _mean_and_error([record['saved_bytes'] / kept for record in arms[arm]])

    header = (
        *('', 'rate', 'dropped', 'seeds', 'test error (%)', 'last training loss'),
        *('time, of no dropping', "time, of timm's", 'bytes'),
    )
    rows = [
        (
            TITLES[arm],
            f'{found[0]["rate_used"]:g}',
            f'{found[0]["rate_used"] / (4 if arm == "decay" else 2):.3g}',
            len(found),
            _mean_and_error([record['error'] for record in found]),
            f'{fmean(record["epochs"]["train_loss"][-1] for record in found):.3f}',
            *(_mean_and_error(time_shares(races, arm, of)) for of in ('none', 'timm')),
            bytes_kept(arm),
        )
        for arm, found in arms.items()
    ]
    return table(header, rows)


def _mean_and_error(values: Sequence[float]) -> str:
    if len(values) < 2 or len(set(values)) == 1:  # one, or a share of itself
        return ''.join(f'{value:.2f}' for value in values[:1])
    return f'{fmean(values):.2f} ± {_standard_error(values):.2f}'


def _standard_error(values: Sequence[float]) -> float:
    return stdev(values) / len(values) ** 0.5


def difference(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> tuple[float, float, float] | None:
    """Of mean test errors in points, with its 95 % interval; None with fewer than two records of either."""
    errors = [[record['error'] for record in found] for found in (first, second)]
    return welch(*errors) if min(map(len, errors)) > 1 else None


def _differences(arms: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for first, second in COMPARED:
        if found := difference(arms.get(first, ()), arms.get(second, ())):
            value, low, high = found
            rows.append((f'{TITLES[first]} - {TITLES[second]}', f'{value:+.2f}', f'{low:+.2f} to {high:+.2f}'))
    return table(('test error', 'difference (points)', '95 % interval'), rows) if rows else f'Differences: {TOO_FEW}.'


def _statement(arms: dict[str, list[dict[str, Any]]]) -> str:
    """What the data carry, and no more."""
    sentences = []
    if helped := difference(arms.get('none', ()), arms.get('timm', ())):
        _, low, high = helped
        said = 'helped' if low > 0 else 'did harm' if high < 0 else 'cannot be told from no dropping'
        sentences.append(f"timm's drop path {said} ({low:+.2f} to {high:+.2f} points of error without it).")
    for arm in ('subset', 'batch', 'decay'):
        if found := difference(arms.get(arm, ()), arms.get('timm', ())):
            _, low, high = found
            said = 'errs more than' if low > 0 else 'errs less than' if high < 0 else 'cannot be told from'
            title = TITLES[arm].capitalize()
            sentences.append(f"{title} {said} timm's drop path ({low:+.2f} to {high:+.2f} points).")
    return ' '.join(sentences) or f'What follows: {TOO_FEW}.'


def _plot(parity: Parity, path: Path) -> None:
    figure, (axes,) = new_figure(len(NETWORKS))
    for axis, (name, network) in zip(axes, NETWORKS.items()):
        for arm in ARMS:
            times, errors = time_shares(parity.of(name, TIME), arm), [each['error'] for each in parity.of(name, arm)]
            if not times or not errors:
                continue
            axis.plot([fmean(times)] * len(errors), errors, 'o', color=COLOURS[arm], markersize=4, alpha=0.5)
            bars = (_standard_error(each) if len(each) > 1 else 0 for each in (errors, times))
            means, looks = (fmean(times), fmean(errors)), {'color': COLOURS[arm], 'capsize': 2, 'markersize': 7}
            axis.errorbar(*means, *bars, fmt='D', label=TITLES[arm], **looks)
        if not axis.has_data():
            axis.text(0.5, 0.5, MISSING, ha='center', transform=axis.transAxes)
        axis.set(xlabel='training time, share of no dropping', ylabel='test error (%)')
        axis.margins(0.12)
        axis.locator_params(axis='x', nbins=4)
        axis.set_title(network.title, fontsize=10)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=len(ARMS), fontsize=8, frameon=False)
    save_figure(figure, path)
