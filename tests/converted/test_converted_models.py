"""`sd_` names of timm's models: who swaps the name in timm's scripts must get the same network, weights and options."""

import copy

import pytest
import timm
import torch
from timm.models import safe_model_name, save_for_hf

import sd_resnet
from sd_resnet.converted.convert import converted_blocks

VIT = dict(img_size=32, embed_dim=48, depth=3, num_heads=2, num_classes=5)


def rates(model):
    return [block.block_drop_path.drop_prob for block in converted_blocks(model).values()]


SMALLEST = [
    'vit_tiny_patch16_224',
    'deit3_small_patch16_224',
    'convnext_atto',
    'convnextv2_atto',
    'swin_tiny_patch4_window7_224',
    'swinv2_tiny_window8_256',
    'caformer_s18',
    'poolformerv2_s12',
    'resnetv2_18',
    'tf_efficientnetv2_b0',
]


@pytest.mark.parametrize('name', SMALLEST)
def test_every_name_is_timms_network_with_blocks_that_skip(name):
    """Not a single block may have been missed by a new version of timm."""
    with torch.device('meta'):
        plain, model = timm.create_model(name), timm.create_model(f'sd_{name}', drop_path_rate=0.3)
    assert list(model.state_dict()) == list(plain.state_dict())
    own = rates(model)
    assert len(own) >= (5 if 'resnetv2' in name or 'efficientnet' in name else 12)
    assert 0.2 < max(own) <= 0.3 + 1e-9
    assert own == sorted(own)
    assert model.pretrained_cfg['architecture'] == f'sd_{name}'


def test_pretrained_weights_of_the_plain_model_load(tmp_path):
    plain = timm.create_model('vit_tiny_patch16_224', **VIT).eval()
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    overlay = {'file': str(tmp_path / 'plain.pth'), 'num_classes': 5}
    model = timm.create_model('sd_vit_tiny_patch16_224', pretrained=True, pretrained_cfg_overlay=overlay, **VIT).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), plain(x))


def test_a_saved_model_comes_back_converted(tmp_path):
    """As from the Hugging Face Hub: the configuration names the architecture."""
    model = timm.create_model('sd_vit_tiny_patch16_224', **VIT).eval()
    save_for_hf(model, str(tmp_path), model_args={k: v for k, v in VIT.items() if k != 'num_classes'})
    twin = timm.create_model(f'local-dir:{tmp_path}', pretrained=True, drop_path_rate=0.2).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(twin(x), model(x))
    assert rates(twin) == pytest.approx([0, 0.1, 0.2])


def test_options():
    """As `--model-kwargs` gives them."""
    create = 'sd_vit_tiny_patch16_224'
    assert rates(timm.create_model(create, **VIT)) == pytest.approx([0, 0.05, 0.1])  # as it was published
    assert rates(timm.create_model(create, drop_path_rate=0.4, **VIT)) == pytest.approx([0, 0.2, 0.4])
    model = timm.create_model(
        create,
        drop_path_rate=0.4,
        drop_path_schedule='uniform',
        drop_path_mode='batch',
        drop_path_sync=False,
        drop_path_ramp=('early', 3),
        **VIT,
    )
    assert rates(model) == pytest.approx([0.4] * 3)
    block = next(iter(converted_blocks(model).values()))
    assert block.block_drop_path.mode == 'batch'
    assert not block.draws.sync
    assert model.drop_path_ramp.steps == 3
    assert rates(timm.create_model(create, drop_path_schedule=[0.9, 0.8, 0.7], **VIT)) == pytest.approx([0.1, 0.2, 0.3])


@pytest.mark.parametrize(
    ('option', 'value'),
    [
        ('drop_path_rate', 1.5),
        ('drop_path_schedule', 'cosine'),
        ('drop_path_mode', 'column'),
        ('drop_path_ramp', ('up', 3)),
    ],
)
def test_errors_name_the_option(option, value):
    with pytest.raises(ValueError, match=option):
        timm.create_model('sd_vit_tiny_patch16_224', **VIT, **{option: value})


def test_other_channels_sizes_and_backbones():
    model = timm.create_model('sd_convnext_atto', in_chans=1, drop_path_rate=0.3, features_only=True)
    assert max(rates(model)) == pytest.approx(0.3)
    assert len(model.train()(torch.randn(2, 1, 32, 32))) == 4
    model = timm.create_model('sd_vit_tiny_patch16_224', features_only=True, drop_path_rate=0.3, **VIT)
    assert len(model.train()(torch.randn(2, 3, 32, 32))) == 3


def test_what_has_no_drop_path_is_refused_when_it_is_built():
    sd_resnet.register('vgg11')
    with pytest.raises((ValueError, TypeError), match='drop_path_rate'):
        timm.create_model('sd_vgg11', drop_path_rate=0.3)


def test_low_precision_and_inference_mode():
    with torch.inference_mode():
        model = timm.create_model('sd_vit_tiny_patch16_224', dtype=torch.bfloat16, drop_path_rate=0.4, **VIT)
    assert rates(model) == pytest.approx([0, 0.2, 0.4])


def test_a_network_of_this_package_is_not_registered_again():
    with pytest.raises(ValueError, match="no network of its own for, got 'resnet50': use sd_resnet50"):
        sd_resnet.register('resnet50')


@pytest.mark.parametrize('name', ['vit_tiny', 'sd_resnet50', 'vit_tiny_patch16_224.augreg_in21k', 5])
def test_what_cannot_be_registered_is_refused(name):
    with pytest.raises(ValueError, match=f'name must be a model of timm, without tag, .* got {name!r}'):
        sd_resnet.register(name)


def test_averages_and_copies_keep_the_name():
    model = timm.create_model('sd_vit_tiny_patch16_224', **VIT)
    assert copy.deepcopy(model).pretrained_cfg['architecture'] == 'sd_vit_tiny_patch16_224'
    assert safe_model_name(model.pretrained_cfg['architecture']) == 'sd_vit_tiny_patch16_224'


def test_unconvert_gives_back_timms_name_and_convert_keeps_ours():
    """By it timm writes what it publishes: under ours nobody could load that without this package."""
    model = timm.create_model('sd_test_vit')
    sd_resnet.convert(model, 0.3)
    assert model.pretrained_cfg['architecture'] == 'sd_test_vit'
    sd_resnet.unconvert(model)
    assert (model.pretrained_cfg['architecture'], model.default_cfg['architecture']) == ('test_vit', 'test_vit')


@pytest.mark.parametrize('config', [None, {'input_size': (3, 160, 160)}, {'architecture': 'sd_of_a_third_party'}])
def test_unconvert_leaves_other_names_alone(config):
    model = timm.create_model('test_vit', drop_path_rate=0.2)
    model.pretrained_cfg = config
    sd_resnet.convert(model, input_size=(3, 160, 160))
    sd_resnet.unconvert(model)
    assert model.pretrained_cfg == config
