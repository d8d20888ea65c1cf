"""Tables and picture of step times, from the records in docs/results/: `python -m docs.benchmarks`, in a clone.

Writes what stands between the markers of README.md, docs/benchmarks.md, docs/gpu.md and docs/peers.md, and
docs/saving.png. Measures nothing: each record is made by the command beside it.
"""

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from sd_resnet import survival_probs
from sd_resnet.bench.measure import CONSTANT_DEPTH, TIMM, UNDROPPED, Contestant, Race
from sd_resnet.bench.report import break_even, standard_error
from sd_resnet.figures import DROPPED, KEPT, METHODS, OTHER, PROBABILITY, figure_class, save_figure
from sd_resnet.files import written_whole

FOLDER = Path(__file__).parent
PAGE, GPU, PEERS = (FOLDER / f'{name}.md' for name in ('benchmarks', 'gpu', 'peers'))
README = FOLDER.parent / 'README.md'
PICTURE = FOLDER / 'saving.png'
BEGIN, END = '<!-- made by python -m docs.benchmarks: {} -->\n', '<!-- end of what is made -->\n'
THREE_RUNS = '--seeds 3 --steps 14'
ANY = f'--drop-path 0.4 --schedule uniform --batch 10 {THREE_RUNS}'
RESNET50 = '--model sd_resnet50 --size 128 --seeds 3 --steps 20 --saved-steps 40'
RECORDS = {  # and the options of `sd-resnet bench` that made them
    'resnet50': RESNET50,
    'resnet50_channels_last': f'{RESNET50} --channels-last',
    'resnet50_compiled': f'{RESNET50} --compile',
    'convnext_small': f'--model sd_convnext_small --drop-path 0.4 --size 128 {THREE_RUNS}',
    'any_vit_tiny_patch16_224': f'--model sd_vit_tiny_patch16_224 {ANY}',
    'any_convnext_atto': f'--model sd_convnext_atto {ANY}',
    'any_swin_tiny_patch4_window7_224': f'--model sd_swin_tiny_patch4_window7_224 {ANY}',
    'any_vit_tiny_patch16_224_compiled': f'--model sd_vit_tiny_patch16_224 {ANY} --compile --modes subset',
    'any_convnext_atto_compiled': f'--model sd_convnext_atto {ANY} --compile --modes subset',
    'any_swin_tiny_patch4_window7_224_compiled': (
        f'--model sd_swin_tiny_patch4_window7_224 {ANY} --compile --modes subset'
    ),
    'rates_vit_tiny': (
        '--model sd_vit_tiny_patch16_224 --drop-path 0.05 0.1 0.2 0.4 --schedule uniform --batch 10 --saved-steps 0 '
        + THREE_RUNS
    ),
    'rates_resnet50': (
        f'--model sd_resnet50 --drop-path 0.1 0.2 0.4 --schedule uniform --size 128 --saved-steps 0 {THREE_RUNS}'
    ),
    'batches_vit_tiny': (
        '--model sd_vit_tiny_patch16_224 --drop-path 0.2 --schedule uniform --batch 2 4 8 16 --saved-steps 0 '
        + THREE_RUNS
    ),
    'growth': '--growth --steps 14',
    'peers': f'--peers {THREE_RUNS}',
    'peers_short': '--peers',
    'overhead': (
        '--model sd_resnet50 sd_vit_tiny_patch16_224 sd_convnext_atto --drop-path 0 --size 128 --saved-steps 0 '
        + THREE_RUNS
    ),
}
CARD = '--device cuda --amp --batch 128 --seeds 3 --steps 40'
CARD_EAGER, CARD_COMPILED = f'{CARD} --saved-steps 10', f'{CARD} --saved-steps 0 --compile'
ON_GPU = {
    'h100_resnet50': f'--model sd_resnet50 {CARD_EAGER} --channels-last',
    'h100_vit_base': f'--model sd_vit_base_patch16_224 --drop-path 0.4 {CARD_EAGER}',
    'h100_swin_tiny': f'--model sd_swin_tiny_patch4_window7_224 --drop-path 0.4 {CARD_EAGER}',
    'h100_resnet50_compiled': f'--model sd_resnet50 {CARD_COMPILED} --channels-last',
    'h100_vit_base_compiled': f'--model sd_vit_base_patch16_224 --drop-path 0.4 {CARD_COMPILED}',
    'h100_convnext_tiny_compiled': f'--model sd_convnext_tiny --drop-path 0.4 {CARD_COMPILED} --channels-last',
}
RATES = ('rates_vit_tiny', 'rates_resnet50')
FIRST = ('resnet50', 'convnext_small', 'any_vit_tiny_patch16_224', 'any_swin_tiny_patch4_window7_224')  # in README
BESIDE_TIMM = ('subset', 'batch')
COLOURS = {TIMM: OTHER, 'subset': METHODS['subset-0.5'], 'batch': KEPT}
TITLES = {TIMM: "timm's drop path", 'subset': '`subset`', 'batch': '`batch`'}


