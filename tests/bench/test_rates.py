"""Step times over models and rates. No test looks at a time that was measured."""

import json
from dataclasses import replace
from itertools import product

import pytest

from sd_resnet.analysis.costs import network_cost
from sd_resnet.bench import measure, report
from sd_resnet.bench.measure import CONSTANT_DEPTH, TIMM, Contestant, Race
from sd_resnet.cli import main as cli

from ..conftest import one_line


def test_every_contestant_is_measured_at_every_rate(tmp_path, capsys):
    flags = ['--size', '32', '--batch', '3', '--steps', '2', '--saved-steps', '0', '--schedule', 'uniform']
    flags += ['--rates', '0.2', '0.3', '0.4']
    assert cli.main(['bench', '--model', 'sd_convnext_atto', *flags, '--json', str(tmp_path / 's.json')]) == 0
    said = capsys.readouterr().out
    races = json.loads((tmp_path / 's.json').read_text())['races']
    assert [race['rate'] for race in races] == [0.2, 0.3, 0.4]
    for race in races:
        counted = {name: len(each['seconds'][0]) for name, each in race['contestants'].items()}
        assert counted == dict.fromkeys((CONSTANT_DEPTH, TIMM, 'subset', 'batch'), 2)
        for mode in ('subset', 'batch'):  # all but stem, downsampling and head
            assert race['contestants'][mode]['bound'] == pytest.approx(1 - race['rate'], abs=0.07)
    assert said.count('sd_convnext_atto') == 4
    assert 'break-even of sd_convnext_atto, batch 3, 32 px: batch ' in said


def test_each_combination_is_a_race_of_its_own():
    models, rates = ('sd_resnet20_cifar', 'sd_resnet32_cifar'), (0.8, 0.0)
    settings = measure.Settings(models, rates, (2, 3), (16, 24), ('batch',), steps=2, saved_steps=0)
    races = measure.run(settings, progress=False)
    found = [(race.model, race.batch, race.size, race.rate) for race in races]
    assert found == list(product(models, (2, 3), (16, 24), rates))
    assert [race.contestants['batch'].bound for race in races][1::2] == [1] * 8
    assert all(list(race.contestants) == [CONSTANT_DEPTH, 'batch'] for race in races)
    assert 'sd_resnet32_cifar, drop path 0.8, batch 3, 24 px' in report.table(settings, races)


@pytest.fixture
def _invented(monkeypatch):
    """Steps that nobody waited for: in run and contestant a different time, half of constant depth's or more."""

    def invent(settings, race, *_):
        for place, name in enumerate((CONSTANT_DEPTH, TIMM, *settings.modes)):
            times = [[2 / (1 + place / 3 + seed / 100)] * settings.steps for seed in range(settings.seeds)]
            race.contestants[name] = Contestant(times, observed=[0.75] * settings.seeds * (place > 1))

    monkeypatch.setattr(measure, '_measure', invent)


