"""At rate 0 the networks are timm's own, bit for bit; the pretrained tags name weights that exist."""

import hashlib
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import build_model_with_cfg, get_arch_pretrained_cfgs, get_pretrained_cfg
from timm.models.resnet import ResNet

import sd_resnet
from sd_resnet import survival_probs
from sd_resnet.resnets.packaged import released
from sd_resnet.resnets.resnet_imagenet import ARCHITECTURES, StochasticResNet, register_architecture

from ..conftest import IMAGENET, KINDS, NARROW, images, make
from ..faults.observed import MODES, ROWS, check_step, own_kind

# Of the installed timm; `their_models` are registered later
NAMES = list(ARCHITECTURES)


def _step(model, x):
    torch.manual_seed(1)
    loss = model(x).square().mean()
    loss.backward()
    return loss


def _printed(model):
    """Every layer with its arguments, under the names of timm's classes, and without drop paths."""
    lines = [line for line in str(model).splitlines() if '(drop_path): ' not in line]
    text = '\n'.join(lines).replace('Stochastic', '').replace(': Stage(', ': Sequential(')
    return text


@pytest.mark.parametrize('name', NAMES)
def test_every_resnet_of_timm_is_there_layer_by_layer(name):
    with torch.device('meta'):
        ours, timms = timm.create_model(f'sd_{name}'), timm.create_model(name)
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == [(k, v.shape) for k, v in timms.state_dict().items()]
    assert _printed(ours) == _printed(timms)
    assert ours.feature_info == timms.feature_info
    assert ours.survival_probs == survival_probs(len(list(ours.blocks())), 0.5)
    assert ours.drop_path_mode == 'batch'


def test_no_resnet_of_timms_own_blocks_is_missing():
    """Were they found by no more than a name, a new one, or a new way of timm to build them, would be lost."""
    missing = []
    for name in timm.list_models(module='resnet', exclude_filters=[*NAMES, 'sd_*']):
        with torch.device('meta'):
            model = timm.create_model(name)
        missing += [name] * (type(model) is ResNet)
    assert not missing
    assert {*IMAGENET, *KINDS} < {*NAMES}
    assert len(NAMES) >= 81


def _bit_equal(ours, timms, x):
    state, expected = ours.state_dict(), timms.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    for train in (True, False):
        assert torch.equal(_step(ours.train(train), x), _step(timms.train(train), x))
    for (key, a), (_, b) in zip(ours.named_parameters(), timms.named_parameters()):
        assert torch.equal(a.grad, b.grad), key
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), timms.buffers()))


def _both(name, **options):
    torch.manual_seed(3)
    ours = timm.create_model(f'sd_{name}', drop_path_rate=0, num_classes=10, zero_init_last=False, **options)
    torch.manual_seed(3)
    return ours, timm.create_model(name, num_classes=10, zero_init_last=False, **options)


@pytest.mark.parametrize('name', IMAGENET)
def test_at_rate_zero_the_network_is_timms_bit_for_bit(name):
    _bit_equal(*_both(name), images(2, 64))


@pytest.mark.parametrize('name', [*KINDS, 'ecaresnet50d_pruned'])
def test_at_rate_zero_every_kind_of_network_is_timms_bit_for_bit(name):
    options = {**NARROW, **KINDS[name], 'drop_block_rate': 0.2} if name in KINDS else {'in_chans': 1}
    x = images(2, 64)[:, : options.get('in_chans', 3)]
    ours, timms = _both(name, **options)
    assert ours.training == timms.training
    _bit_equal(ours, timms, x)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', KINDS)
def test_every_kind_of_network_drops_what_timms_would_with_the_same_draws(name, mode):
    """Its anti-aliasing, attention, norms, activations and stem included, forward and backward."""
    case = own_kind(name, KINDS[name], mode)
    dropped, total = check_step(case, images(ROWS, 64, dtype=torch.float64), seeds=range(2))
    assert 0 < dropped < total


@pytest.mark.parametrize('name', ['resnet50_gn', 'resnetblur18'])
@torch.no_grad()
def test_changing_the_rescaling_keeps_the_function_with_other_norms_and_anti_aliasing(name):
    model, x = make(f'sd_{name}', dtype=torch.float64, **KINDS[name]), images(2, 64, dtype=torch.float64)
    expected = model(x)
    model.set_drop_path(rate=0.3, rescale='test')
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    plain = make(name, dtype=torch.float64, **KINDS[name])
    plain.load_state_dict(sd_resnet.to_resnet(model).state_dict())
    torch.testing.assert_close(plain(x), expected, rtol=1e-12, atol=1e-12)


def _operators(model, run):
    run(model, images(2, 32))  # what happens once only
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        run(model, images(2, 32))
    return [event.name for event in profile.events() if event.name.startswith(('aten::', 'autograd::'))]


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
def test_at_rate_zero_a_training_step_runs_timms_operators(name):
    ours = _operators(make(f'sd_{name}', train=True, drop_path_rate=0), _step)
    timms = _operators(make(name, train=True), _step)
    assert len(ours) > 100
    assert ours == timms


@pytest.mark.parametrize('name', ['resnet18', 'resnet50'])
@torch.no_grad()
def test_evaluation_runs_timms_operators(name):
    ours = _operators(make(f'sd_{name}'), lambda model, x: model(x))
    timms = _operators(make(name), lambda model, x: model(x))
    assert len(ours) > 50
    assert timms == ours


