"""segmentation_models_pytorch: timm's networks as encoders, scripted, traced and exported with their decoders."""

import copy

import pytest
import torch

pytest.importorskip('segmentation_models_pytorch', reason='segmentation_models_pytorch is not installed')

import segmentation_models_pytorch as smp

from .pairs import CLASSES, NETS, RATE, assert_dropped, assert_same_weights, evaluate, images, train

ENCODERS = ['resnet18', 'convnext_atto']
DROPPING = [(name, mode) for name in ENCODERS for mode in ('batch', 'subset')]
SMALL = dict(decoder_channels=(16, 8, 8, 8, 8))


def segmenter(name, decoder='Unet', weights=None, **kwargs):
    torch.manual_seed(0)
    kwargs = {**(SMALL if decoder == 'Unet' else {}), **NETS[name.removeprefix('sd_')], **kwargs}
    model = getattr(smp, decoder)(f'tu-{name}', encoder_weights=None, classes=CLASSES, **kwargs)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def segmenters(name, rate=0.0, decoder='Unet', **kwargs):
    """With timm's encoder, and with ours and the same weights; a decoder's options for both in `kwargs`."""
    options = {k: v for k, v in kwargs.items() if not k.startswith('drop_path')}
    theirs = segmenter(name, decoder, **options)
    with torch.no_grad():  # values as after some training
        for module in theirs.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
    return theirs, segmenter(f'sd_{name}', decoder, theirs.state_dict(), drop_path_rate=rate, **kwargs)


def segmentation(model):
    """Its loss is taken of the whole image."""
    return lambda x: model(x).mean((2, 3))


@pytest.mark.parametrize(('name', 'depth'), [('resnet18', 5), ('resnet18', 3), ('convnext_atto', 5)])
def test_a_segmenter_takes_the_weights_of_one_with_timms_encoder(name, depth):
    theirs, ours = segmenters(name, RATE, encoder_depth=depth, decoder_channels=(16, 8, 8, 8, 8)[:depth])
    assert_same_weights(ours, theirs)
    assert ours.encoder.out_channels == theirs.encoder.out_channels
    for feature, expected in zip(evaluate(ours.encoder), evaluate(theirs.encoder), strict=True):
        assert torch.equal(feature, expected)
    assert torch.equal(evaluate(ours), evaluate(theirs))


def test_a_dilated_encoder_is_timms():
    theirs, ours = segmenters('resnet18', RATE, 'DeepLabV3Plus', encoder_output_stride=16, decoder_channels=8)
    assert_same_weights(ours, theirs)
    assert torch.equal(evaluate(ours), evaluate(theirs))


@pytest.mark.parametrize('name', ENCODERS)
def test_a_segmenter_trains_as_with_timms_encoder(name):
    theirs, ours = segmenters(name)
    assert train(ours, forward=segmentation(ours)) == train(theirs, forward=segmentation(theirs))
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(('name', 'mode'), DROPPING)
def test_a_segmenter_drops_and_what_it_saved_is_timms(tmp_path, name, mode):
    theirs, ours = segmenters(name, RATE, drop_path_mode=mode)
    assert_dropped(train(ours, forward=segmentation(ours)), train(theirs, forward=segmentation(theirs)), ours)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(evaluate(theirs), evaluate(ours))
    ours.save_pretrained(tmp_path)
    again = smp.from_pretrained(tmp_path)
    assert_same_weights(again, ours)
    assert torch.equal(evaluate(again), evaluate(ours))


def scripted(model):
    return torch.jit.script(model)


def traced(model):
    return torch.jit.trace(model, images(2))


def exported(model):
    return torch.export.export(model, (images(2),)).module()


@pytest.mark.parametrize(
    ('name', 'how'), [('resnet18', scripted), ('resnet18', traced), ('resnet18', exported), ('convnext_atto', scripted)]
)
@pytest.mark.filterwarnings('ignore:.torch.jit:')
def test_a_segmenter_is_deployed_as_one_with_timms_encoder(name, how):
    """Scripting reads an encoder's code, lines that never run included."""
    theirs, ours = segmenters(name, RATE)
    with torch.no_grad():
        expected, out = (how(model.eval())(images(2)) for model in (theirs, ours))
    assert torch.equal(out, expected)
    torch.testing.assert_close(out, evaluate(ours))


@pytest.mark.parametrize(('name', 'mode'), DROPPING)
@pytest.mark.filterwarnings('ignore:.torch.jit:')
def test_a_scripted_segmenter_trains_and_drops(name, mode):
    theirs, ours = segmenters(name, RATE, drop_path_mode=mode)
    script = torch.jit.script(ours.train())
    assert_dropped(train(script, forward=segmentation(script)), train(theirs, forward=segmentation(theirs)), script)


@pytest.mark.parametrize('name', ENCODERS)
@pytest.mark.filterwarnings('ignore:.torch.jit:')
def test_scripting_leaves_the_model_as_it_was(name):
    """Whoever scripts a copy between two epochs goes on with the model, which must drop and skip as before.

    Of a copy: torch puts what a module gives it for scripting into the module's parent, for good.
    """
    _, ours = segmenters(name, RATE)
    untouched = copy.deepcopy(ours)
    torch.jit.script(copy.deepcopy(ours))
    assert train(ours, forward=segmentation(ours)) == train(untouched, forward=segmentation(untouched))
    assert [type(module) for module in ours.modules()] == [type(module) for module in untouched.modules()]
