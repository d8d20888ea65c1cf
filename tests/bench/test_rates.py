"""Step times over models and rates. No test looks at a time that was measured."""

import json
from dataclasses import replace

import pytest

from sd_resnet.analysis.costs import network_cost
from sd_resnet.bench import measure, report
from sd_resnet.bench.measure import CONSTANT_DEPTH, TIMM, Contestant, Race
from sd_resnet.cli import main as cli

from ..conftest import one_line


def test_every_contestant_is_measured_at_every_rate(tmp_path, capsys):
    flags = ['--size', '32', '--batch', '3', '--steps', '2', '--schedule', 'uniform', '--rates', '0.2', '0.4']
    assert cli.main(['bench', '--model', 'sd_convnext_atto', *flags, '--json', str(tmp_path / 's.json')]) == 0
    said = capsys.readouterr().out
    races = json.loads((tmp_path / 's.json').read_text())['races']
    assert [race['rate'] for race in races] == [0.2, 0.4]
    for race in races:
        counted = {name: len(each['seconds']) for name, each in race['contestants'].items()}
        assert counted == dict.fromkeys((CONSTANT_DEPTH, TIMM, 'subset', 'batch'), 2)
        for mode in ('subset', 'batch'):  # all but stem, downsampling and head
            assert race['contestants'][mode]['bound'] == pytest.approx(1 - race['rate'], abs=0.07)
    assert said.count('sd_convnext_atto') == 3
    assert 'break-even of sd_convnext_atto: subset ' in said


def test_growth_measures_batch_mode_at_every_rate_of_every_depth():
    models, rates = ('sd_resnet20_cifar', 'sd_resnet32_cifar'), (0.8, 0.0)
    settings = measure.Settings(models, rates, batch=2, size=16, steps=2, modes=('batch',), peers=(), saved_steps=0)
    races = measure.run(settings, progress=False)
    assert [(race.model, race.rate) for race in races] == [(model, rate) for model in models for rate in rates]
    assert [race.contestants['batch'].bound for race in races][1::2] == [1, 1]
    assert all(list(race.contestants) == [CONSTANT_DEPTH, 'batch'] for race in races)
    assert 'sd_resnet32_cifar, drop path 0.8' in report.table(settings, races)


@pytest.fixture
def _measured_is_wrong(monkeypatch):
    monkeypatch.delattr(measure, '_race')


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
    drawn = Contestant([median] * 2, bound=1 - rate, observed=share)
    return Race('m', rate, {CONSTANT_DEPTH: Contestant([1.0] * 2), 'subset': drawn})


@pytest.mark.parametrize(
    ('medians', 'expected'),
    [
        ([1.1, 1.0, 0.9], 0.2),
        ([0.9, 0.8, 0.7], 0.0),
        ([1.0, 1.1, 1.2], float('inf')),
        ([1.3, 1.29, 1.28], float('inf')),
        ([0.9, 0.9, 0.9], 0.0),
    ],
)
def test_the_break_even_point_is_where_the_line_crosses_one(medians, expected):
    races = [race_at(rate, 1 - rate, m) for rate, m in zip((0.1, 0.2, 0.3), medians)]
    assert report.break_even(races, 'subset') == pytest.approx(expected)


def test_the_line_goes_through_the_rates_that_were_run():
    """At 10 rows and rate 0.05 subset mode drops nothing: what it takes there is what it takes at rate 0."""
    races = [race_at(0.05, 1.0, 1.1), race_at(0.2, 0.8, 0.9), race_at(0.4, 0.6, 0.7)]
    assert report.break_even(races, 'subset') == pytest.approx(0.1)


def test_without_a_line_there_is_no_break_even_point():
    assert report.break_even([race_at(0.0, 1.0, 1.1), race_at(0.05, 1.0, 1.0)], 'subset') is None


@pytest.mark.usefixtures('_measured_is_wrong')
@pytest.mark.parametrize('rates', ['0.4 0.4', '0.2 1', '1.5', 'nan', '-0.1 0.2'])
def test_rates_that_cannot_be_compared_are_refused_before_anything_is_measured(rates, capsys):
    assert cli.main(['bench', '--model', 'sd_convnext_atto', '--rates', *rates.split()]) == 1
    assert 'rates must be different numbers in [0, 1)' in one_line(capsys)


@pytest.mark.usefixtures('_measured_is_wrong')
@pytest.mark.parametrize(
    ('flags', 'nearest'),
    [
        (['--model', 'sd_convnext_atto', 'sd_convnext_larg'], 'sd_convnext_large'),
        (['--model', 'sd_resnet18', '--others', 'resnet5'], 'resnet50'),
    ],
)
def test_an_unknown_model_is_one_line(flags, nearest, capsys):
    assert cli.main(['bench', *flags, '--steps', '2']) == 1
    assert nearest in one_line(capsys)


def test_networks_of_one_size_are_built_for_the_size_that_is_asked_for():
    flags = ['--size', '32', '--batch', '3', '--steps', '2', '--rates', '0.4']
    assert cli.main(['bench', '--model', 'sd_vit_tiny_patch16_224', *flags]) == 0
