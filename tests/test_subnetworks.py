"""Networks cut to size: ordinary networks that compute what is left of the whole one."""

from itertools import pairwise

import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

import sd_resnet
from sd_resnet import cli
from sd_resnet.convert import converted_blocks
from sd_resnet.pruning import error_and_loss, estimate_statistics, forward_flops, load
from sd_resnet.subnetworks import blocks_of

from .conftest import images, make, one_line, write_run
from .test_convert import build, convert


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
            monkeypatch.setattr(block, '_forward_whole', lambda x, factor: x)
    torch.testing.assert_close(small(x), model.eval()(x), rtol=1e-4, atol=1e-4)


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
    assert forward_flops(small, tuple(x.shape[1:])) < forward_flops(model, tuple(x.shape[1:]))
    for index, block in enumerate(converted_blocks(model).values()):
        if index not in keep:
            monkeypatch.setattr(block, 'plain_class', _Passing)
    assert torch.equal(small(x), model(x))
    assert torch.equal(small.train()(x), small.eval()(x))
    if name in ('test_vit', 'test_convnext'):
        assert len(keep) == sum(small._model_args.get('depths', [small._model_args.get('depth')]))
        save_for_hf(small, str(tmp_path), model_args=small._model_args)
        assert torch.equal(timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()(x), small(x))


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
        blocks_of(timm.create_model('test_vit'))


def test_statistics_are_those_of_the_images():
    model = make('sd_resnet20_cifar', drop_path_rate=0)
    x = images(16)
    estimate_statistics(model, [(x[:8], None), (x[8:], None)])
    seen = [model.conv1(part) for part in (x[:8], x[8:])]
    mean = torch.stack([part.mean((0, 2, 3)) for part in seen]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)
    assert model.bn1.momentum == 0.1
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))


@pytest.fixture
def folder(tmp_path):
    """A run, and an image folder that it could have been trained on: two classes told apart by brightness."""
    from PIL import Image

    write_run(tmp_path / 'run', 'sd_resnet20_cifar')
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', 12), ('validation', 4)):
        for label in range(2):
            place = tmp_path / 'images' / split / str(label)
            place.mkdir(parents=True)
            for index in range(count):
                pixels = torch.randint(128, (32, 32, 3), generator=generator) + 127 * label
                Image.fromarray(pixels.to(torch.uint8).numpy()).save(place / f'{index}.png')
    return tmp_path


def test_prune_removes_blocks_until_half_of_the_branches_is_left(folder, capsys):
    import json

    command = ['prune', str(folder / 'run'), '--data', str(folder / 'images'), '--images', '8']
    command += ['--out', str(folder / 'small'), '--json', str(folder / 'p.json'), '--plot', str(folder / 'p.png')]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert '8 held-out training images' in said
    (record,) = json.loads((folder / 'p.json').read_text())
    points = record['points']
    assert [len(point['kept']) for point in points] == [9, 8, 7, 6, 5, 4]
    assert points[-1]['branch_share'] <= 0.5 < points[-2]['branch_share']
    assert all(a['flops'] > b['flops'] for a, b in pairwise(points))
    assert {3, 6} <= set(points[-1]['kept'])
    assert points[0]['test_error'] is not None
    assert (folder / 'p.png').stat().st_size > 10000
    small = timm.create_model(f'local-dir:{folder / "small"}', pretrained=True).eval()
    assert forward_flops(small, (3, 32, 32)) == points[-1]['flops']
    stored = load(str(folder / 'run')).bn1.running_mean
    assert not torch.equal(small.bn1.running_mean, stored)  # estimated anew, on these images


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        (['--share', '1.5'], 'share must be between 0 and 1, got 1.5'),
        (['--share', '0.1'], 'share must be at least 0.'),
        (['--data', 'nowhere'], 'nowhere holds neither'),
        (['--out', '.'], '. exists'),
    ],
)
def test_what_prune_cannot_do_is_one_line(folder, capsys, flags, message):
    assert cli.main(['prune', str(folder / 'run'), '--data', str(folder / 'images'), '--images', '4', *flags]) == 1
    assert message in one_line(capsys)


def test_error_is_the_share_of_wrong_answers():
    class Fixed(nn.Module):
        def forward(self, x):
            return x

    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    error, loss = error_and_loss(Fixed(), [(logits[:2], torch.tensor([0, 0])), (logits[2:], torch.tensor([0]))])
    assert error == pytest.approx(100 / 3)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, torch.zeros(3, dtype=torch.long))))
