"""Whoever reruns the parity study, or reads its page: cells train what they say, the page says what records carry."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean

import pytest
import torch
from timm.layers import DropPath

from sd_resnet.analysis import datasets
from sd_resnet.study import training
from sd_resnet.study.__main__ import main
from sd_resnet.study.cells import write_record
from sd_resnet.study.parity import ARMS, CELLS, NETWORKS, REPEATS, SEARCH, TIME, Cell, Parity, Scale
from sd_resnet.study.parity_report import difference, time_shares, write_parity
from sd_resnet.study.running import where_it_ran

from ..conftest import one_line

ROOT = Path(__file__).parents[2]
SMALL = Scale(images=40, held_out=50, batch=16, epochs=dict.fromkeys(NETWORKS, 3))
BEST = 0.4


def made_up(cell, scale=SMALL):
    """A record with numbers that nobody measured: the rate 0.4 errs least, and subset mode as timm's."""
    rate = cell.rate or {'none': 0.0, 'decay': 2 * BEST}.get(cell.arm, BEST)
    error = {'none': 15, SEARCH: 12 + 10 * abs(rate - BEST), 'batch': 13.6}.get(cell.arm, 13) + (0.0, 0.2)[
        cell.repeat % 2
    ]
    seconds = {'none': 10, 'subset': 8, 'batch': 7.5}
    record = {
        **dataclasses.asdict(cell),
        'rate_used': rate,
        'seed': cell.seed,
        'recipe': cell.recipe,
        'scale': dataclasses.asdict(scale),
        **where_it_ran(),
    }
    if cell.arm == TIME:  # half of a batch mode's steps are cheap, and the second race was on a slower machine
        steps = {arm: [seconds.get(arm, 10), seconds.get(arm, 10) - 2 * (arm == 'batch')] for arm in ARMS}
        return record | {'cpu_seconds': {arm: [each, [2 * s for s in each]] for arm, each in steps.items()}}
    epochs = {'train_loss': [2.0, 0.5, 0.25], 'cpu_seconds': [1.0 + cell.repeat] * 3}
    return record | {'error': error, 'saved_bytes': 1000.0 * seconds.get(cell.arm, 10), 'epochs': epochs}


def write_records(folder, cells=CELLS, scale=SMALL):
    folder.mkdir(parents=True, exist_ok=True)
    for cell in cells:
        write_record(made_up(cell, scale), folder / f'{cell.name}.json')
    return folder


def test_no_two_cells_share_name_or_seed():
    assert len({cell.name for cell in CELLS}) == len({cell.seed for cell in CELLS}) == len(CELLS)
    assert {cell.seed for cell in CELLS}.isdisjoint({*range(1000)})


def test_records_are_balanced_at_any_time():
    """A study that is stopped must not have all its seeds in one network or arm."""
    final = [cell for cell in CELLS if cell.arm in ARMS]
    assert len(final) == len(NETWORKS) * sum(REPEATS.values())
    for end in range(len(final)):
        counts = [
            sum((c.network, c.arm) == (n, arm) for c in final[:end])
            for n in NETWORKS
            for arm in ARMS
            if arm != 'decay' or end <= len(NETWORKS) * len(ARMS) * REPEATS['decay']  # it has fewer
        ]
        assert max(counts) - min(counts) <= 1


@pytest.fixture
def images_in_memory(fashion, tmp_path):
    return datasets.write_fashion_mnist(tmp_path / 'images', source=fashion)