@pytest.mark.usefixtures('_invented')
def test_growth_goes_over_depth_batch_and_size_in_one_picture(tmp_path, capsys, monkeypatch):
    pytest.importorskip('matplotlib', reason='the pictures are drawn with matplotlib')
    counted = network_cost('sd_resnet20_cifar', 32)  # for all, to be quick

    def count(model, size, *_):
        return replace(counted, image_size=size or (32 if 'cifar' in model else 224))

    monkeypatch.setattr(measure, 'network_cost', count)
    drawn = []
    monkeypatch.setattr(report, 'save_figure', lambda figure, path: drawn.append(figure))
    flags = ['--seeds', '3', '--json', str(tmp_path / 'g.json'), '--plot', str(tmp_path / 'g.png')]
    assert cli.main(['bench', '--growth', *flags]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 120
    assert '20 steps in each of 3 runs' in said
    depth, batch, size = drawn[0].axes
    ticks = [[tick.get_text() for tick in axis.get_xticklabels()] for axis in (depth, batch, size)]
    assert ticks[0][:7] == [f'resnet{layers}_cifar' for layers in (20, 32, 44, 56, 110, 152, 1202)]
    assert ticks[1:] == [['1', '2', '4', '8', '16', '32'], ['64', '96', '128', '160', '224']]
    for axis, labels in zip((depth, batch, size), ticks):
        points = {line.get_label(): len(line[0].get_xdata()) for line in axis.containers}
        measured = 5 if axis is depth else len(labels)  # nobody waits for the deepest
        assert points == {TIMM: measured, 'batch': measured, 'subset': measured, report._FLOOR: len(labels)}
    record = json.loads((tmp_path / 'g.json').read_text())
    assert [part['steps'] for part in record['settings']] == [20, 0, 20, 20]
    assert len(record['races']) == 5 + 6 + 6 + 5


@pytest.mark.usefixtures('_invented')
def test_growth_chooses_what_it_goes_over(capsys):
    assert cli.main(['bench', '--growth', '--batch', '8']) == 2
    assert '--batch does not go with --growth' in one_line(capsys)


@pytest.mark.parametrize(
    ('flags', 'labels'),
    [
        ('--rates 0.1 0.2 0.4', ['batch', 'subset']),
        ('--rates 0.1 0.2 --batch 2 4', ['batch, batch 2', 'batch, batch 4', 'subset, batch 2', 'subset, batch 4']),
        ('--model sd_resnet20_cifar sd_resnet32_cifar', ['batch', 'subset']),
    ],
)
@pytest.mark.usefixtures('_invented')
def test_several_values_are_drawn_over_whatever_they_are_of(flags, labels, tmp_path, monkeypatch):
    pytest.importorskip('matplotlib', reason='the pictures are drawn with matplotlib')
    drawn = []
    monkeypatch.setattr(report, 'save_figure', lambda figure, path: drawn.append(figure))
    argv = ['bench', '--model', 'sd_resnet20_cifar', *flags.split(), '--plot', str(tmp_path / 'x.png')]
    assert cli.main(argv) == 0
    (axis,) = drawn[0].axes
    own = [line.get_label() for line in axis.containers]
    assert sorted(label for label in own if label.startswith(('batch', 'subset'))) == labels


def test_the_ratio_is_the_mean_over_runs_with_its_standard_error():
    """Two runs on a machine that was half as fast in the second: each is compared with its own constant depth."""
    rows = {
        CONSTANT_DEPTH: Contestant([[1.0, 1.0], [2.0, 2.0]], saved_bytes=[2]),
        'drawn': Contestant([[0.7, 0.9], [1.2, 1.2]], saved_bytes=[1], bound=0.75, observed=[0.9, 0.8]),
    }
    drawn, constant = rows['drawn'], rows[CONSTANT_DEPTH]
    assert drawn.ratios(constant) == pytest.approx([0.8, 0.6])
    assert report.standard_error(drawn.ratios(constant)) == pytest.approx(0.1)
    assert drawn.ratios_without_luck(constant) == pytest.approx([0.65, 0.55])  # the draws cost 0.15, then 0.05
    table = report.table(measure.Settings(seeds=2), [Race('m', 0.5, 4, 16, rows)])
    (line,) = (line for line in table.splitlines() if 'drawn' in line)
    assert line.split() == ['drawn', '1000.0', '0.700', '0.100', '0.700', '0.600', '0.750', '0.500', '0.500']


def test_one_run_has_no_standard_error_and_a_processor_no_peak_memory():
    one = {CONSTANT_DEPTH: Contestant([[1.0, 1.0]])}
    header = report.table(measure.Settings(), [Race('m', 0.5, 4, 16, one)]).splitlines()[3]
    assert header.split() == ['ms', 'ratio', 'median']
    one[CONSTANT_DEPTH].peak_bytes = [2**20, 3 * 2**20]
    one['subset'] = Contestant([[1.0, 1.0]], [2**20])
    table = report.table(measure.Settings(), [Race('m', 0.5, 4, 16, one)]).splitlines()
    assert table[3].split()[-2:] == ['peak', 'MiB']
    assert [line.split()[-2:] for line in table[5:7]] == [['1.000', '3'], ['0.333', '1']]


@pytest.fixture
def _measured_is_wrong(monkeypatch):
    monkeypatch.delattr(measure, '_measure')


@pytest.mark.usefixtures('_measured_is_wrong')
def test_a_network_that_drops_nothing_at_these_rates_is_refused_before_anything_is_measured(capsys, monkeypatch):
    """Its only block comes first, which timm's rule never drops: there would be no saving to divide by."""

    def first_alone(*args):
        cost = network_cost(*args)
        return replace(cost, blocks=cost.blocks[:1])

    monkeypatch.setattr(measure, 'network_cost', first_alone)
    assert cli.main(['bench', '--model', 'sd_test_vit', '--size', '32', '--rates', '0.2']) == 1
    assert "must have blocks that drop at rate 0.2 and this schedule, got 'sd_test_vit'" in one_line(capsys)


def race_at(rate, share, median):
    drawn = Contestant([[median] * 2], bound=1 - rate, observed=[share])
    return Race('m', rate, 4, 16, {CONSTANT_DEPTH: Contestant([[1.0] * 2]), 'subset': drawn})


@pytest.mark.parametrize(
    ('medians', 'expected'),
    [
        ([1.1, 1.0, 0.9], 'from 0.20'),
        ([0.9, 0.8, 0.7], 'below 0.1'),
        ([0.99, 0.8, 0.61], 'below 0.1'),
        ([1.0, 1.1, 1.2], 'never'),
        ([1.3, 1.29, 1.28], 'never'),
        ([0.9, 0.9, 0.9], 'below 0.1'),
    ],
)
def test_the_break_even_point_is_where_the_line_crosses_one(medians, expected):
    """Below the lowest rate nothing was measured, and nothing is stated."""
    races = [race_at(rate, 1 - rate, m) for rate, m in zip((0.1, 0.2, 0.3), medians)]
    assert report.break_even(races, 'subset') == expected


def test_the_line_goes_through_the_rates_that_were_run():
    """At 10 rows and rate 0.05 subset mode drops nothing: what it takes there is what it takes at rate 0."""
    races = [race_at(0.05, 1.0, 1.1), race_at(0.2, 0.8, 0.9), race_at(0.4, 0.6, 0.7)]
    assert report.break_even(races, 'subset') == 'from 0.10'


def test_without_a_line_there_is_no_break_even_point():
    assert report.break_even([race_at(0.0, 1.0, 1.1), race_at(0.05, 1.0, 1.0)], 'subset') == 'unknown'


@pytest.mark.usefixtures('_measured_is_wrong')
@pytest.mark.parametrize('rates', ['0.2 1', '1.5', 'nan', '-0.1 0.2'])
def test_rates_that_are_none_are_refused_before_anything_is_measured(rates, capsys):
    assert cli.main(['bench', '--model', 'sd_convnext_atto', '--rates', *rates.split()]) == 1
    assert 'rates must be in [0, 1), got ' in one_line(capsys)


@pytest.mark.usefixtures('_measured_is_wrong')
def test_an_unknown_model_is_one_line(capsys):
    assert cli.main(['bench', '--model', 'sd_convnext_atto', 'sd_convnext_larg', '--steps', '2']) == 1
    assert 'sd_convnext_large' in one_line(capsys)


def test_networks_of_one_size_are_built_for_the_size_that_is_asked_for():
    flags = ['--size', '32', '--batch', '3', '--steps', '2', '--saved-steps', '0', '--rates', '0.4']
    assert cli.main(['bench', '--model', 'sd_vit_tiny_patch16_224', *flags]) == 0
