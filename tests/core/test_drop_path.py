"""The draw and the module: how often blocks survive, and that code which takes it for timm's DropPath is right."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from timm.layers import DropPath

from sd_resnet import StochasticDepth, survival_probs
from sd_resnet.core.draws import draw

from ..conftest import make

DRAWS = 20_000


def _draws(mode, batch=8):
    drop_paths = [StochasticDepth(p, mode) for p in survival_probs(16)]
    x = torch.zeros(batch, 3, 2, 2)
    return [[drawn.b_l for drawn in draw(drop_paths, x, mode)] for _ in range(DRAWS)]


def test_each_block_survives_as_often_as_its_probability_says():
    kept = torch.tensor(_draws('batch'), dtype=torch.float64)
    for p_l, frequency in zip(survival_probs(16), kept.mean(0).tolist()):
        assert abs(frequency - p_l) < 4 * math.sqrt(p_l * (1 - p_l) / DRAWS)
    variance = sum(p * (1 - p) for p in survival_probs(16))
    assert abs(kept.sum(1).mean().item() - 11.75) < 4 * math.sqrt(variance / DRAWS)


def test_blocks_and_steps_are_drawn_independently():
    kept = torch.tensor(_draws('batch'), dtype=torch.float64)
    kept = (kept - kept.mean(0)) / kept.std(0)
    between_blocks = kept.T @ kept / DRAWS
    bound = 5 / math.sqrt(DRAWS)  # 120 pairs: 5 standard errors
    for a, b in itertools.combinations(range(16), 2):
        assert abs(between_blocks[a, b]) < bound
    assert ((kept[1:] * kept[:-1]).mean(0).abs() < bound).all()


def test_rows_survive_as_often_as_their_probability_says():
    masks = torch.stack([torch.stack(decisions).view(16, 8) for decisions in _draws('row')[:4000]])
    for p_l, frequency in zip(survival_probs(16), masks.mean((0, 2)).tolist()):
        assert abs(frequency - p_l) < 4 * math.sqrt(p_l * (1 - p_l) / (4000 * 8))


def test_every_row_survives_equally_often_in_subset_mode():
    starts = torch.tensor([[window.start for window in windows] for windows in _draws('subset')])
    counts = torch.stack([(starts == row).double().mean(0) for row in range(8)])
    assert ((counts - 1 / 8).abs() < 4 * math.sqrt(1 / 8 * 7 / 8 / DRAWS)).all()


@pytest.mark.parametrize(
    ('p', 'batch', 'counts'),
    [(0.5, 5, {2, 3}), (0.5, 8, {4}), (0.6, 5, {3}), (0.55, 20, {11}), (0.03, 1, {0, 1}), (1.0, 3, {3})],
)
def test_subset_mode_keeps_the_whole_number_below_p_batch_or_one_more(p, batch, counts):
    """Rounding in p_l times the batch must not cost a row that hardly ever survives."""
    drop_path, x = StochasticDepth(p, 'subset'), torch.zeros(batch, 1)
    windows = [draw([drop_path], x, 'subset')[0].b_l for _ in range(400)]
    assert {window.rows for window in windows} == counts
    mean = sum(window.rows for window in windows) / 400
    assert abs(mean - p * batch) <= 4 * math.sqrt(0.25 / 400)


def test_the_same_seed_gives_the_same_draws():
    for mode in ('batch', 'row', 'subset'):
        drop_paths = [StochasticDepth(0.5, mode) for _ in range(8)]
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append([drawn.b_l for drawn in draw(drop_paths, torch.zeros(4, 1, 1, 1), mode)])
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*runs))


def test_the_draw_stays_on_the_host_whatever_the_default_device():
    with torch.device('meta'):
        for mode in ('batch', 'subset'):
            assert len(draw([StochasticDepth(0.5, mode)] * 3, torch.zeros(2, 1), mode)) == 3


class TestAsDropPath:
    """Code that finds a `DropPath` in a model and calls or sets it, as timm's own does."""

    def test_it_is_one(self):
        assert isinstance(StochasticDepth(0.5), DropPath)
        assert StochasticDepth(0.75).drop_prob == 0.25

    def test_called_alone_it_masks_rows_over_p_and_does_nothing_in_evaluation(self):
        module, x = StochasticDepth(0.5), torch.ones(400, 2, 2, 2)
        out = module(x)
        assert set(out.unique().tolist()) == {0.0, 2.0}
        assert (out == out[:, :1, :1, :1]).all()
        assert abs(out[:, 0, 0, 0].ne(0).double().mean().item() - 0.5) < 4 * 0.5 / 20
        assert module.eval()(x) is x
        assert StochasticDepth(1.0)(x) is x

    def test_assigning_the_rate_acts_as_in_timm(self):
        module = StochasticDepth(0.5)
        module.drop_prob = 0.25
        assert module.survival_prob == 0.75
        with pytest.raises(ValueError, match=r'drop_prob must be in \[0, 1\), got 1'):
            module.drop_prob = 1


def test_wrong_settings_are_refused_by_name_and_value():
    with pytest.raises(ValueError, match=r"drop_path_mode must be one of 'batch', 'row', 'subset', got 'rows'"):
        StochasticDepth(0.5, 'rows')
    with pytest.raises(ValueError, match=r'survival_prob must be in \(0, 1\], got 0'):
        StochasticDepth(0)
    with pytest.raises(ValueError, match=r"drop_path_rescale must be one of 'train', 'test', got 'x'"):
        make('sd_resnet18', drop_path_rescale='x')


def test_copies_and_pickles_keep_the_settings():
    for module in (copy.deepcopy(StochasticDepth(0.7, 'row')), pickle.loads(pickle.dumps(StochasticDepth(0.7, 'row')))):
        assert (module.survival_prob, module.mode) == (0.7, 'row')
    model = make('sd_resnet20_cifar', train=True)
    assert pickle.loads(pickle.dumps(model)).survival_probs == model.survival_probs
