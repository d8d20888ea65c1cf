"""The model draws once per forward pass, wherever the pass comes in, and checkpointing replays the same decisions."""

import copy

import pytest
import timm
import torch
from timm.layers import freeze_batch_norm_2d

from sd_resnet import survival_probs

from ..conftest import count_calls, decide, images, make

MODES = ['batch', 'row', 'subset']
ENTRIES = {
    'forward': lambda model, x: model(x),
    'forward_features': lambda model, x: model.forward_features(x),
    'forward_intermediates': lambda model, x: model.forward_intermediates(x)[0],
    'intermediates_only': lambda model, x: model.forward_intermediates(x, intermediates_only=True)[-1],
}


def _gradients(model, entry, x, forwards=1):
    torch.manual_seed(7)
    model.zero_grad()
    outs = [entry(model, x) for _ in range(forwards)]
    sum((out * (i + 1)).sum() for i, out in enumerate(outs)).backward()
    return outs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize('forwards', [1, 2])
@pytest.mark.parametrize('entry', ENTRIES)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', ['sd_resnet18', 'sd_resnet20_cifar'])
def test_checkpointing_gives_the_same_gradients(name, mode, entry, forwards):
    model = make(name, train=True, drop_path_mode=mode, dtype=torch.float64, drop_path_rate=0.7)
    checkpointed = copy.deepcopy(model)
    checkpointed.set_grad_checkpointing()
    x = images(dtype=torch.float64)
    outs, gradients = _gradients(model, ENTRIES[entry], x, forwards)
    outs_again, gradients_again = _gradients(checkpointed, ENTRIES[entry], x, forwards)
    assert all(torch.equal(a, b) for a, b in zip(outs, outs_again))
    assert gradients.keys() == gradients_again.keys()
    for key in gradients:
        torch.testing.assert_close(gradients[key], gradients_again[key], rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize('forwards', [1, 2])
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', ['sd_resnet18', 'sd_resnet20_cifar'])
def test_features_only_models_skip_alike_with_and_without_checkpointing(name, mode, forwards):
    options = dict(train=True, drop_path_mode=mode, drop_path_rate=0.7, dtype=torch.float64, features_only=True)
    last = lambda model, x: model(x)[-1]  # noqa: E731
    wrapped = make(name, **options, num_classes=None)
    plain = make(name, train=True, drop_path_mode=mode, drop_path_rate=0.7, dtype=torch.float64)
    plain.load_state_dict(wrapped.state_dict(), strict=False)
    checkpointed = copy.deepcopy(wrapped)
    checkpointed.set_grad_checkpointing()
    x = images(dtype=torch.float64)
    outs, gradients = _gradients(wrapped, last, x, forwards)
    outs_again, gradients_again = _gradients(checkpointed, last, x, forwards)
    outs_plain, gradients_plain = _gradients(plain, ENTRIES['forward_features'], x, forwards)
    assert torch.equal(outs[0], outs_again[0])
    assert torch.equal(outs[0], outs_plain[0])
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradient, gradients_again[key], rtol=1e-9, atol=1e-12, msg=key)
        assert torch.equal(gradient, gradients_plain[key]), key


@pytest.mark.parametrize('entry', ENTRIES)
@pytest.mark.parametrize('mode', MODES)
def test_every_entry_draws_once_and_skips_alike(mode, entry):
    model = make('sd_resnet18', train=True, drop_path_mode=mode)
    draws = []
    draw = model.draw
    model.draw = lambda x: draws.append(1) or draw(x)
    forward, _ = count_calls(list(model.blocks()))
    torch.manual_seed(5)
    ENTRIES[entry](model, images())
    assert len(draws) == 1
    reference = make('sd_resnet18', train=True, drop_path_mode=mode)
    expected, _ = count_calls(list(reference.blocks()))
    torch.manual_seed(5)
    reference(images())
    assert forward == expected


def test_features_do_not_share_memory_where_all_blocks_between_are_dropped():
    """Whoever writes to one of them would change the other."""
    model = make('sd_resnet20_cifar', train=True, features_only=True, num_classes=None)
    decide(model.network, [False] * 9)
    stem, first, *_ = model(images())
    assert stem.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
    assert torch.equal(stem, first)


@pytest.mark.parametrize('mode', MODES)
def test_an_empty_batch_trains_as_in_timm(mode):
    model = make('sd_resnet18', train=True, drop_path_mode=mode)
    model(images(0)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_pruned_models_draw_for_the_blocks_that_are_left():
    for name, left in (('sd_resnet18', 4), ('sd_resnet20_cifar', 6)):
        model = make(name, train=True)
        model.prune_intermediate_layers([0, 2])
        assert len(model.survival_probs) == left
        x, features = model.forward_intermediates(images(), indices=[0, 2])
        assert len(features) == 2
        assert torch.equal(features[-1], x)


def test_stop_early_runs_no_later_stage():
    model = make('sd_resnet18', train=True)
    forward, _ = count_calls(list(model.blocks()))
    features = model.forward_intermediates(images(), indices=[1, 2], stop_early=True, intermediates_only=True)
    assert [f.shape[1] for f in features] == [16, 24]
    assert forward[4:] == [[]] * 4
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW', got 'NLC'"):
        model.forward_intermediates(images(), output_fmt='NLC')


def test_hooks_on_stages_fire_and_stages_work_alone():
    """GradCAM and timm's FeatureHookNet hang on `layer4`."""
    for feature_cls in ('hook', 'list', 'fx'):
        model = timm.create_model('sd_resnet18', features_only=True, feature_cls=feature_cls).train()
        assert [f.shape[1] for f in model(images())] == [64, 64, 128, 256, 512]


def test_nothing_is_drawn_where_nothing_drops():
    for model in (make('sd_resnet18'), make('sd_resnet18', train=True, drop_path_rate=0)):
        state = torch.get_rng_state()
        model(images_without_rng())
        assert torch.equal(torch.get_rng_state(), state)


def images_without_rng():
    return torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)