class Record(NamedTuple):
    """One race, and how it was run."""

    name: str
    settings: dict[str, Any]
    race: Race

    @property
    def at(self) -> str:
        """Rate and schedule."""
        return f'{self.race.rate:g}, {self.settings["schedule"] or "its own"}'

    @property
    def title(self) -> str:
        """Model and conditions."""
        how = ', channels_last' * self.settings['channels_last'] + ', compiled' * self.settings['compile']
        return f'`{self.race.model}`{how}'

    @property
    def images(self) -> str:
        """Of a step."""
        return f'{self.race.batch} of {self.race.size} px'

    @property
    def constant(self) -> str:
        """Milliseconds of a step at constant depth."""
        return f'{1e3 * statistics.fmean(map(statistics.fmean, self.race.contestants[CONSTANT_DEPTH].seconds)):.0f} ms'

    def share(self, contestant: str) -> str:
        """Of constant depth's mean step time, or of the contestant's own code undropped."""
        return _mean_and_error(self.race.contestants[contestant].ratios(self.race.undropped(contestant)))

    def without_luck(self, contestant: str) -> str:
        """The same, less what the draws left out or added; empty where that was not counted."""
        return _mean_and_error(self.race.contestants[contestant].ratios_without_luck(self.race.undropped(contestant)))


def _mean_and_error(ratios: Sequence[float]) -> str:
    """Over runs."""
    return f'{statistics.fmean(ratios):.3f} ± {standard_error(ratios):.3f}' if ratios else ''


def read_records(name: str) -> list[Record]:
    """One for each race; what is told of the settings is the same in all of a file."""
    record = json.loads((FOLDER / 'results' / f'{name}.json').read_text())
    found = []
    for race in record['races']:
        contestants = {each: Contestant(**measured) for each, measured in race.pop('contestants').items()}
        found.append(Record(name, record['settings'][0], Race(**race, contestants=contestants)))
    return found


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ['---'] * len(header), *rows]
    return ''.join(f'| {" | ".join(cells)} |\n' for cells in lines)


def readme_table(records: Sequence[Record]) -> str:
    header = ('network', 'rate, schedule', 'constant depth', *TITLES.values(), 'floor: FLOPs left')
    rows = (
        (f'`{each.race.model}`', each.at, f'1 ({each.constant})', *map(each.share, TITLES), f'{_floor(each):.2f}')
        for each in records
    )
    return table(header, rows)


def gpu_table(records: Sequence[Record]) -> str:
    """Times, and the peak memory of a step in `subset` mode."""
    rows = []
    for each in records:
        peaks = {name: max(contestant.peak_bytes) for name, contestant in each.race.contestants.items()}
        shares = [f'{peaks[mode] / peaks[CONSTANT_DEPTH]:.2f}' for mode in BESIDE_TIMM]
        rows.append((each.title, each.at, each.constant, *map(each.share, TITLES), *shares, f'{_floor(each):.2f}'))
    memory = (f'memory, {TITLES[mode]}' for mode in BESIDE_TIMM)
    return table(('network', 'rate, schedule', 'constant depth', *TITLES.values(), *memory, 'FLOPs left'), rows)


def _floor(record: Record) -> Any:
    return record.race.contestants['subset'].bound


def times_table(records: Sequence[Record]) -> str:
    header = (
        *('network', 'rate, schedule', 'images', 'constant depth', TITLES[TIMM]),
        *(f'{TITLES[mode]}{what}' for mode in BESIDE_TIMM for what in ('', ', no luck')),
        'FLOPs left',
    )
    return table(header, map(_times, records))


def _times(record: Record) -> list[str]:
    cells = [record.title, record.at, record.images, record.constant, record.share(TIMM)]
    for mode in BESIDE_TIMM:
        raced = mode in record.race.contestants
        cells += [f'**{record.share(mode)}**', record.without_luck(mode)] if raced else ['', '']
    return [*cells, f'{_floor(record):.3f}']


