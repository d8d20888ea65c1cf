"""Step times over rates. No test looks at a time that was measured."""

import json

import pytest

from sd_resnet import cli
from sd_resnet.sweep import Swept, break_even

from .conftest import one_line


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
        assert row['flops'] == pytest.approx(1 - row['rate'], abs=0.07)  # all but stem, downsampling and head
    assert said.count('sd_convnext_atto') == 3
    assert 'break-even of sd_convnext_atto: subset ' in said


@pytest.mark.parametrize(
    ('medians', 'expected'),
    [
        ([1.1, 1.0, 0.9], 0.2),
        ([0.9, 0.8, 0.7], 0.0),
        ([1.0, 1.1, 1.2], None),
        ([1.3, 1.29, 1.28], None),
        ([0.9, 0.9, 0.9], 0.0),
    ],
)
def test_the_break_even_point_is_where_the_line_crosses_one(medians, expected):
    swept = [Swept('m', rate, 1 - rate, {}, {'subset': m}, {}) for rate, m in zip((0.1, 0.2, 0.3), medians)]
    assert break_even(swept, 'subset') == pytest.approx(expected)


def test_an_unknown_model_is_one_line(capsys):
    assert cli.main(['sweep', 'sd_vgg', '--steps', '1']) == 1
    assert 'model must be one of' in one_line(capsys)
