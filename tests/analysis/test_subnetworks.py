"""Networks cut to size: ordinary networks that compute what is left of the whole one."""

import pytest
import timm
import torch
from timm.models import save_for_hf

import sd_resnet
from sd_resnet.analysis.costs import count_flops
from sd_resnet.analysis.networks import network_of
from sd_resnet.analysis.pruning import save
from sd_resnet.converted.convert import converted_blocks

from ..conftest import images, make
from ..converted.test_convert import build, convert
from ..faults.observed import Residual


def test_the_rest_of_a_resnet_is_timms_own_with_fewer_layers(tmp_path, monkeypatch):
    """As a folder that timm loads without the plugin's classes. Removed blocks pass their input on."""
    model = make('sd_resnet50', drop_path_rate=0.4)
    keep = [0, 2, 3, 6, 7, 8, 11, 13, 15]
    small = sd_resnet.subnetwork(model, keep=keep)
    assert type(small) is type(timm.create_model('resnet18'))
    save_for_hf(small.eval(), str(tmp_path), model_args=small._model_args)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert again.pretrained_cfg['architecture'] == 'resnet50'
    assert [len(getattr(again, f'layer{stage}')) for stage in range(1, 5)] == [2, 2, 3, 2]
    x = images(2, 64)
    assert torch.equal(again(x), small(x))
    for index, block in enumerate(model.blocks()):
        if index not in keep:
            monkeypatch.setattr(block, 'forward', lambda x: x)
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-4, atol=1e-4)


def test_the_rest_of_a_network_that_timm_has_pruned_is_not_what_fewer_layers_build():
    """Each of its blocks has widths of its own, which timm would give to the wrong ones."""
    model = timm.create_model('sd_ecaresnet50d_pruned')
    small = sd_resnet.subnetwork(model, keep=[0, 2, 3, 4, 7, 8, 13, 14])
    assert not hasattr(small, '_model_args')
    assert small.eval()(images(2)).shape == (2, 1000)


def test_the_rest_of_a_cifar_net_is_the_same_class_at_rate_0(tmp_path):
    model = make('sd_resnet20_cifar', drop_path_rescale='train', drop_path_ramp=('early', 3))
    small = sd_resnet.subnetwork(model, depth=5)
    assert small.expected_depth == 5
    save_for_hf(small.eval(), str(tmp_path), model_args=small._model_args)
    again = timm.create_model(f'local-dir:{tmp_path}', pretrained=True)
    x = images(2)
    assert torch.equal(again.train()(x), small.train()(x))  # nothing is dropped


@pytest.mark.parametrize('name', ['test_vit', 'test_convnext', 'swin_tiny_patch4_window7_224'])
def test_the_rest_of_a_converted_network_is_timms_own(name, monkeypatch, tmp_path):
    model, x = build(name, rate=0.4)
    convert(model, x)
    names = list(converted_blocks(model))
    keep = list(range(0, len(names), 2))
    small = sd_resnet.subnetwork(model.eval(), keep=keep)
    assert not converted_blocks(small)
    assert count_flops(small, tuple(x.shape[1:]))[''] < count_flops(model, tuple(x.shape[1:]))['']
    for index, block in enumerate(converted_blocks(model).values()):
        if index not in keep:
            monkeypatch.setattr(block, 'plain_class', _Passing)
    assert torch.equal(small(x), model(x))
    assert torch.equal(small.train()(x), small.eval()(x))
    if name in ('test_vit', 'test_convnext'):
        assert len(keep) == sum(small._model_args.get('depths', [small._model_args.get('depth')]))
        save_for_hf(small, str(tmp_path), model_args=small._model_args)
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), small(x))
    else:  # those of the whole network would build the whole network
        assert not hasattr(small, '_model_args')


class _Passing:
    @staticmethod
    def forward(self, x, *args, **kwargs):
        return x


@pytest.mark.parametrize('depth', range(2, 10))
def test_depth_keeps_as_many_blocks(depth):
    model = make('sd_resnet20_cifar')
    small = sd_resnet.subnetwork(model, depth=depth)
    assert sum(1 for _ in small.blocks()) == depth


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(), 'give either keep or depth'),
        (dict(keep=[0], depth=3), 'give either keep or depth'),
        (dict(keep=[0, 1]), r'\[3, 6\] too'),
        (dict(keep=[0, 0, 3, 6]), 'different numbers of blocks from 0 to 8'),
        (dict(keep=[3, 6, 9]), 'different numbers of blocks from 0 to 8'),
        (dict(depth=1), 'whole number from 2 to 9'),
        (dict(depth=2.0), 'whole number from 2 to 9'),
    ],
)
def test_errors_say_what_is_allowed(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sd_resnet.subnetwork(make('sd_resnet20_cifar'), **kwargs)


def test_a_network_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r'sd_resnet.convert has converted, got VisionTransformer'):
        network_of(timm.create_model('test_vit'))


def test_a_network_that_is_not_timms_is_cut_too(tmp_path):
    """It has no configuration."""
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), *(Residual() for _ in range(3)))
    convert(model, x := torch.randn(5, 3, 8, 8))
    small = sd_resnet.subnetwork(model.eval(), keep=[0, 2])
    assert torch.equal(small(x), model[3](model[1](model[0](x))))
    with pytest.raises(ValueError, match='cannot be written'):
        save(small, tmp_path / 'out')
