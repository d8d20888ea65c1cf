"""Tables and pictures of the study, from its records alone: the same records give the same bytes.

Whatever cells are there are used; what is missing is named.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ..core.schedules import expected_depth
from ..figures import METHODS, new_figure, save_figure
from .cells import COMMAND, CONSTANT, STOCHASTIC, Records
from .claims import MISSING, claims_table, table

PICTURES = {  # what each shows
    'curves': 'Test error and training loss per epoch, constant depth against stochastic depth (Fig. 3 of the paper)',
    'gradient': 'Mean absolute gradient of the first convolution per epoch (Fig. 7 of the paper)',
    'sweep': 'Test error over the survival probability of the last block, linear and uniform (Fig. 8 of the paper)',
    'sub_networks': 'Test error of averages of sub-networks, and with blocks removed at test time',
}
TITLES = {CONSTANT: 'constant depth', STOCHASTIC: 'stochastic depth, $p_L$ = 0.5'}


def write_report(records: Records) -> Path:
    """Write `tables.md`, claims and all, beside the records.

    Raises:
        ValueError: There is no record.
    """
    if not records.found:
        raise ValueError(f'{records.folder} holds no record of a cell; run some with {COMMAND} first')
    tables, claims = records.folder / 'tables.md', claims_table(records)
    parts = ['# The study: tables', _preface(records), '## Claims', claims, '## Cells', *_cells(records)]
    parts += [*_analyses(records), '## Pictures', *(f'![{text}]({name}.png)' for name, text in PICTURES.items())]
    tables.write_text('\n\n'.join(parts) + '\n', encoding='utf-8')
    return tables


def _preface(records: Records) -> str:
    content = next(iter(records.found.values())).content
    scale = content['scale']
    missing = f'\n\nMissing cells: {", ".join(records.missing)}.' if records.missing else ''
    return (
        f'Written by `{COMMAND} --report` from the records in this folder. {scale["model"]}, '
        f'L = {len(content["survival_probs"])} blocks, {scale["images"]:,} training images of Fashion-MNIST, '
        f'{scale["epochs"]} epochs of {content["steps_per_epoch"]} steps, tested on all 10,000 test images after '
        'the last epoch. Mean ± standard deviation over seeds. CPU seconds: of the training steps, in one thread.'
        f'{missing}'
    )


def _cells(records: Records) -> tuple[str, str]:
    note = (
        'Branches run are counted, active blocks are the sum of p_l: row mode computes every branch. The last column '
        'divides by the constant-depth cell of the same seed.'
    )
    header = (
        *('cell', 'test error (%)', 'last training loss', 'branches run per step', 'mean number of active blocks'),
        *('gradient, last quarter', 'CPU seconds', "of constant depth's"),
    )
    rows = []
    for name, r in records.found.items():
        active, constant = expected_depth(r.content['survival_probs']), records.constant(r)
        ratio = r.seconds / constant.seconds if constant else ''
        gradient, seconds = f'{r.gradient:.2e}', f'{r.seconds:.0f}'
        rows.append((name, r.error, f'{r.loss:.4f}', r.depth, active, gradient, seconds, ratio))
    return note, table(header, rows)


def _analyses(records: Records) -> tuple[str, ...]:
    """Their numbers n are those of the scale, the same for all cells."""
    analyses = records.analysed.values()
    averages, removed = ([analysis[part] for analysis in analyses] for part in ('averages', 'removed'))
    rows = [[cell, parts['full'], *_means(parts['averages']).values()] for cell, parts in records.analysed.items()]
    return (
        '## Sub-networks',
        'Test error in percent of the whole network, as it is tested, and of averages of n sub-networks, drawn with '
        'p_L = 0.5 and unscaled as in training; mean over the groups of n that the sample holds. In bfloat16 as the '
        'test errors above, but in batches of another size: a few images come out otherwise.',
        table(['cell', 'whole', *(f'n = {n}' for each in averages[:1] for n in each)], rows),
        '## Blocks removed at test time',
        'Mean test error in percent; n = 1: each block once; else random sets of blocks, the same for all cells.',
        table(
            ['blocks removed', *records.analysed],
            list(zip(*removed[:1], *(_means(errors).values() for errors in removed))),
        ),
    )


def _means(errors: Mapping[str, Sequence[float]]) -> dict[int, float]:
    return {int(n): fmean(each) for n, each in errors.items()}


def plot_study(records: Records) -> list[Path]:
    """Draw beside the records what is there of them, the same method in the same colour everywhere.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    curves = {'test_error': 'test error (%)', 'train_loss': 'training loss (cross entropy)'}
    gradient = {'gradient': 'mean absolute gradient, first convolution'}
    figures = [_plot_epochs(records, curves, height=6.2), _plot_epochs(records, gradient, mean_over=5)]
    figures += [_plot_sweep(records), _plot_analyses(records)]
    paths = [records.folder / f'{name}.png' for name in PICTURES]
    for path, figure in zip(paths, figures):
        for axis in figure.axes:
            axis.title.set_fontsize(11)
            if axis.has_data():
                axis.legend(fontsize=8, frameon=False)
            else:
                axis.text(0.5, 0.5, MISSING, ha='center', transform=axis.transAxes)
        save_figure(figure, path)
    return paths