def test_a_stage_in_training_inside_a_frozen_model_drops():
    model = make('sd_resnet18', drop_path_rate=0.9)
    model.layer4.train()
    forward, _ = count_calls(list(model.blocks()))
    for _ in range(10):
        model(images())
    assert [len(calls) for calls in forward[:6]] == [10] * 6
    assert sum(len(calls) for calls in forward[6:]) < 20


@pytest.mark.parametrize('name', ['sd_resnet18', 'sd_resnet20_cifar'])
@torch.no_grad()
def test_set_drop_path_keeps_the_test_time_function(name):
    model, x = make(name, dtype=torch.float64), images(dtype=torch.float64)
    expected = model(x)
    depth = len(model.survival_probs)
    for kwargs, probs in (
        (dict(rate=0.2), survival_probs(depth, 0.2)),
        (dict(schedule='uniform'), survival_probs(depth, 0.2, 'uniform')),
        (dict(rescale='train'), survival_probs(depth, 0.2, 'uniform')),
        (dict(schedule=[0.9, 0.3]), survival_probs(depth, schedule=[0.9, 0.3])),
        (dict(rescale='test', mode='row'), survival_probs(depth, schedule=[0.9, 0.3])),
        (dict(rate=0), (1.0,) * depth),
        (dict(rate=0.5, schedule='linear'), survival_probs(depth)),
    ):
        model.set_drop_path(**kwargs)
        assert model.survival_probs == probs
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert model.drop_path_mode == 'row'


def test_a_pruned_network_keeps_its_probabilities_when_another_setting_changes():
    model = timm.create_model('sd_resnet18', features_only=True, out_indices=(1, 2, 3)).network
    before = model.survival_probs
    assert before == survival_probs(8)[:6]
    model.set_drop_path(mode='subset', rescale='train')
    assert model.survival_probs == before
    model.set_drop_path(rate=0.5)
    assert model.survival_probs == survival_probs(6)


def test_a_refused_set_drop_path_changes_nothing():
    model = make('sd_resnet18')
    before = copy.deepcopy(model.state_dict())
    for kwargs, message in (
        (dict(rate=1), 'drop_path_rate must be in'),
        (dict(schedule='x'), 'drop_path_schedule must be one of'),
        (dict(mode='x'), 'drop_path_mode must be one of'),
        (dict(rescale='x'), 'drop_path_rescale must be one of'),
        (dict(rate=0.3, schedule=[1, 0.5]), 'drop_path_rate must be None or 0'),
    ):
        with pytest.raises(ValueError, match=message):
            model.set_drop_path(**kwargs)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.survival_probs == survival_probs(8)
    attentive = make('sd_resnet18', block_args={'attn_layer': 'se'}, drop_path_rescale='train')
    with pytest.raises(ValueError, match='rescale'):  # only from the second block on: the first one's p_l is 1
        attentive.set_drop_path(rescale='test', schedule='timm')
    assert {block.drop_path.rescale for block in attentive.blocks()} == {'train'}


@torch.no_grad()
def test_frozen_norms_are_rescaled_too():
    """timm's freezing makes buffers of the weights; the branch must be scaled all the same."""
    model, x = make('sd_resnet18', dtype=torch.float64), images(dtype=torch.float64)
    freeze_batch_norm_2d(model)
    assert not list(model.layer1[0].bn2.parameters())
    expected = model(x)
    model.set_drop_path(rate=0.2)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('name', ['sd_resnet18', 'sd_resnet20_cifar'])
def test_options_reach_every_entrypoint(name):
    model = make(
        name, drop_path_rate=0.3, drop_path_schedule='uniform', drop_path_mode='subset', drop_path_rescale='train',
        drop_path_sync=False,
    )  # fmt: skip
    assert set(model.survival_probs) == {0.7}
    assert {b.drop_path.mode for b in model.blocks()} == {'subset'}
    assert {b.drop_path.rescale for b in model.blocks()} == {'train'}
    assert model.drop_path_sync is False
    with pytest.raises(ValueError, match='drop_path_mode must be one of'):
        make(name, drop_path_mode='column')
    with pytest.raises(ValueError, match="drop_path_sync must be True or False, got 'false'"):
        make(name, drop_path_sync='false')  # as timm's --model-kwargs drop_path_sync=false gives it


def test_the_same_seed_gives_the_same_gradients():
    for mode in MODES:
        model = make('sd_resnet18', train=True, drop_path_mode=mode)
        (a,), grads_a = _gradients(model, ENTRIES['forward'], images_without_rng())
        (b,), grads_b = _gradients(copy.deepcopy(model), ENTRIES['forward'], images_without_rng())
        assert torch.equal(a, b)
        assert all(torch.equal(grads_a[k], grads_b[k]) for k in grads_a)


def test_a_norm_that_divides_its_weight_again_is_refused_under_test_time_rescaling():
    """A factor in it would be without effect, and the network another one, without a word."""
    model = timm.create_model('sd_resnet20_cifar')
    torch.nn.utils.spectral_norm(model.layer1[0].bn2)
    with pytest.raises(ValueError, match='needs a last norm layer whose weight is a parameter'):
        model.set_drop_path(rescale='test')