def sweep_table(races: Sequence[Record]) -> str:
    """Of records with several races."""
    header = ('network', 'images', 'rate', TITLES[TIMM], TITLES['subset'], f'{TITLES["batch"]}, no luck', 'FLOPs left')
    rows = (
        (each.title, each.images, f'{each.race.rate:g}', *map(each.share, (TIMM, 'subset')))
        + (each.without_luck('batch'), f'{_floor(each):.3f}')
        for each in races
    )
    return table(header, rows)


def break_even_table(sweeps: Sequence[Sequence[Record]]) -> str:
    """From which rate on a step is quicker than at constant depth, by each sweep over rates."""
    rows = (
        (records[0].title, *(break_even([each.race for each in records], mode) for mode in BESIDE_TIMM))
        for records in sweeps
    )
    return table(('network', *(f'{TITLES[mode]} is quicker' for mode in BESIDE_TIMM)), rows)


def overhead_table(races: Sequence[Record]) -> str:
    """Where nothing drops."""
    header = ('network', 'images', 'constant depth', *TITLES.values())
    return table(header, ((each.title, each.images, each.constant, *map(each.share, TITLES)) for each in races))


def peers_table(records: Sequence[Record]) -> str:
    """Time less the luck of the draw, and bytes, as shares of each contestant's own code undropped."""
    header = ['', *(f'{each.title}, {each.race.size} px: {what}' for each in records for what in ('time', 'bytes'))]
    names = (each for each in records[0].race.contestants if each != CONSTANT_DEPTH and not each.endswith(UNDROPPED))
    rows = [
        (TITLES.get(name, name), *(cell for each in records for cell in (_time(each, name), _bytes(each, name))))
        for name in names
    ]
    floors = (cell for each in records for cell in (f'{_floor(each):.3f}', ''))
    return table(header, [*rows, ('floor: share of FLOPs left', *floors)])


def _time(record: Record, name: str) -> str:
    return record.without_luck(name) or record.share(name)


def _bytes(record: Record, name: str) -> str:
    kept, undropped = record.race.contestants[name].saved_bytes, record.race.undropped(name).saved_bytes[0]
    return f'{statistics.fmean(kept) / undropped:.3f}'


def breaks_table() -> str:
    """What was tried of each peer and mode, on two small networks."""
    tried = json.loads((FOLDER / 'results' / 'peers.json').read_text())['breaks']
    rows = [
        (f'`{model}`', TITLES.get(each, each), *of['words'].values())
        for model in tried
        for each, of in tried[model].items()
    ]
    return table(('network', '', *tried['sd_resnet26']['subset']['words']), rows)


def bytes_table(records: Sequence[Record]) -> str:
    """Of what a step keeps for backward."""
    rows = []
    for record in records:
        raced = record.race.contestants
        bytes_ = raced[CONSTANT_DEPTH].saved_bytes[0]
        kept = [raced[mode].saved_bytes if mode in raced else [] for mode in BESIDE_TIMM]
        shares = (f'{statistics.fmean(each) / bytes_:.2f}, {max(each) / bytes_:.2f}' if each else '' for each in kept)
        rows.append((record.title, record.at, f'{bytes_ / 2**20:.0f} MiB', f'{len(kept[0])}', *shares))
    modes = (f'{TITLES[mode]}: mean, most' for mode in BESIDE_TIMM)
    return table(('network', 'rate, schedule', 'constant depth', 'steps', *modes), rows)


def commands(records: dict[str, str]) -> str:
    rows = ((f'[`{name}`](results/{name}.json)', f'`sd-resnet bench {said}`') for name, said in records.items())
    return table(('record', 'made by'), rows)


def draw(records: Sequence[Record]) -> None:
    """What is computed in one step, by whom, and what a step takes then."""
    figure = figure_class()(figsize=(9.6, 4.2), dpi=150, layout='constrained')
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.25))
    left.suptitle('What is computed in a step: 16 images, 16 blocks', fontsize=10)
    right.suptitle('What a training step takes', fontsize=10)
    _draw_work(left.subplots(3, 1, sharex=True))
    _draw_times(right.subplots(), records)
    save_figure(figure, PICTURE)


