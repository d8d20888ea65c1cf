"""At rate 0 the networks are timm's own, bit for bit; the pretrained tags name weights that exist."""

import hashlib
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg

from ..conftest import IMAGENET, images, make

TAGGED = ['resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnet50d', 'resnext50_32x4d']


def _step(model, x):
    torch.manual_seed(1)
    loss = model(x).square().mean()
    loss.backward()
    return loss


@pytest.mark.parametrize('name', IMAGENET)
def test_at_rate_zero_the_network_is_timms_bit_for_bit(name):
    torch.manual_seed(3)
    ours = timm.create_model(f'sd_{name}', drop_path_rate=0, num_classes=10, zero_init_last=False)
    torch.manual_seed(3)
    timms = timm.create_model(name, num_classes=10, zero_init_last=False)
    state, expected = ours.state_dict(), timms.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)

    x = images(2, 64)
    for train in (True, False):
        assert torch.equal(_step(ours.train(train), x), _step(timms.train(train), x))
    for (key, a), (_, b) in zip(ours.named_parameters(), timms.named_parameters()):
        assert torch.equal(a.grad, b.grad), key
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), timms.buffers()))


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


@pytest.mark.parametrize('name', TAGGED)
def test_tags_have_timms_preprocessing_and_timms_repository(name):
    assert get_pretrained_cfg(f'sd_{name}').tag == 'a1_in1k'
    for tag in ('a1_in1k', 'a2_in1k'):
        ours, timms = get_pretrained_cfg(f'sd_{name}.{tag}').to_dict(), get_pretrained_cfg(f'{name}.{tag}').to_dict()
        assert ours['hf_hub_id'] == f'timm/{name}.{tag}' == timms['hf_hub_id']
        assert ours['hf_hub_filename'] == 'model.safetensors'
        different = {key for key in {*ours, *timms} if ours.get(key) != timms.get(key)}
        assert different <= {'architecture', 'url', 'hf_hub_filename'}


def test_networks_without_weights_trained_with_stochastic_depth_have_none():
    own = {name.removeprefix('sd_') for name in timm.list_models(module='resnet_imagenet')}
    pretrained = {name.split('.')[0].removeprefix('sd_') for name in timm.list_pretrained('sd_*')}
    assert pretrained & own == set(TAGGED)
    with pytest.raises(RuntimeError, match='No pretrained weights exist'):
        timm.create_model('sd_resnet152d', pretrained=True)


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
