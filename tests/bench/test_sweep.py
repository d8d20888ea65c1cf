"""Step times over rates. No test looks at a time that was measured."""

import json

import pytest

from sd_resnet.bench import sweep
from sd_resnet.bench.sweep import Swept, break_even
from sd_resnet.cli import main as cli

from ..conftest import one_line


def test_every_contestant_is_measured_at_every_rate(tmp_path, capsys):
    flags = ['--size', '32', '--batch', '3', '--steps', '2', '--schedule', 'uniform', '--rates', '0.2', '0.4']
    assert cli.main(['sweep', 'sd_convnext_atto', *flags, '--json', str(tmp_path / 's.json')]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / 's.json').read_text())['rows']
    assert [row['rate'] for row in rows] == [0.2, 0.4]
    for row in rows:
        assert {name: len(times) for name, times in row['seconds'].items()} == dict.fromkeys(
            ('undropped', 'timm', 'subset', 'batch'), 2
        )
        assert row['flops']['batch'] == pytest.approx(1 - row['rate'], abs=0.07)  # all but stem, downsampling and head
        assert row['flops']['subset'] == pytest.approx(1 - row['rate'], abs=0.07)
    assert said.count('sd_convnext_atto') == 3
    assert 'break-even of sd_convnext_atto: subset ' in said


def test_a_network_that_drops_nothing_at_these_rates_is_refused_before_anything_is_measured(monkeypatch, capsys):
    """Its only block comes first, which timm's rule never drops: there would be no saving to divide by."""
    monkeypatch.delattr(sweep, 'run')
    assert cli.main(['sweep', 'sd_test_resnet', '--size', '32', '--rates', '0.2']) == 1
    assert "must have blocks that drop at rate 0.2 and this schedule, got 'sd_test_resnet'" in one_line(capsys)


def swept_at(rate, share, median):
    return Swept('m', rate, {'subset': share, 'batch': 1 - rate}, {}, {'subset': median}, {})


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
    swept = [swept_at(rate, 1 - rate, m) for rate, m in zip((0.1, 0.2, 0.3), medians)]
    assert break_even(swept, 'subset') == pytest.approx(expected)


def test_the_line_goes_through_the_rates_that_were_run():
    """At 10 rows and rate 0.05 subset mode drops nothing: what it takes there is what it takes at rate 0."""
    swept = [swept_at(0.05, 1.0, 1.1), swept_at(0.2, 0.8, 0.9), swept_at(0.4, 0.6, 0.7)]
    assert [s.rate_of('subset') for s in swept] == pytest.approx([0, 0.2, 0.4])
    assert break_even(swept, 'subset') == pytest.approx(0.1)


@pytest.fixture
def _measured_is_wrong(monkeypatch):
    monkeypatch.delattr(sweep, 'run')


@pytest.mark.usefixtures('_measured_is_wrong')
@pytest.mark.parametrize('rates', ['0 0.2', '0.4 0.4', '0.2 1', '1.5', 'nan'])
def test_rates_that_cannot_be_compared_are_refused_before_anything_is_measured(rates, capsys):
    assert cli.main(['sweep', 'sd_convnext_atto', '--rates', *rates.split()]) == 1
    assert 'rates must be different numbers between 0 and 1' in one_line(capsys)


@pytest.mark.usefixtures('_measured_is_wrong')
def test_an_unknown_model_is_one_line(capsys):
    assert cli.main(['sweep', 'sd_convnext_atto', 'sd_vgg', '--steps', '2']) == 1
    assert 'or one of sd_resnet20_cifar' in one_line(capsys)


def test_networks_of_one_size_are_built_for_the_size_that_is_asked_for(capsys):
    flags = ['--size', '32', '--batch', '3', '--steps', '2', '--rates', '0.4']
    assert cli.main(['sweep', 'sd_vit_tiny_patch16_224', *flags]) == 0