@pytest.mark.parametrize('name', NAMES)
def test_tags_have_timms_preprocessing_and_timms_repository(name):
    timms = get_arch_pretrained_cfgs(name)
    ours = get_arch_pretrained_cfgs(f'sd_{name}')
    assert ours.keys() - released(f'sd_{name}').keys() == {f'sd_{tag}' for tag in timms}
    for tag, expected in timms.items():
        cfg = ours[f'sd_{tag}']
        assert bool(cfg.has_weights) == bool(expected.has_weights)
        different = {'architecture'}
        if expected.has_weights:
            assert cfg.hf_hub_id == f'timm/{tag}'
            assert cfg.hf_hub_filename == 'model.safetensors'
            different |= {'url', 'hf_hub_filename'}
        cfg, expected = cfg.to_dict(), expected.to_dict()
        assert {key for key in {*cfg, *expected} if cfg.get(key) != expected.get(key)} <= different


@pytest.mark.parametrize('name', NAMES)
def test_the_default_tag_was_trained_with_stochastic_depth_or_is_timms(name):
    tags = {tag.partition('.')[2] for tag in get_arch_pretrained_cfgs(name)}
    timms = get_pretrained_cfg(name).tag
    assert get_pretrained_cfg(f'sd_{name}').tag == next(tag for tag in ('a1_in1k', 'a2_in1k', timms) if tag in tags)


def test_a_network_without_weights_says_so():
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model('sd_resnet200', pretrained=True)


def test_a_resnet_of_somebody_else_is_registered_with_its_tags(tmp_path):
    from . import their_models

    assert register_architecture('their_resnet')
    assert register_architecture('their_resnet')
    assert their_models.build_model_with_cfg is timm.models.resnet.build_model_with_cfg is build_model_with_cfg
    assert get_pretrained_cfg('sd_their_resnet').tag == 'second'
    for tag in ('first', 'second'):
        cfg, theirs = (get_pretrained_cfg(f'{name}.{tag}') for name in ('sd_their_resnet', 'their_resnet'))
        assert (cfg.url, cfg.hf_hub_id, cfg.input_size) == (theirs.url, theirs.hf_hub_id, theirs.input_size)
        assert cfg.has_weights
    case = own_kind('their_resnet', {}, 'subset')
    assert type(case.model) is StochasticResNet
    assert check_step(case, images(ROWS, 64, dtype=torch.float64))[0]
    save_file(make('their_resnet', full=True, num_classes=1000).state_dict(), tmp_path / 'model.safetensors')
    file = {'file': str(tmp_path / 'model.safetensors')}
    ours = timm.create_model('sd_their_resnet.first', pretrained=True, pretrained_cfg_overlay=file)
    theirs = timm.create_model('their_resnet.first', pretrained=True, pretrained_cfg_overlay=file)
    with torch.no_grad():
        x = images(2, 64)
        assert torch.equal(ours.eval()(x), theirs.eval()(x))
    assert register_architecture('their_untagged_resnet')
    assert timm.create_model('sd_their_untagged_resnet').survival_probs[-1] == 0.5


@pytest.mark.parametrize('kind', ['changed_resnet', 'wrapped_resnet', 'filtered_resnet', 'resnet_by_hand', 'vit'])
def test_what_arguments_alone_do_not_build_is_not_registered(kind):
    """It would be another network than theirs in silence; `convert` takes it."""
    from . import their_models  # noqa: F401 - registers

    assert timm.is_model(f'their_{kind}')
    assert not register_architecture(f'their_{kind}')
    assert not timm.is_model(f'sd_their_{kind}')


def test_blocks_of_their_own_in_timms_class_are_left_to_convert():
    assert not register_architecture('res2net50_26w_4s')


LOAD = """
import sys, timm, torch
torch.manual_seed(0)
x = torch.randn(2, 3, 64, 64)
model = timm.create_model(sys.argv[1], pretrained=True).eval()
reference = timm.create_model(sys.argv[1].removeprefix('sd_'), pretrained=True).eval()
with torch.no_grad():
    a, b = model(x), reference(x)
print(model.survival_probs[-1], float((a - b).abs().max() / b.abs().max()))
"""


def _run(code, *args, **environment):
    import os

    return subprocess.run(
        [sys.executable, '-c', code, *args], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_pretrained_works_offline_from_a_filled_cache(tmp_path):
    """The cache is laid out as the Hub's client does it: blobs by hash, a snapshot of links, refs/main."""
    weights = make('resnet18', full=True, num_classes=1000).state_dict()
    save_file(weights, tmp_path / 'model.safetensors')
    commit, repo = 'a' * 40, tmp_path / 'hub' / 'models--timm--resnet18.a1_in1k'
    blob = repo / 'blobs' / hashlib.sha256((tmp_path / 'model.safetensors').read_bytes()).hexdigest()
    snapshot = repo / 'snapshots' / commit
    for folder in (blob.parent, snapshot, repo / 'refs'):
        folder.mkdir(parents=True)
    (tmp_path / 'model.safetensors').rename(blob)
    (snapshot / 'model.safetensors').symlink_to(blob)
    (repo / 'refs' / 'main').write_text(commit)
    result = _run(LOAD, 'sd_resnet18', HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(tmp_path / 'hub'))
    assert result.returncode == 0, result.stderr
    p_l, difference = map(float, result.stdout.split())
    assert p_l == 0.5
    assert difference < 1e-5


def test_pretrained_without_network_and_cache_says_what_to_do(tmp_path):
    result = _run(LOAD, 'sd_resnet18', HF_HUB_OFFLINE='1', HF_HUB_CACHE=str(tmp_path))
    *_, error, advice = result.stderr.strip().splitlines()
    assert 'cannot find the requested files in the local cache' in error
    assert advice.startswith('sd_resnet18: the pretrained weights are not in the cache and could not be downloaded.')
    assert 'pretrained=False' in advice