@pytest.mark.parametrize('network', NETWORKS)
def test_the_arms_train_one_network_at_the_same_rates(network, images_in_memory):
    """Else the study compares recipes, not modes."""
    rates, kinds, losses, tensors = {}, {}, {}, {}
    for arm in (*ARMS, SEARCH):
        trained = training.Training(Cell(network, arm, 0), 0.4 if arm != 'none' else 0.0, SMALL, images_in_memory)
        tensors[arm] = {name: value.shape for name, value in trained.model.state_dict().items() if 'ramp' not in name}
        drop_paths = [m for m in trained.model.modules() if isinstance(m, DropPath)]
        rates[arm] = sorted({round(m.drop_prob, 6) for m in drop_paths} - {0.0})
        kinds[arm] = {type(m).__module__.split('.')[0] for m in drop_paths}
        if arm in ('timm', 'subset', 'batch', 'decay'):
            trained.epoch()
            losses[arm] = trained.epochs[0]['train_loss']
        if arm == 'decay':
            assert trained.model.drop_path_ramp.kind == 'decay'
            assert (trained.model.drop_path_ramp.steps, trained.model.drop_path_ramp.steps_done) == (6, 2)
    assert all(each == tensors['none'] for each in tensors.values())
    assert rates['none'] == []
    assert max(rates['timm']) == 0.4
    assert rates[SEARCH] == rates['timm'] == rates['subset'] == rates['batch'] == rates['decay']
    plain = 'sd_resnet' if network == 'resnet' else 'timm'
    assert kinds['timm'] == kinds[SEARCH] == {plain}
    assert kinds['subset'] == kinds['batch'] == {'sd_resnet'}
    assert all(0 < loss < 10 for loss in losses.values())


def test_the_recipe(images_in_memory):
    """Up in a line, down in a cosine, and all images but those of the last, incomplete batch in every epoch."""
    trained = training.Training(
        Cell('resnet', 'none', 0), 0.0, dataclasses.replace(SMALL, epochs={'resnet': 20}), images_in_memory
    )
    assert trained.optimizer.param_groups[0]['lr'] == pytest.approx(1e-6)
    assert {group['weight_decay'] for group in trained.optimizer.param_groups} == {0, 5e-4}
    rates = []
    trained.schedule.step_update, step = (
        lambda n: (step(n), rates.append(trained.optimizer.param_groups[0]['lr'])),
        (trained.schedule.step_update),
    )
    for _ in range(20):
        trained.epoch()
    assert len(rates) == 40
    assert max(rates) == rates[1] == pytest.approx(0.1, rel=0.01)
    assert rates[1:] == sorted(rates[1:], reverse=True)
    assert rates[-1] < 1e-4
    assert all(epoch['cpu_seconds'] > 0 for epoch in trained.epochs)
    assert 0 <= trained.error() <= 100
    assert trained.saved_bytes() > 1e5


def test_training_held_out_and_test_images_are_different_ones(images_in_memory):
    """A rate chosen on images that were trained on, or tested, would flatter it."""
    parts = [training.chosen_images(images_in_memory, SMALL, part) for part in ('train', 'held out', 'test')]
    assert [len(images) for images, _ in parts] == [40, 50, 100]
    assert torch.bincount(parts[0][1]).tolist() == [4] * 10
    seen = [{image.numpy().tobytes() for image in images} for images, _ in parts]
    assert len(seen[0] | seen[1] | seen[2]) == 190
    for cell, part in ((Cell('resnet', SEARCH, 0, 0.2), parts[1]), (Cell('resnet', 'timm', 0), parts[2])):
        trained = training.Training(cell, 0.2, SMALL, images_in_memory)
        assert torch.equal(trained.tested[0], part[0])
        assert torch.equal(trained.images, parts[0][0])


def test_each_image_is_cropped_and_flipped_for_itself():
    x = torch.randint(1, 256, (64, 1, 28, 28), dtype=torch.uint8)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    found = set()
    for image, whole in zip(training.augment(x), padded):
        places = [
            (top, left, flipped)
            for top in range(5)
            for left in range(5)
            for flipped in (False, True)
            if torch.equal(image.flip(-1) if flipped else image, whole[:, top : top + 28, left : left + 28])
        ]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 20


def test_the_rate_is_the_one_at_which_timms_drop_path_errs_least(tmp_path):
    search = [cell for cell in CELLS if cell.arm == SEARCH]
    parity = Parity(write_records(tmp_path, search[:-1]), SMALL)
    assert parity.best_rate(search[-1].network) is None  # not all there yet
    assert parity.rate(Cell(search[-1].network, 'subset', 0)) is None
    parity = Parity(write_records(tmp_path, search), SMALL)
    assert {parity.best_rate(network) for network in NETWORKS} == {BEST}
    assert [parity.rate(Cell('vit', arm, 0)) for arm in ARMS] == [0, BEST, BEST, BEST, 2 * BEST]


