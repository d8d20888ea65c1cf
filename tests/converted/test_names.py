"""Who puts `sd_` before any name of timm's: it builds, drops when nothing is said, and trains."""

import json
import random
import sys
import types

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import nn

import sd_resnet
from docs.coverage import RECORD
from sd_resnet.analysis.networks import network_of
from sd_resnet.converted import converted_models, private_api
from sd_resnet.converted.published_rates import UNPUBLISHED, published

from ..conftest import fresh_python

LISTED = [name for name in converted_models.NAMES.read_text(encoding='utf-8').split() if timm.is_model(name)]
PARAMETERS = {
    record['name']: record.get('parameters', 0) for record in json.loads(RECORD.read_text('utf-8'))['architectures']
}
DRAWN = random.Random(20).sample(LISTED, 40)


def on_meta(name):
    """Is it too large for a step with data, or built for images of one size, or of whole blocks of attention?"""
    return PARAMETERS.get(name, 0) > 12e6 or get_pretrained_cfg(name).fixed_input_size or 'halo' in name


@pytest.mark.parametrize('name', DRAWN, ids=lambda name: f'{name}, {"meta" if on_meta(name) else "cpu"}')
def test_any_name_builds_drops_and_trains_a_step(name):
    device, rate = 'meta' if on_meta(name) else 'cpu', published(name).rate
    try:
        with torch.device(device):
            model = timm.create_model(f'sd_{name}')
    except NotImplementedError:  # earlier versions of torch and timm cannot build it there
        model = timm.create_model(f'sd_{name}').to(device)
    images = torch.randn(13, *(model.pretrained_cfg['input_size'] if device == 'meta' else (3, 64, 64)), device=device)
    model.train()
    assert 0 < max(each.drop_prob for own in network_of(model).drop_paths.values() for each in own) <= rate + 1e-6
    shares = []
    network_of(model).on_forward(shares.append)
    for _ in range(10):  # a window of nearly all rows has all of them at times
        out = model(images)
        if min(shares[-1]) < 1:
            break
    else:
        pytest.fail('nothing was dropped')
    before = {key: value.clone() for key, value in model.named_parameters()}
    sum(each.float().square().mean() for each in (out if isinstance(out, tuple) else (out,))).backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert any(parameter.grad is not None for parameter in model.parameters())
    if device == 'cpu':
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert any(not torch.equal(before[key], value) for key, value in model.named_parameters())


def test_every_name_of_the_list_is_there_with_all_of_timms_tags():
    """In a fresh process: what other tests register is not in it. Own names win."""
    code = """if True:
        import json, timm
        names = timm.list_models()
        tags = [name for name in timm.list_pretrained() if not name.startswith('sd_')]
        import sd_resnet
        from sd_resnet.converted.converted_models import NAMES
        from timm.models import get_pretrained_cfg, is_model_in_modules, is_model_pretrained, model_entrypoint
        listed = [name for name in NAMES.read_text(encoding='utf-8').split() if name in names]
        converted = timm.list_models(module='converted_models')
        own = timm.list_models(module=('resnet_imagenet', 'resnet_cifar'))
        assert set(converted) | set(own) == set(timm.list_models('sd_*')), 'timm.list_models'
        assert set(converted) == {f'sd_{name}' for name in listed} - set(own), 'names'
        assert 'sd_resnet50' in own
        known = set(converted)
        ours = {name for name in timm.list_models('sd_*', pretrained=True) if name.split('.')[0] in known}
        assert ours == {f'sd_{name}' for name in tags if f'sd_{name.split(".")[0]}' in known}, 'tags'
        assert len(ours) > 500
        for name in converted:
            cfg, plain = get_pretrained_cfg(name), get_pretrained_cfg(name[3:])
            assert (cfg.hf_hub_id, cfg.tag, cfg.url, cfg.architecture) == (plain.hf_hub_id, plain.tag, plain.url, name)
            assert plain.architecture == name[3:]
            assert is_model_pretrained(name) == is_model_pretrained(name[3:])
            assert model_entrypoint(name).__name__ == name
        print(len(converted))
    """
    assert int(fresh_python(code, SD_RESNET_AUTOLOAD='0')) > 700


def test_names_that_this_timm_does_not_know_are_passed_over():
    code = """if True:
        import timm.models._registry as registry
        import timm
        del registry._model_entrypoints['vit_tiny_patch16_224']
        import sd_resnet
        print(timm.is_model('sd_vit_tiny_patch16_224'), timm.is_model('sd_vit_small_patch16_224'))
    """
    assert fresh_python(code, SD_RESNET_AUTOLOAD='0') == 'False True'


@pytest.mark.parametrize('told', [True, False])
def test_configurations_are_timms_also_where_it_does_not_show_its_own(told, monkeypatch):
    """Without timm's private tables its functions must give the same, or a tag would load another's weights."""
    if not told:
        monkeypatch.setattr(private_api, '_cfgs', {})
    for name in ('convnext_tiny', 'vit_tiny_patch16_224', 'xcit_nano_12_p8_224', 'poolformer_s12'):
        found = private_api.pretrained_cfgs(name)
        assert found.default.hf_hub_id == get_pretrained_cfg(name).hf_hub_id
        assert {f'{name}.{tag}': cfg for tag, cfg in found.cfgs.items()} == timm.models.get_arch_pretrained_cfgs(name)
    assert not private_api.pretrained_cfgs('nobody').cfgs


class Foreign(nn.Module):
    """A model of a third party, registered with timm."""

    def __init__(self, drop_path_rate=0.0, num_classes=5, in_chans=3):
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(in_chans, 8, 4, 4), nn.Sequential(Block(0.0), Block(drop_path_rate))
        self.head = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class Block(nn.Module):
    def __init__(self, rate):
        super().__init__()
        self.conv, self.drop_path = nn.Conv2d(8, 8, 3, padding=1), DropPath(rate)

    def forward(self, x):
        return x + self.drop_path(self.conv(x))


@pytest.mark.parametrize('forgets', [False, True])
def test_register_takes_a_third_partys_model_with_its_tags(forgets, monkeypatch):
    """Also one that takes a rate and builds none, as some of timm's did: it would drop nothing in silence."""
    name = f'foreign_net_{forgets}'
    module = types.ModuleType('somebody.foreign_net')
    monkeypatch.setitem(sys.modules, module.__name__, module)
    cfgs = {f'{name}.a': dict(hf_hub_id='me/a', input_size=(3, 32, 32)), f'{name}.b': dict(hf_hub_id='me/b')}
    module.default_cfgs = generate_default_cfgs(cfgs)

    def entrypoint(pretrained=False, drop_path_rate=0.0, **kwargs):
        rate = 0.0 if forgets else drop_path_rate
        return build_model_with_cfg(Foreign, name, pretrained, drop_path_rate=rate, **kwargs)

    entrypoint.__module__, entrypoint.__name__ = module.__name__, name
    register_model(entrypoint)
    assert sd_resnet.register(name) == sd_resnet.register(name) == f'sd_{name}'
    assert timm.list_pretrained(f'sd_{name}*') == [f'sd_{name}.a', f'sd_{name}.b']
    assert get_pretrained_cfg(f'sd_{name}.b').hf_hub_id == 'me/b'
    for given, rate in (({}, UNPUBLISHED), ({'drop_path_rate': 0.3}, 0.3), ({'drop_path_rate': 0}, 0)):
        model = timm.create_model(f'sd_{name}', **given)
        assert [each.drop_prob for (each,) in network_of(model).drop_paths.values()] == pytest.approx([0, rate])