def _plot_epochs(records: Records, rows: Mapping[str, str], height: float = 3.6, mean_over: int = 1) -> Any:
    """Figs. 3 and 7 of the paper, a quantity a row: thin lines for seeds, thick ones for their mean."""
    from matplotlib.ticker import FixedLocator, NullLocator

    figure, axes = new_figure(2, height, rows=len(rows), sharex='col')
    for augmented, column in enumerate(axes.T):
        for axis, (name, label) in zip(column, rows.items()):
            marker = '.' if name == 'test_error' else ''  # not every epoch is tested
            for method, title in TITLES.items():
                style = {'color': METHODS[method]}
                curves = [_running_means(r.epochs[name], mean_over) for r in records.of(method, bool(augmented))]
                for curve in curves:
                    axis.plot(*zip(*curve.items()), **style, linewidth=0.6, alpha=0.5, marker=marker, markersize=3)
                if curves:
                    mean = [*map(fmean, zip(*(curve.values() for curve in curves)))]
                    axis.plot(list(curves[0]), mean, **style, linewidth=1.8, label=title)
            axis.set(yscale='log', ylabel=label)
            if name == 'test_error':
                ticks, minor = FixedLocator([10, 12, 15, 20, 30, 50, 90]), NullLocator()
                axis.yaxis.set(major_locator=ticks, minor_locator=minor, major_formatter='{x:g}')
        column[0].set_title('pad, crop and flip' if augmented else 'no augmentation')
        column[-1].set_xlabel('epoch')
    return figure


def _running_means(values: Sequence[float | None], over: int) -> dict[int, float]:
    """By epoch, of the last values; epochs without one are left out."""
    measured = {epoch: value for epoch, value in enumerate(values, start=1) if value is not None}
    found = list(measured.values())
    return {epoch: fmean(found[max(0, end - over) : end]) for end, epoch in enumerate(measured, start=1)}


def _plot_sweep(records: Records) -> Any:
    """Fig. 8 of the paper."""
    figure, ((axis,),) = new_figure(1)
    for schedule, marker in (('linear', 'o-'), ('uniform', 's-')):
        if errors := records.sweep(schedule):
            axis.plot(*zip(*errors.items()), marker, color=METHODS[f'{schedule}-0.5'], markersize=6, label=schedule)
    hollow = {'markersize': 9, 'markerfacecolor': 'none', 'markeredgewidth': 1.5}  # linear's point shows through
    for method, label in (('row-0.5', "row mode, timm's rule"), ('subset-0.5', 'subset mode, linear')):
        for record in records.of(method):
            axis.plot(0.5, record.error, 'D', color=METHODS[method], **hollow, label=label)
    if 1.0 in errors:
        axis.axhline(errors[1.0], color=METHODS[CONSTANT], linestyle='--', label='constant depth')
    axis.set(xlabel='survival probability of the last block, $p_L$', ylabel='test error (%)')
    axis.set_title('Seed 0, no augmentation')
    return figure


def _plot_analyses(records: Records) -> Any:
    """Averages of sub-networks, and blocks removed at test time."""
    figure, ((ensemble, removal),) = new_figure(2)
    for record in (*records.of(CONSTANT), *records.of(STOCHASTIC)):
        if parts := record.analysis:
            title, style = TITLES[record.cell.method], {'color': METHODS[record.cell.method], 'markersize': 5}
            ensemble.plot(*zip(*_means(parts['averages']).items()), 'o-', **style, label=f'{title}: average')
            ensemble.axhline(parts['full'], **style, linestyle='--', linewidth=1, label=f'{title}: whole net')
            removed = {'0': [parts['full']], **parts['removed']}
            for n, errors in removed.items():
                removal.plot([int(n)] * len(errors), errors, '.', **style, alpha=0.35)
            removal.plot(*zip(*_means(removed).items()), 'o-', **style, label=title)
    ensemble.set_xscale('log', base=2)
    ensemble.xaxis.set_major_formatter('{x:g}')
    ensemble.set(yscale='log', xlabel='sub-networks in the average', ylabel='test error (%)')
    ensemble.yaxis.set(major_formatter='{x:g}', minor_formatter='{x:g}')
    ensemble.set_title('Sampled sub-networks, $p_L$ = 0.5')
    removal.set(xlabel='blocks removed at test time', ylabel='test error (%)', title='Blocks removed')
    return figure
