"""What `sd-resnet bench` counts at one rate. Its times are no test's business."""

import json

import pytest
import timm
import torch

from sd_resnet.bench import measure as bench
from sd_resnet.bench import report
from sd_resnet.cli import main as cli
from sd_resnet.core.draws import Draw, Window
from sd_resnet.core.drop_path import StochasticDepth

from ..conftest import NARROW, decide, images, make, one_line

SMALL = dict(models=('sd_resnet20_cifar',), batches=(4,), sizes=(16,), steps=2, saved_steps=3)
MODES = ('batch', 'row', 'subset')


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
    rows = contestants(modes=MODES)
    assert list(rows) == [bench.CONSTANT_DEPTH, *MODES]
    assert [[len(run) for run in row.seconds] for row in rows.values()] == [[2]] * 4
    batch, row, subset = (rows[mode] for mode in MODES)
    assert batch.bound == subset.bound == pytest.approx(0.727, abs=0.001)
    assert (row.bound, row.observed) == (1, [])
    assert subset.observed == pytest.approx([subset.bound], abs=0.06)  # of whole rows, one more or less
    assert len(batch.saved_bytes) == len(subset.saved_bytes) == 3


def test_each_seed_is_a_run_of_its_own_with_draws_that_come_again():
    """Whoever states a standard error over runs, or has a record checked."""
    first, again = (contestants(seeds=2, steps=3, saved_steps=0, modes=('batch',)) for _ in range(2))
    assert [[len(run) for run in row.seconds] for row in first.values()] == [[3, 3]] * 2
    shares = first['batch'].observed
    assert len(set(shares)) == 2
    assert again['batch'].observed == shares


def test_imagenet_networks_are_measured_beside_timms_drop_path():
    rows = contestants(models=('sd_resnet18',), batches=(2,), sizes=(32,), saved_steps=1, modes=('batch',), amp=True)
    assert list(rows) == [bench.CONSTANT_DEPTH, bench.TIMM, 'batch']


@pytest.mark.parametrize('schedule', [None, 'uniform'])
def test_timms_drop_path_has_the_rate_that_is_asked_for(schedule):
    networks = bench._networks(bench.Settings(schedule=schedule), bench.Race('sd_resnet18', 0.4, 2, 32, {}))
    rates = [module.drop_prob for module in networks[bench.TIMM].modules() if type(module) is timm.layers.DropPath]
    expected = [0.4] * 8 if schedule else [0.4 * l / 7 for l in range(1, 8)]
    assert rates == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize('model', ['sd_resnet18', 'sd_resnet20_cifar', 'sd_convnext_atto'])
def test_what_is_measured_rescales_as_timm_does(model):
    networks = bench._networks(bench.Settings(modes=MODES), bench.Race(model, 0.4, 2, 32, {}))
    found = [module for mode in MODES for module in networks[mode].modules() if isinstance(module, StochasticDepth)]
    assert {module.rescale for module in found} == {'train'}


def test_races_of_no_steps_count_flops_alone():
    """A network of 1202 layers, of which nobody awaits a step."""
    races = bench.run(bench.Settings(**SMALL | {'steps': 0, 'rates': (0.5, 0.0)}), progress=False)
    assert [list(race.contestants) for race in races] == [['batch', 'subset']] * 2
    assert [race.contestants['batch'].bound for race in races] == [pytest.approx(0.727, abs=0.001), 1]
    assert '0.727' in report.table(bench.Settings(), races)


def test_autocast_is_on_for_every_contestant():
    x, labels = images(2, 32), torch.tensor([0, 1])
    for amp, kind in ((False, torch.float32), (True, torch.bfloat16)):
        seen = []
        model = make('sd_resnet20_cifar', train=True)
        model.fc.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.dtype))
        bench._Training(model, x, labels, bench.Settings(amp=amp)).step()
        assert seen == [kind]