def test_a_record_at_another_rate_than_the_search_found_is_refused(tmp_path):
    write_records(tmp_path)
    path = tmp_path / 'vit-subset-1.json'
    write_record({**json.loads(path.read_text()), 'rate_used': 0.2}, path)
    with pytest.raises(ValueError, match=r'vit-subset-1\.json must be of rate 0\.4'):
        Parity(tmp_path, SMALL)


def test_the_page_from_made_up_records(tmp_path):
    folder = write_records(tmp_path / 'parity')
    page, picture = write_parity(Parity(folder, SMALL))
    text = page.read_text()
    assert picture.stat().st_size > 10_000
    assert text.count("timm's drop path helped (+1.") == 3
    assert text.count("Subset mode cannot be told from timm's drop path (-") == 3
    assert text.count("Batch mode errs more than timm's drop path (+0.") == 3
    # of races, whatever the machine; a mean of steps; bytes of a falling rate are of its end, when nothing drops
    assert '| subset mode | 0.4 | 0.2 | 6 | 13.10 ± 0.04 | 0.250 | 0.80 | 0.80 | 0.80 |' in text
    assert '| batch mode | 0.4 | 0.2 | 6 | 13.70 ± 0.04 | 0.250 | 0.65 | 0.65 | 0.75 |' in text
    assert '| subset mode, falling rate | 0.8 | 0.2 | 4 | 13.10 ± 0.06 | 0.250 | 1.00 | 1.00 |  |' in text
    assert 'by rate: 0.2: 14.00 %, 0.4: 12.00 %, 0.6: 14.00 %; chosen: 0.4.' in text
    assert 'Missing' not in text
    write_parity(Parity(folder, SMALL))
    assert page.read_text() == text


def test_the_interval_is_welchs():
    """By hand: equal variances of 1 give 4 degrees of freedom, t = 2.776; else fewer: here 2.16, t = 4.01."""

    def found(*groups):
        return difference(*([{'error': error} for error in errors] for errors in groups))

    assert found((1, 2, 3), (2, 3, 4)) == pytest.approx(
        (-1, -1 - 2.776 * (2 / 3) ** 0.5, -1 + 2.776 * (2 / 3) ** 0.5), abs=1e-3
    )
    value, low, high = found((13, 13.2, 13, 13.2), (14, 14.5, 15))
    assert value == pytest.approx(-1.4)
    assert high - low == pytest.approx(2 * 4.01 * 0.2944, rel=1e-3)
    assert found((1, 2, 3), (2,)) is None


def test_with_few_records_the_page_says_what_is_missing(tmp_path, capsys):
    folder = tmp_path / 'parity'
    command = ['parity', '--report', '--out', str(folder)]
    assert main(command) == 1
    assert 'holds no record of a cell' in one_line(capsys)
    few = [cell for cell in CELLS if cell.name in ('vit-none-0', 'vit-timm-0', 'vit-timm-1', 'vit-search-0.2-0')]
    write_records(folder, few, Scale())
    assert main(command) == 0
    text = (tmp_path / 'parity.md').read_text()
    assert 'Missing cells: convnext-search-0.2-0, resnet-search-0.2-0, vit-search-0.4-0, ' in text
    assert 'not all cells of the search are there yet' in text
    assert text.count('Differences: fewer than two records of an arm yet.') == 3
    assert '| no dropping | 0 | 0 | 1 | 15.00 | 0.250 |  |  | 1.00 |' in text  # no race yet
    assert 'missing cells: ' in capsys.readouterr().out


