"""The draw and the module: how often blocks survive, and that code which takes it for timm's DropPath is right."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from timm.layers import DropPath

from sd_resnet import StochasticDepth, survival_probs
from sd_resnet.stochastic_depth import draw_per_batch, draw_per_sample

from .conftest import make

DRAWS = 20_000


def _draw(drop_paths, x):
    return draw_per_batch(drop_paths) if drop_paths[0].mode == 'batch' else draw_per_sample(drop_paths, x)


def _draws(mode, batch=8):
    drop_paths = [StochasticDepth(p, mode) for p in survival_probs(16)]
    x = torch.zeros(batch, 3, 2, 2)
    return [_draw(drop_paths, x) for _ in range(DRAWS)]


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
    starts = torch.tensor(_draws('subset'))
    counts = torch.stack([(starts == row).double().mean(0) for row in range(8)])
    assert ((counts - 1 / 8).abs() < 4 * math.sqrt(1 / 8 * 7 / 8 / DRAWS)).all()


@pytest.mark.parametrize(('p', 'batch', 'rows'), [(0.5, 5, 2), (0.5, 7, 4), (0.75, 16, 12), (0.1, 2, 1), (1.0, 3, 3)])
def test_subset_size_rounds_ties_to_even_and_is_at_least_one(p, batch, rows):
    assert StochasticDepth(p, 'subset').rows(batch) == rows


def test_the_same_seed_gives_the_same_decisions():
    for mode in ('batch', 'row', 'subset'):
        drop_paths = [StochasticDepth(0.5, mode) for _ in range(8)]
        runs = []
        for _ in range(2):
            torch.manual_seed(3)
            runs.append(_draw(drop_paths, torch.zeros(4, 1, 1, 1)))
        assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*runs))


def test_the_draw_stays_on_the_host_whatever_the_default_device():
    with torch.device('meta'):
        assert len(_draw([StochasticDepth(0.5)] * 3, torch.zeros(2, 1))) == 3
        assert len(_draw([StochasticDepth(0.5, 'subset')] * 3, torch.zeros(2, 1))) == 3


class TestAsDropPath:
    """Code that finds a `DropPath` in a model and calls or sets it, as timm's own does."""

    def test_it_is_one(self):
        assert isinstance(StochasticDepth(0.5), DropPath)
        assert StochasticDepth(0.75).drop_prob == 0.25

    @pytest.mark.parametrize(('rescale', 'train', 'test'), [('test', 1.0, 0.5), ('train', 2.0, 1.0)])
    def test_called_alone_it_masks_rows_and_applies_the_factor(self, rescale, train, test):
        module, x = StochasticDepth(0.5, rescale=rescale), torch.ones(400, 2, 2, 2)
        out = module(x)
        assert set(out.unique().tolist()) == {0.0, train}
        assert (out == out[:, :1, :1, :1]).all()
        assert abs(out[:, 0, 0, 0].ne(0).double().mean().item() - 0.5) < 4 * 0.5 / 20
        assert torch.equal(module.eval()(x), x * test)
        assert torch.equal(StochasticDepth(1.0)(x), x)

    def test_assigning_the_rate_acts_as_in_timm_under_train_rescaling(self):
        module = StochasticDepth(0.5, rescale='train')
        module.drop_prob = 0.25
        assert module.survival_prob == 0.75
        with pytest.raises(ValueError, match=r'drop_prob must be in \[0, 1\), got 1'):
            module.drop_prob = 1

    def test_assigning_the_rate_under_test_rescaling_is_refused_and_names_the_way(self):
        module = StochasticDepth(0.7)
        module.drop_prob = module.drop_prob  # no change, no complaint
        with pytest.raises(AttributeError, match='set_drop_path'):
            module.drop_prob = 0.1
        assert module.survival_prob == 0.7


def test_wrong_settings_are_refused_by_name_and_value():
    with pytest.raises(ValueError, match=r"drop_path_mode must be one of 'batch', 'row', 'subset', got 'rows'"):
        StochasticDepth(0.5, 'rows')
    with pytest.raises(ValueError, match=r"drop_path_rescale must be one of 'test', 'train', got None"):
        StochasticDepth(0.5, rescale=None)
    with pytest.raises(ValueError, match=r'survival_prob must be in \(0, 1\], got 0'):
        StochasticDepth(0)


def test_copies_and_pickles_keep_the_settings():
    for module in (copy.deepcopy(StochasticDepth(0.7, 'row')), pickle.loads(pickle.dumps(StochasticDepth(0.7, 'row')))):
        assert (module.survival_prob, module.mode, module.rescale) == (0.7, 'row', 'test')
        assert module.state_dict()['survival_prob'] == pytest.approx(0.7)
    model = make('sd_resnet20_cifar', train=True)
    assert pickle.loads(pickle.dumps(model)).survival_probs == model.survival_probs


def test_the_python_number_is_the_authority():
    module = StochasticDepth(0.7)
    with torch.no_grad():
        module._buffers['survival_prob'].fill_(0.1)  # as to_empty() or arithmetic on state dicts may do
    assert module.state_dict()['survival_prob'] == pytest.approx(0.7)
    assert module.half().survival_prob == 0.7
