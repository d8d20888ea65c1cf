"""Whoever mistypes a model's name gets near ones in one short line; own and converted networks tell what they drew."""

import pytest
import timm
import torch

from sd_resnet.analysis.evaluation import evaluate
from sd_resnet.analysis.networks import check_name, network_of
from sd_resnet.analysis.pruning import load

from ..conftest import images, make
from ..converted.test_convert import build, convert


@pytest.mark.parametrize(
    ('name', 'own', 'near'),
    [
        ('sd_resnet5', True, 'sd_resnet50'),
        ('sd_resnet111_cifar', True, 'sd_resnet110_cifar'),
        ('sd_convnet_tiny', True, 'sd_convnext_tiny'),
        ('resnet5', False, 'resnet50'),
    ],
)
def test_an_unknown_name_gets_the_three_nearest(name, own, near):
    with pytest.raises(ValueError, match=f'got {name!r}') as error:
        check_name(name, own)
    said = str(error.value)
    assert len(said) < 200
    assert near in said
    assert sum(timm.is_model(word.strip(',')) for word in said.partition('got')[0].split()) == 3


@pytest.mark.parametrize('name', ['resnet50', 'vit_tiny_patch16_224', 'vit_tiny_patch16_224.augreg_in21k'])
def test_a_name_of_timm_is_answered_with_ours(name):
    with pytest.raises(ValueError, match=rf"model must be sd_{name.split('.')[0]}, with .*, got '{name}'"):
        check_name(name)
    check_name(name, own=False)


def test_names_of_ours_pass_and_others_of_timm_are_registered():
    for name in ('sd_resnet50', 'sd_resnet20_cifar.fmnist', 'sd_vit_tiny_patch16_224', 'hf-hub:me/mine'):
        check_name(name)
    check_name('sd_test_convnext3')
    assert timm.is_model('sd_test_convnext3')


def test_a_wrong_name_is_refused_before_weights_are_looked_for(fashion):
    with pytest.raises(ValueError, match='model must be sd_resnet18, with'):
        load('resnet18')
    with pytest.raises(ValueError, match='such as resnet18'):
        evaluate('resnet18x', fashion)


@pytest.mark.parametrize('name', ['test_vit', 'test_resnet', 'swin_tiny_patch4_window7_224'])
def test_what_each_branch_ran_is_told(name):
    """Five images at p 0.6: three rows of each branch, of one that is used twice too; else a record states no share."""
    model, x = build(name)
    convert(model, x, mode='subset')
    told, network = [], network_of(model)
    network.on_forward(told.append)
    for training in (True, True, False):
        model.train(training)(x)
    drops = [3 / 5] * len(network.drop_paths)
    assert told == [pytest.approx(drops), pytest.approx(drops), [1.0] * len(drops)]


def test_blocks_that_change_the_shape_are_known_in_a_converted_network():
    """Cut out, they would leave a network that does not run."""
    model, x = build('resnetv2_18')
    convert(model, x)
    assert network_of(model).fixed == {2, 4, 6}


@pytest.mark.parametrize('kind', ['own', 'converted'])
def test_what_each_pass_ran_is_told(kind):
    if kind == 'own':
        model, x = make('sd_resnet20_cifar', train=True), images(4)
    else:
        model, x = build('test_vit', rate=0.4)
        convert(model, x, mode='batch')
        model.train()
    told = []
    network = network_of(model)
    network.on_forward(told.append)
    for _ in range(8):
        model(x)
    assert [len(shares) for shares in told] == [len(network.drop_paths)] * 8
    assert {share for shares in told for share in shares} == {0.0, 1.0}
    model.eval()(x)
    if kind == 'own':
        assert told[-1] == [1.0] * 9


def test_a_plain_copy_is_timms_and_leaves_the_network_as_it_is():
    model, x = build('test_vit', rate=0.4)
    plain_class = type(model.blocks[0])
    convert(model, x)
    plain = network_of(model).plain_copy()
    assert type(plain.blocks[0]) is plain_class is not type(model.blocks[0])
    assert torch.equal(plain.train()(x), plain.eval()(x))