def test_records_of_something_else_are_named(tmp_path, fashion, capsys):
    folder = write_records(tmp_path / 'parity', scale=Scale())
    path = folder / 'vit-none-0.json'
    good = path.read_text()
    for wrong, said in (
        ('{', 'vit-none-0.json is damaged'),
        ('[]', 'vit-none-0.json is not a record of vit-none-0'),
        (good.replace('"repeat": 0', '"repeat": 1'), 'vit-none-0.json is not a record of vit-none-0'),
        (good.replace('"opt": "adamw"', '"opt": "sgd"'), 'vit-none-0.json is not a record of vit-none-0'),
        (good.replace('"seed": ', '"seed": 1'), 'vit-none-0.json is not a record of vit-none-0'),
        (good.replace('"images": 2000', '"images": 200'), 'a record of another scale'),
    ):
        path.write_text(wrong)
        for arguments in (['--report'], ['--data', str(fashion), '--work', str(tmp_path / 'work')]):
            assert main(['parity', '--out', str(folder), *arguments]) == 1
            assert said in one_line(capsys)


def test_wrong_usage_is_named(tmp_path, fashion, capsys):
    common = ['parity', '--out', str(tmp_path / 'out'), '--work', str(tmp_path / 'work')]
    for arguments in (
        ['--data', str(fashion), '--script', 'train.py'],
        ['--report', '--cells', 'vit-none-0'],
        ['--data', str(fashion), '--jobs', '0'],
    ):
        assert main([*common, *arguments]) == 2
    capsys.readouterr()
    assert main([*common, '--data', str(fashion), '--cells', 'vit']) == 1
    assert 'cells must be among vit-search-' in one_line(capsys)
    assert main([*common, '--data', str(fashion), '--cells', 'vit-timm-0', 'resnet-none-0']) == 1
    assert 'the rate of vit is not found yet' in one_line(capsys)


def test_a_race_is_of_all_arms_step_by_step(images_in_memory, monkeypatch):
    """Time of an arm that ran at another hour, or on another machine, would be that of the hour."""
    order, steps, epochs = [], training.Training.steps, training.EPOCHS

    def watched(self):
        for seconds in steps(self):
            ramp = getattr(self.model, 'drop_path_ramp', None)
            order.append(ramp.steps - ramp.steps_done if ramp else self.model.drop_path_mode if ramp else self.name)
            yield seconds

    monkeypatch.setattr(training.Training, 'steps', watched)
    rates = {arm: 0.0 if arm == 'none' else BEST for arm in ARMS}
    ended = []
    found = training.raced(Cell('vit', TIME, 0), rates, SMALL, images_in_memory, lambda: ended.append(1))
    of_a_race = SMALL.images // SMALL.batch * epochs
    assert {arm: [len(race) for race in races] for arm, races in found.items()} == {
        arm: [of_a_race] * training.RACES for arm in ARMS
    }
    assert all(seconds > 0 for races in found.values() for race in races for seconds in race)
    assert len(order) == (1 + training.RACES) * of_a_race * len(ARMS)
    assert [each for each in order if isinstance(each, int)] == [*range(of_a_race)][::-1] * (1 + training.RACES)
    assert order[4 :: len(ARMS)] == [each for each in order if isinstance(each, int)]  # each round in the same order
    assert len(ended) == 1 + training.RACES


def test_what_is_published_is_what_the_command_writes(tmp_path):
    """docs/study/parity.md, from the records beside it."""
    published = ROOT / 'docs' / 'study'
    folder = tmp_path / 'study' / 'parity'
    shutil.copytree(published / 'parity', folder)
    page, _ = write_parity(Parity(folder))
    assert page.read_text() == (published / 'parity.md').read_text()


