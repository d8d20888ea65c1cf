"""The parity study's page and picture, from its records alone: the same records give the same bytes.

Whatever cells are there are used; what is missing is named.
"""

from collections.abc import Sequence
from math import hypot
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from ..figures import KEPT, METHODS, OTHER, new_figure, save_figure
from .cells import COMMAND
from .claims import MISSING, table
from .parity import ARMS, NETWORKS, RATES, Parity

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

MEASURES = {
    'seconds': lambda record: sum(record['epochs']['cpu_seconds']),
    'bytes': lambda record: record['saved_bytes'],
    'loss': lambda record: record['epochs']['train_loss'][-1],
}


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
- Training time: CPU seconds of the training steps, in one thread: forward, backward and the optimiser's step. Two cells
  ran side by side, at times with other work beside them. Shares are of means, ± standard error.
- Bytes: what a training step keeps for backward, parameters excluded; where the rate falls, in the end.
- Rates are those of the last block, by timm's rule: half of it on average over the blocks. The rate was chosen on
  {scale.held_out:,} other training images, for timm's drop path, by one cell for each rate.
- The CIFAR net is none of timm's: there timm's drop path is row mode, the same mask, timed here.{missing}"""


def _sections(parity: Parity, network: str) -> list[str]:
    arms = {arm: found for arm in ARMS if (found := parity.of(network, arm))}
    searched = parity.searched(network)
    tried = [f'{rate:g}: {fmean(searched[rate]):.2f} %' for rate in RATES if rate in searched]
    best = parity.best_rate(network)
    chosen = f'chosen: {best:g}' if best is not None else 'not all cells of the search are there yet'
    search = f"Error of timm's drop path on held-out images, by rate: {', '.join(tried) or MISSING}; {chosen}."
    return [search, _arms(arms), _differences(arms), _statement(arms)]


def _arms(arms: dict[str, list[dict[str, Any]]]) -> str:
    means = {
        name: {arm: fmean(map(measure, found)) for arm, found in arms.items()} for name, measure in MEASURES.items()
    }

    def share(name: str, arm: str, of: str) -> str:
        if of not in arms:
            return ''
        of_both = [list(map(MEASURES[name], arms[each])) for each in (arm, of)]
        relative = [stdev(each) / len(each) ** 0.5 / fmean(each) for each in of_both if len(each) > 1 and arm != of]
        ratio = fmean(of_both[0]) / fmean(of_both[1])
        return f'{ratio:.2f}' + (f' ± {ratio * hypot(*relative):.2f}' if len(relative) == 2 else '')

    header = (
        *('', 'rate', 'seeds', 'test error (%)', 'last training loss', 'CPU seconds'),
        *('time: of no dropping', "of timm's", 'bytes: of no dropping', "of timm's"),
    )
    rows = [
        (
            TITLES[arm],
            f'{found[0]["rate_used"]:g}',
            len(found),
            _mean_and_error([record['error'] for record in found]),
            f'{means["loss"][arm]:.3f}',
            f'{means["seconds"][arm]:.0f}',
            *(share(name, arm, of) for name in ('seconds', 'bytes') for of in ('none', 'timm')),
        )
        for arm, found in arms.items()
    ]
    return table(header, rows)


def _mean_and_error(values: Sequence[float]) -> str:
    error = f' ± {stdev(values) / len(values) ** 0.5:.2f}' if len(values) > 1 else ''
    return f'{fmean(values):.2f}{error}'


def difference(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> tuple[float, float, float] | None:
    """Of mean test errors in points, with its 95 % interval; None with fewer than two records of either."""
    from scipy.stats import ttest_ind

    errors = [[record['error'] for record in found] for found in (first, second)]
    if min(map(len, errors)) < 2:
        return None
    interval = ttest_ind(*errors, equal_var=False).confidence_interval(0.95)
    return fmean(errors[0]) - fmean(errors[1]), float(interval.low), float(interval.high)


def _differences(arms: dict[str, list[dict[str, Any]]]) -> str:
    rows = []
    for first, second in COMPARED:
        if found := difference(arms.get(first, ()), arms.get(second, ())):
            value, low, high = found
            rows.append((f'{TITLES[first]} - {TITLES[second]}', f'{value:+.2f}', f'{low:+.2f} to {high:+.2f}'))
    return table(('test error', 'difference (points)', '95 % interval'), rows)


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
    return ' '.join(sentences) or f'Differences: {MISSING}.'


def _plot(parity: Parity, path: Path) -> None:
    figure, (axes,) = new_figure(len(NETWORKS))
    for axis, (name, network) in zip(axes, NETWORKS.items()):
        for arm in ARMS:
            if found := parity.of(name, arm):
                points = [[MEASURES['seconds'](record) for record in found], [record['error'] for record in found]]
                axis.plot(*points, 'o', color=COLOURS[arm], markersize=4, alpha=0.6)
                axis.plot(*map(fmean, points), 'D', color=COLOURS[arm], markersize=8, label=TITLES[arm])
        if not axis.has_data():
            axis.text(0.5, 0.5, MISSING, ha='center', transform=axis.transAxes)
        axis.set_xlim(left=0)
        axis.set(xlabel='training time (CPU s)', ylabel='test error (%)')
        axis.set_title(network.title, fontsize=10)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=len(ARMS), fontsize=8, frameon=False)
    save_figure(figure, path)