class Card:
    """A CUDA device that holds 1000 bytes of others, `held` of the training, and 50 more within a step."""

    def __init__(self, monkeypatch, training):
        self.calls, self.training = [], training
        for name in ('synchronize', 'reset_peak_memory_stats', 'memory_allocated', 'max_memory_allocated'):
            monkeypatch.setattr(torch.cuda, name, lambda device, name=name: self.answer(name))

    def answer(self, name):
        self.calls.append(name)
        held = 1000 + self.training._held_bytes()
        return {'memory_allocated': held, 'max_memory_allocated': held + 50}.get(name)


def test_a_step_on_cuda_is_timed_to_its_end_and_its_peak_is_its_own(monkeypatch):
    """The other contestants' weights lie on the same card; a kernel is still running when its call returns."""
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3, bias=False))
    training = bench._Training(model, images(2, 2), torch.tensor([0, 1]), bench.Settings())
    training.step()
    weights = 4 * 12 * 3
    assert training._held_bytes() == 3 * weights + 2 * 12 * 4 + 2 * 8  # and gradients, momentum; images, labels
    training.device, card = torch.device('cuda'), Card(monkeypatch, training)
    training.step = lambda step=training.step: (card.calls.append('step'), step())
    _, peak = training.measured()
    assert peak == training._held_bytes() + 50
    begin, end = card.calls.index('step'), len(card.calls)
    assert 'synchronize' in card.calls[:begin]
    assert card.calls[begin - 1 : end] == ['reset_peak_memory_stats', 'step', 'synchronize', 'max_memory_allocated']


@pytest.mark.parametrize(
    ('options', 'settings'),
    [
        (['--drop-path', '0.3', '--saved-steps', '1'], {'rates': [0.3], 'batches': [4]}),
        (['--rates', '0.8', '0', '--seeds', '2', '--amp', '--saved-steps', '0'], {'rates': [0.8, 0], 'seeds': 2}),
        (['--batch', '2', '3', '--saved-steps', '0', '--modes', 'subset'], {'batches': [2, 3], 'modes': ['subset']}),
    ],
)
def test_the_command_measures_prints_records_and_draws(options, settings, tmp_path, capsys):
    pytest.importorskip('matplotlib', reason='the pictures are drawn with matplotlib')
    record, picture = tmp_path / 'record.json', tmp_path / 'picture.png'
    options = ['--model', 'sd_resnet20_cifar', '--batch', '4', '--size', '16', '--steps', '2', *options]
    assert cli.main(['bench', *options, '--json', str(record), '--plot', str(picture)]) == 0
    assert 'sd_resnet20_cifar' in capsys.readouterr().out
    (recorded,) = json.loads(record.read_text())['settings']
    assert {'sizes': [16], 'steps': 2, **settings}.items() <= recorded.items()
    assert picture.read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize(
    ('wrong', 'message'),
    [
        (dict(steps=1), 'steps must be at least 2, or 0 to count FLOPs only, got 1'),
        (dict(seeds=0), 'seeds must be at least 1, got 0'),
        (dict(modes=('rows',)), "modes must be among .*, got \\['rows'\\]"),
        (dict(rates=(0.4, 0.4)), 'rates must be one or more, each another one, got .0.4, 0.4.'),
        (dict(batches=()), 'batches must be one or more, each another one, got '),
        (dict(device='mps'), "device must be 'cpu' or 'cuda', got 'mps'"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_measured(wrong, message):
    with pytest.raises(ValueError, match=message):
        bench.Settings(**SMALL | wrong)


def test_cuda_where_there_is_none_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert cli.main(['bench', '--device', 'cuda', '--amp']) == 1
    assert "device must be 'cpu' where torch finds no CUDA device, got 'cuda'" in one_line(capsys)


def test_the_record_names_what_was_measured_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'card of {device}')
    assert 'card of cuda:1' in report.environment('cuda:1')
    assert 'card' not in report.environment()
