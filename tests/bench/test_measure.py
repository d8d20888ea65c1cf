"""What `sd-resnet bench` and `growth` count. Their times are no test's business."""

import json
import statistics

import pytest
import timm
import torch

from sd_resnet.bench import measure as bench
from sd_resnet.bench import report as bench_report
from sd_resnet.cli import main as cli
from sd_resnet.core.draws import Draw, Window

from ..conftest import NARROW, decide, images, make

SMALL = dict(model='sd_resnet20_cifar', batch=4, size=16, steps=2, saved_steps=3)


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


def test_a_run_counts_what_it_says():
    rows = {row.name: row for row in bench.run(bench.Settings(**SMALL), progress=False)}
    assert set(rows) == {bench.CONSTANT, *(f'sd_resnet20_cifar, {mode}' for mode in ('batch', 'row', 'subset'))}
    assert all(len(row.seconds) == 2 for row in rows.values())
    batch, row, subset = (rows[f'sd_resnet20_cifar, {mode}'] for mode in ('batch', 'row', 'subset'))
    assert batch.bound == subset.bound == pytest.approx(0.727, abs=0.001)
    assert row.bound == row.observed == 1
    assert subset.observed == pytest.approx(subset.bound, abs=0.06)  # rounding to whole rows, the same in every step
    assert len(batch.saved_bytes) == len(subset.saved_bytes) == 3
    table = bench_report.table(bench.Settings(**SMALL), list(rows.values()))
    assert all(name in table for name in rows)


def test_imagenet_networks_are_measured_beside_timms_and_torchvisions_drop_path():
    settings = bench.Settings(model='sd_resnet18', batch=2, size=32, steps=2, saved_steps=1, modes=('batch',))
    rows = bench.run(settings, progress=False)
    assert [row.name for row in rows] == [bench.CONSTANT, bench.TIMM, bench.TORCHVISION, 'sd_resnet18, batch']


def test_other_networks_have_no_share_of_flops_by_the_measured_ones():
    """It would be another network's, at another rate."""
    settings = bench.Settings(**{**SMALL, 'others': ('sd_resnet32_cifar',), 'modes': ('batch',)})
    *_, own, other = bench.run(settings, progress=False)
    assert own.bound is not None
    assert (other.name, other.bound, other.observed) == ('sd_resnet32_cifar', None, None)
    assert len(other.saved_bytes) == 3  # it drops, and keeps as much as the draw leaves


def test_ratios_are_stated_without_the_luck_of_the_draw():
    """Steps of 0.8 that computed 0.9 where 0.75 is the mean: the draw cost 0.15."""
    constant = bench.Row(bench.CONSTANT, [1.0, 1.0], [1])
    drawn = bench.Row('drawn', [0.8, 0.8], [1], bound=0.75, observed=0.9)
    (line,) = (x for x in bench_report.table(bench.Settings(**SMALL), [constant, drawn]).splitlines() if 'drawn' in x)
    assert '0.650' in line.split()


def test_growth_is_stated_without_the_luck_of_the_draw(monkeypatch):
    def measured(settings, contestants, image_size, costs, progress):
        rows = [bench.Row(name, [0.8, 0.8], bound=0.75, observed=0.9) for name in costs]
        return [bench.Row(bench.CONSTANT, [1.0, 1.0]), *rows]

    monkeypatch.setattr(bench, '_measure', measured)
    (growth,) = bench.grow(bench.Settings(**SMALL), ['sd_resnet20_cifar'], [0.5])
    assert (growth.ratio, growth.without_luck) == pytest.approx((0.8, 0.65))
    with pytest.raises(ValueError, match=r'rates, 1 - p_L, must be different numbers, got \[0.5, 0.2, 0.5\]'):
        bench.grow(bench.Settings(**SMALL), ['sd_resnet20_cifar'], [0.5, 0.2, 0.5])


@pytest.mark.parametrize(
    ('command', 'options', 'settings'),
    [
        ('bench', ['--model', 'sd_resnet20_cifar', '--drop-path', '0.3', '--saved-steps', '1'], {'rate': 0.3}),
        ('growth', ['--models', 'sd_resnet20_cifar', '--survival', '0.2'], {}),
    ],
)
def test_the_commands_measure_print_record_and_draw(command, options, settings, tmp_path, capsys):
    pytest.importorskip('matplotlib', reason='the pictures are drawn with matplotlib')
    record, picture = tmp_path / 'record.json', tmp_path / 'picture.png'
    options += ['--batch', '4', '--size', '16', '--steps', '2', '--json', str(record), '--plot', str(picture)]
    assert cli.main([command, *options]) == 0
    assert 'sd_resnet20_cifar' in capsys.readouterr().out
    recorded = json.loads(record.read_text())['settings']
    assert {'batch': 4, 'size': 16, 'steps': 2, **settings}.items() <= recorded.items()
    assert picture.read_bytes().startswith(b'\x89PNG')


def test_growth_measures_every_rate_of_every_depth():
    settings = bench.Settings(batch=2, size=16, steps=2)
    growths = bench.grow(settings, ['sd_resnet20_cifar', 'sd_resnet32_cifar'], [0.8, 0.0], progress=False)
    assert [(g.model, round(g.survival_prob, 6)) for g in growths] == [
        (model, p) for model in ('sd_resnet20_cifar', 'sd_resnet32_cifar') for p in (0.2, 1.0)
    ]
    assert [g.bound for g in growths][1::2] == [1, 1]
    assert all(g.ratio == statistics.fmean(g.seconds) / statistics.fmean(g.constant_seconds) for g in growths)
    assert 'sd_resnet32_cifar' in bench_report.growth_table(settings, growths)


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