def _draw_work(axes: Any) -> None:
    """One draw of each kind for `sd_resnet50`."""
    rows = 16
    p = torch.tensor(survival_probs(16, 0.5))
    generator = torch.Generator().manual_seed(3)
    masks = torch.rand(rows, 16, generator=generator) < p
    sizes = (p * rows + torch.rand(16, generator=generator)).floor()
    starts = torch.randint(rows, (16,), generator=generator)
    windows = (torch.arange(rows)[:, None] - starts) % rows < sizes
    blocks = (torch.rand(16, generator=generator) < p).expand(rows, 16)
    said = ("timm's drop path", 'all, then times 0'), ('subset', 'what survives'), ('batch', 'whole blocks')
    for axis, (name, what), kept, lost in zip(axes, said, (masks, windows, blocks), (DROPPED, 'white', 'white')):
        colours = np.where(kept[..., None], _rgb(COLOURS['subset' if name == 'subset' else 'batch']), _rgb(lost))
        axis.imshow(colours, aspect='auto', interpolation='none')
        axis.set_xticks(np.arange(-0.5, 16), minor=True)
        axis.set_yticks(np.arange(-0.5, rows), minor=True)
        axis.grid(which='minor', color='#EEF1F4', linewidth=0.6)
        axis.tick_params(which='both', length=0, labelbottom=False, labelleft=False)
        axis.set_ylabel('images', fontsize=8)
        axis.set_title(f'{name}: {what}', fontsize=9, loc='left')
    axes[0].text(15.4, -0.9, 'grey: computed in vain', fontsize=8, ha='right', va='bottom')
    axes[-1].set_xlabel('blocks, first to last', fontsize=8)


def _rgb(colour: str) -> Any:
    return np.array([int(colour.lstrip('#')[i : i + 2], 16) for i in (0, 2, 4)] if colour != 'white' else [255] * 3)


def _draw_times(axis: Any, records: Sequence[Record]) -> None:
    ticks, height = [], 0.27
    for place, record in enumerate(records):
        constant = record.race.contestants[CONSTANT_DEPTH]
        for offset, (name, title) in zip((-height, 0, height), TITLES.items()):
            ratios = record.race.contestants[name].ratios(constant)
            ratio = statistics.fmean(ratios)
            label = title.strip('`') if place == 0 else None
            look = dict(color=COLOURS[name], label=label, xerr=standard_error(ratios), error_kw=dict(elinewidth=1))
            axis.barh(place + offset, ratio, height * 0.9, **look)
            axis.text(0.015, place + offset, f'{ratio:.2f}', va='center', color='white', fontsize=8)
        bound = record.race.contestants['batch'].bound
        label = 'floor: FLOPs left' if place == 0 else None
        axis.vlines(bound, place - 1.6 * height, place + 1.6 * height, color=PROBABILITY, linewidth=2, label=label)
        ticks.append(f'{record.race.model.removeprefix("sd_").split("_patch")[0]}\n{record.at}')
    axis.axvline(1, color='black', linewidth=1)
    axis.spines[['top', 'right']].set_visible(False)
    axis.set_yticks(range(len(ticks)), ticks, fontsize=8)
    axis.set(ylim=(len(records) - 0.4, -0.6), xlabel="share of constant depth's mean time")
    axis.legend(loc='upper center', bbox_to_anchor=(0.45, -0.16), ncols=4, fontsize=8, frameon=False, columnspacing=1)


def replaced(text: str, marker: str, made: str) -> str:
    """The text with what is made between the marker and the end of what is made."""
    head, begin, rest = text.partition(BEGIN.format(marker))
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f'the page must hold {BEGIN.format(marker)!r} and {END!r}')
    return head + begin + made + end + tail


def pages() -> dict[Path, str]:
    """What README and page are, from the records."""
    records = {name: read_records(name) for name in RECORDS}
    singles = [races[0] for races in records.values() if len(races) == 1]
    made = {'times': times_table(singles), 'bytes': bytes_table(singles), 'commands': commands(RECORDS)}
    made |= {'rates': sweep_table([race for each in RATES for race in records[each]])}
    made |= {'batches': sweep_table(records['batches_vit_tiny'])}
    made |= {'break-even': break_even_table([records[each] for each in RATES])}
    made |= {'overhead': overhead_table(records['overhead'])}
    page = PAGE.read_text()
    for marker, text in made.items():
        page = replaced(page, marker, text)
    peers = replaced(PEERS.read_text(), 'peers', peers_table(read_records('peers')))
    peers = replaced(peers, 'breaks', breaks_table())
    gpu = replaced(GPU.read_text(), 'times', gpu_table([read_records(name)[0] for name in ON_GPU]))
    return {
        PAGE: page,
        GPU: replaced(gpu, 'commands', commands(ON_GPU)),
        PEERS: peers,
        README: replaced(README.read_text(), 'table', readme_table([records[each][0] for each in FIRST])),
    }


def main() -> None:
    for path, text in pages().items():
        with written_whole(path) as part:
            part.write_text(text)
    draw([read_records(each)[0] for each in FIRST])


if __name__ == '__main__':
    main()
