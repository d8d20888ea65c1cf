"""The paper's CIFAR nets: the layers, widths and shortcuts that its section 4 states."""

import pytest
import timm
import torch
from torch import nn

from sd_resnet.resnets.resnet_cifar import PadShortcut

from ..conftest import images, make

DEPTHS = [20, 32, 44, 56, 110, 152, 1202]


@pytest.mark.parametrize('depth', DEPTHS)
def test_depth_6n_plus_2_and_widths(depth):
    with torch.device('meta'):
        model = timm.create_model(f'sd_resnet{depth}_cifar')
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) + 1 == depth  # and one linear layer
    assert len(model.survival_probs) == (depth - 2) // 2
    assert {m.kernel_size for m in convs} == {(3, 3)}
    assert [m.out_channels for m in convs] == [16] * ((depth - 2) // 3 + 1) + [32] * ((depth - 2) // 3) + [64] * (
        (depth - 2) // 3
    )


def test_parameter_counts_are_those_of_he_et_al():
    """Table 6 of arXiv 1512.03385: 0.27 M for 20 layers, 1.7 M for 110, 19.4 M for 1202."""
    with torch.device('meta'):
        for depth, millions in ((20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7), (1202, 19.4)):
            model = timm.create_model(f'sd_resnet{depth}_cifar')
            assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.025)


@pytest.mark.parametrize('size', [8, 7])
def test_the_shortcut_averages_and_pads_with_zero_channels(size):
    x = torch.randn(2, 3, size, size)
    out = PadShortcut(4, 2)(x)
    assert out.shape == (2, 7, 4, 4)
    torch.testing.assert_close(out[:, :3, :3, :3], x[:, :, :6, :6].reshape(2, 3, 3, 2, 3, 2).mean((3, 5)))
    assert not out[:, 3:].any()
    assert not list(PadShortcut(4, 2).parameters())


@pytest.mark.parametrize('size', [28, 29, 32])
def test_any_image_size_fits(size):
    model = make('sd_resnet20_cifar', in_chans=1)
    x = torch.randn(2, 1, size, size)
    assert model.forward_features(x).shape == (2, 64, -(-size // 4), -(-size // 4))
    assert model(x).shape == (2, 10)


def test_the_classifier_can_be_changed_and_removed():
    model = make('sd_resnet20_cifar', dtype=torch.float64, drop_rate=0.5)
    x = images(dtype=torch.float64)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (4, 64)
    model.reset_classifier(3)
    assert model(x).shape == (4, 3)
    assert model.get_classifier() is model.fc
    assert model.get_classifier(name_only=True) == 'fc'
    model.reset_classifier(0, '')
    assert model(x).shape == (4, 64, 8, 8)


@pytest.mark.parametrize('blocks', [(2, 2), (2, 2, 2, 9), (2, 0, 2), 0])
def test_a_number_of_blocks_is_needed_for_each_stage(blocks):
    with pytest.raises(ValueError, match='blocks_per_stage must be one number of at least 1 or three, got '):
        timm.create_model('sd_resnet20_cifar', blocks_per_stage=blocks)


def test_dropout_is_the_heads_and_in_training_only():
    model, features = make('sd_resnet20_cifar', drop_rate=0.5), torch.ones(4, 64, 8, 8)
    assert (model.forward_head(features, pre_logits=True) == 1).all()
    assert set(model.train().forward_head(features, pre_logits=True).unique().tolist()) == {0.0, 2.0}


def test_layer_decay_groups_every_parameter():
    from timm.optim import param_groups_layer_decay

    model = make('sd_resnet20_cifar')
    groups = param_groups_layer_decay(model, layer_decay=0.75)
    assert sum(len(group['params']) for group in groups) == len(list(model.parameters()))
    assert len({group['lr_scale'] for group in groups}) > 9  # stem, nine blocks, head
