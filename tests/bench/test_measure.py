"""What `sd-resnet bench` counts at one rate. Its times are no test's business."""

import json

import pytest
import timm
import torch
from torchvision.ops import StochasticDepth

from sd_resnet.bench import measure as bench
from sd_resnet.bench import report
from sd_resnet.cli import main as cli
from sd_resnet.core.draws import Draw, Window

from ..conftest import NARROW, decide, images, make

SMALL = dict(models=('sd_resnet20_cifar',), batch=4, size=16, steps=2, saved_steps=3)


def _saved(model, x):
    return bench.saved_bytes(model, lambda: model(x).sum())


@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'bfloat16'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
def test_subset_mode_never_keeps_more_for_backward_than_constant_depth(layout, amp):
    constant = timm.create_model('resnet50', num_classes=10, **NARROW).train().to(memory_format=layout)
    subset = make('sd_resnet50', train=True, drop_path_mode='subset').to(memory_format=layout)
    x = images(16, 64).to(memory_format=layout)
    shares = []
    with torch.autocast('cpu', torch.bfloat16, enabled=amp):
        limit = _saved(constant, x)
        for start in range(16):  # from no window that wraps to all of them
            rows = [round(16 * p_l) for p_l in subset.survival_probs]
            draws = [Draw(k / 16, Window(start, k, k)) for k in rows]
            subset.draw = lambda x, draws=draws: list(draws)
            shares.append(_saved(subset, x) / limit)
    assert max(shares) == min(shares)
    assert 0.8 < max(shares) < 0.95


def test_batch_mode_keeps_less_for_backward_by_what_its_dropped_blocks_would_have_kept():
    constant = timm.create_model('resnet50', num_classes=10).train()
    model = make('sd_resnet50', train=True, full=True)
    x = images(2, 96)
    limit, blocks = _saved(constant, x), len(model.survival_probs)

    def with_dropped(*dropped):
        decide(model, [index not in dropped for index in range(blocks)])
        return _saved(model, x)

    assert with_dropped() == limit
    savings = [limit - with_dropped(index) for index in range(blocks)]
    assert all(saving > 0 for saving in savings)
    expected = 1 - sum((1 - p) * saving for p, saving in zip(model.survival_probs, savings)) / limit
    assert expected == pytest.approx(0.862, abs=0.004)  # nothing of a dropped block's branch is kept


def contestants(**kwargs):
    (race,) = bench.run(bench.Settings(**{**SMALL, **kwargs}), progress=False)
    return race.contestants


def test_a_run_counts_what_it_says():
    rows = contestants()
    assert list(rows) == [bench.CONSTANT_DEPTH, 'batch', 'row', 'subset']
    assert all(len(row.seconds) == 2 for row in rows.values())
    batch, row, subset = (rows[mode] for mode in ('batch', 'row', 'subset'))
    assert batch.bound == subset.bound == pytest.approx(0.727, abs=0.001)
    assert row.bound == row.observed == 1
    assert subset.observed == pytest.approx(subset.bound, abs=0.06)  # of whole rows, one more or less
    assert len(batch.saved_bytes) == len(subset.saved_bytes) == 3
    table = report.table(bench.Settings(**SMALL), [bench.Race('sd_resnet20_cifar', 0.5, rows)])
    assert all(name in table for name in rows)


def test_imagenet_networks_are_measured_beside_timms_and_torchvisions_drop_path():
    rows = contestants(models=('sd_resnet18',), batch=2, size=32, saved_steps=1, modes=('batch',))
    assert list(rows) == [bench.CONSTANT_DEPTH, bench.TIMM, bench.TORCHVISION, 'batch']


@pytest.mark.parametrize('schedule', [None, 'uniform'])
def test_the_drop_paths_of_others_have_the_rates_that_are_asked_for(schedule):
    networks = bench._networks(bench.Settings(size=32, schedule=schedule), 'sd_resnet18', 0.4)
    for name, kind in ((bench.TIMM, timm.layers.DropPath), (bench.TORCHVISION, StochasticDepth)):
        paths = [module for module in networks[name].modules() if isinstance(module, kind)]
        rates = [path.drop_prob if kind is timm.layers.DropPath else path.p for path in paths]
        expected = [0.4] * 8 if schedule else [0.4 * l / 7 for l in range(1, 8)]
        assert rates == pytest.approx(expected, abs=1e-5)


def test_other_networks_have_no_share_of_flops_by_the_measured_ones():
    """It would be another network's, at another rate."""
    rows = contestants(others=('sd_resnet32_cifar',), modes=('batch',))
    assert list(rows)[-2:] == ['batch', 'sd_resnet32_cifar']
    assert rows['batch'].bound is not None
    other = rows['sd_resnet32_cifar']
    assert (other.bound, other.observed) == (None, None)
    assert len(other.saved_bytes) == 3  # it drops, and keeps as much as the draw leaves


def test_ratios_are_stated_without_the_luck_of_the_draw():
    """Steps of 0.8 that computed 0.9 where 0.75 is the mean: the draw cost 0.15."""
    rows = {
        bench.CONSTANT_DEPTH: bench.Contestant([1.0, 1.0], [1]),
        'drawn': bench.Contestant([0.8, 0.8], [1], bound=0.75, observed=0.9),
    }
    assert rows['drawn'].ratio(rows[bench.CONSTANT_DEPTH]) == pytest.approx(0.8)
    assert rows['drawn'].ratio_without_luck(rows[bench.CONSTANT_DEPTH]) == pytest.approx(0.65)
    table = report.table(bench.Settings(**SMALL), [bench.Race('m', 0.5, rows)])
    (line,) = (x for x in table.splitlines() if 'drawn' in x)
    assert '0.650' in line.split()


@pytest.mark.parametrize(
    ('options', 'settings'),
    [
        (['--drop-path', '0.3', '--saved-steps', '1'], {'rates': [0.3]}),
        (['--growth', '--rates', '0.8', '0'], {'rates': [0.8, 0], 'modes': ['batch'], 'peers': []}),
    ],
)
def test_the_command_measures_prints_records_and_draws(options, settings, tmp_path, capsys):
    pytest.importorskip('matplotlib', reason='the pictures are drawn with matplotlib')
    record, picture = tmp_path / 'record.json', tmp_path / 'picture.png'
    options += ['--model', 'sd_resnet20_cifar', '--batch', '4', '--size', '16', '--steps', '2']
    assert cli.main(['bench', *options, '--json', str(record), '--plot', str(picture)]) == 0
    assert 'sd_resnet20_cifar' in capsys.readouterr().out
    recorded = json.loads(record.read_text())['settings']
    assert {'batch': 4, 'size': 16, 'steps': 2, **settings}.items() <= recorded.items()
    assert picture.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (dict(precision='int8'), "precision must be 'float32', 'bfloat16' or 'float16', got 'int8'"),
        (dict(steps=1), 'steps must be at least 2, to state their spread, got 1'),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_measured(wrong, message):
    with pytest.raises(ValueError, match=message):
        bench.Settings(**{**SMALL, **wrong})