@pytest.mark.parametrize('path', ['README.md', 'docs/study.md', 'docs/choosing.md'])
def test_what_pages_say_of_errors_is_on_the_page_of_the_records(path):
    """Every difference with its interval: `+0.09 (95 % interval -1.16 to +1.33)`, or a row of a table."""
    written = (ROOT / 'docs' / 'study' / 'parity.md').read_text() + (ROOT / 'docs' / 'study' / 'tables.md').read_text()
    known = {
        each
        for value, low, high in re.findall(r'([+-][\d.]+)(?: \| | points \()([+-][\d.]+) to ([+-][\d.]+)', written)
        for each in ((value, low, high), tuple(_negated(x) for x in (value, high, low)))
    }
    text = ' '.join((ROOT / path).read_text().split())
    said = re.findall(
        r'([+-]\d+\.\d\d)(?: points[^.(]*)?(?: \(| \| )(?:95 % interval )?([+-][\d.]+) to ([+-][\d.]+)', text
    )
    assert len(said) >= 2
    assert [each for each in said if each not in known] == []
    assert len(re.findall(r'[+-]\d\.\d\d to [+-]\d\.\d\d', text)) == len(said)


def test_the_digest_on_the_studys_page_is_of_the_records():
    """Error beside timm's drop path, its interval, and time: a row for each arm of each network."""
    text, parity = (ROOT / 'docs' / 'study.md').read_text(), Parity(ROOT / 'docs' / 'study' / 'parity')
    for network in NETWORKS:
        for arm in ('none', 'subset', 'batch', 'decay'):
            value, low, high = difference(parity.of(network, arm), parity.of(network, 'timm'))
            time = fmean(time_shares(parity.of(network, TIME), arm, 'timm'))
            assert f' | {value:+.2f} | {low:+.2f} to {high:+.2f} | {time:.2f} |\n' in text, (network, arm)


def _negated(number):
    return {'+': '-', '-': '+'}[number[0]] + number[1:]


KILLED = """
import json, sys
from pathlib import Path
from sd_resnet.analysis import datasets
from sd_resnet.study.parity import CELLS, Scale
from sd_resnet.study.training import run_parity
hashes, data, work, out, names, scale = json.loads(sys.argv[1])
datasets.SHA256 = hashes
run_parity([cell for cell in CELLS if cell.name in names], Scale(**scale), Path(data), Path(work), Path(out))
"""


def test_a_killed_study_keeps_finished_cells_and_a_seed_gives_the_same_numbers(fashion, tmp_path, capsys):
    names = ['resnet-subset-0', 'resnet-decay-0']
    out, work = (
        write_records(tmp_path / 'out', [c for c in CELLS if c.network == 'resnet' and c.arm == SEARCH]),
        tmp_path / 'work',
    )
    search = {path.name for path in out.iterdir()}
    settings = [datasets.SHA256, *map(str, (fashion, work, out)), names, dataclasses.asdict(SMALL)]
    log = tmp_path / 'log'
    with log.open('w') as file:
        code = [sys.executable, '-c', KILLED, json.dumps(settings)]
        running = subprocess.Popen(code, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=file)
    try:
        while 'resnet-decay-0: started' not in log.read_text():
            assert running.poll() is None, log.read_text()
            time.sleep(0.2)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert {path.name for path in out.iterdir()} - search == {'resnet-subset-0.json'}
    finished = (out / 'resnet-subset-0.json').stat()

    cells = [cell for cell in CELLS if cell.name in (*names, 'resnet-time-0')]
    training.run_parity(cells, SMALL, fashion, work, out)
    assert '1 cells are finished, 2 to run' in capsys.readouterr().out
    races = Parity(out, SMALL).of('resnet', TIME)[0]['cpu_seconds']
    assert {arm: len(races[arm]) for arm in ARMS} == dict.fromkeys(ARMS, training.RACES)
    assert (out / 'resnet-subset-0.json').stat() == finished
    again = json.loads((out / 'resnet-decay-0.json').read_text())
    assert again['rate_used'] == 2 * BEST
    assert again['tested_on'] == 'test images'

    path = work / 'all_images'
    torch.manual_seed(cells[1].seed)
    trained = training.Training(cells[1], 2 * BEST, SMALL, path)
    for _ in range(3):
        trained.epoch()
    assert again['epochs']['train_loss'] == pytest.approx([epoch['train_loss'] for epoch in trained.epochs], rel=1e-5)
    assert again['error'] == pytest.approx(trained.error())
