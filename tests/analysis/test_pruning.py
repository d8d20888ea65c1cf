"""`sd-resnet prune`: who lets it choose must get what was measured, as a folder that timm loads."""

import argparse
import json
import types
from itertools import pairwise

import pytest
import timm
import torch
import yaml
from PIL import Image
from torch import nn

import sd_resnet
from sd_resnet.analysis import datasets, pruning
from sd_resnet.analysis.costs import count_flops
from sd_resnet.analysis.evaluation import measure, open_images
from sd_resnet.analysis.networks import network_of
from sd_resnet.analysis.pruning import check_savable, load, prune, save, update_bn
from sd_resnet.cli import main as cli
from sd_resnet.converted.convert import converted_blocks

from ..conftest import fresh_python, images, make, one_line, write_run
from ..converted.test_convert import build, convert
from ..converted.test_converted_models import VIT


def test_statistics_are_those_of_the_images():
    model = make('sd_resnet20_cifar', drop_path_rate=0)
    x = images(16)
    update_bn([(x[:8], None), (x[8:], None)], model)
    seen = [model.conv1(part) for part in (x[:8], x[8:])]
    mean = torch.stack([part.mean((0, 2, 3)) for part in seen]).mean(0)
    torch.testing.assert_close(model.bn1.running_mean, mean, rtol=1e-4, atol=1e-5)
    assert model.bn1.momentum == 0.1
    assert not any(module.training for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def write_images(folder, train=24, test=8, classes=2, size=32, mode='RGB'):
    """An image folder: classes told apart by brightness."""
    generator = torch.Generator().manual_seed(0)
    for split, count in (('train', train), ('validation', test)):
        for index in range(count):
            label = index % classes
            place = folder / split / str(label)
            place.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(128, (size, size, 3), generator=generator) + 127 * label // max(classes - 1, 1)
            Image.fromarray(pixels.to(torch.uint8).numpy()).convert(mode).save(place / f'{index}.png')
    return folder


@pytest.fixture
def folder(tmp_path):
    """A run, and an image folder that it could have been trained on."""
    write_run(tmp_path / 'run', 'sd_resnet20_cifar')
    write_images(tmp_path / 'images', 30, 10, 10)
    return tmp_path


def test_prune_removes_blocks_until_half_of_the_branches_is_left(folder, capsys):
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
    assert count_flops(small, (3, 32, 32))[''] == points[-1]['flops']
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
        def __init__(self):
            super().__init__()
            self.of_a_type = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x

    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0]])
    found = measure(Fixed(), [(logits[:2], torch.tensor([0, 0])), (logits[2:], torch.tensor([0]))])
    assert 100 - found.top1 == pytest.approx(100 / 3)
    assert found.loss == pytest.approx(float(nn.functional.cross_entropy(logits, torch.zeros(3, dtype=torch.long))))


@pytest.mark.parametrize('name', ['swin_tiny_patch4_window7_224', 'resnetv2_18', 'tf_efficientnetv2_b0'])
def test_what_timm_cannot_build_smaller_is_refused_before_the_search(name, tmp_path, monkeypatch, capsys):
    """Else the search would end in a folder that does not load, or not as what was measured."""
    model, x = build(name)
    convert(model, x)
    with pytest.raises(ValueError, match='cannot be written'):
        save(sd_resnet.subnetwork(model, keep=sorted({0, *network_of(model).fixed})), tmp_path / 'out')
    monkeypatch.setattr(pruning, 'load', lambda source: model)
    monkeypatch.delattr(pruning, 'prune')
    assert cli.main(['prune', 'it', '--data', 'nowhere', '--out', str(tmp_path / 'out')]) == 1
    assert 'cannot be written: timm builds none' in one_line(capsys)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('name', ['sd_resnet50', 'sd_resnet20_cifar', 'test_vit', 'test_convnext'])
def test_what_timm_can_build_smaller_is_not(name):
    if name.startswith('sd_'):
        model = make(name)
    else:
        model, x = build(name)
        convert(model, x)
    check_savable(model)


def test_a_network_with_a_head_of_its_own_is_not_written(tmp_path):
    """timm would build its own head."""
    model, x = build('test_vit')
    convert(model, x)
    model.head = nn.Sequential(nn.Dropout(0.1), model.head)
    with pytest.raises(ValueError, match='cannot be written'):
        save(sd_resnet.subnetwork(model, depth=2), tmp_path / 'out')


def test_a_pruned_resnet50_needs_no_plugin(tmp_path):
    write_run(tmp_path / 'run', 'sd_resnet50')
    write_images(tmp_path / 'images', 10, 10, 10)
    command = ['prune', str(tmp_path / 'run'), '--data', str(tmp_path / 'images'), '--images', '4', '--share', '0.99']
    assert cli.main([*command, '--out', str(tmp_path / 'small')]) == 0
    small = timm.create_model(f'local-dir:{tmp_path / "small"}', pretrained=True).eval()
    assert sum(len(getattr(small, f'layer{stage}')) for stage in range(1, 5)) < 16
    code = """
import sys, timm, torch
model = timm.create_model(f'local-dir:{sys.argv[1]}', pretrained=True).eval()
assert 'sd_resnet' not in sys.modules
print(model(torch.ones(1, 3, 32, 32))[0].tolist())
"""
    elsewhere = fresh_python(code, tmp_path / 'small', SD_RESNET_AUTOLOAD='0')
    assert json.loads(elsewhere) == pytest.approx(small(torch.ones(1, 3, 32, 32))[0].tolist(), rel=1e-4)


@pytest.fixture
def vit_run(tmp_path):
    """A run of a converted network, of one channel and with a ramp."""
    run, kwargs = tmp_path / 'vit', {k: v for k, v in VIT.items() if k != 'num_classes'}
    run.mkdir()
    model_kwargs = {**kwargs, 'drop_path_ramp': ['late', 3]}
    model = timm.create_model('sd_vit_tiny_patch16_224', in_chans=1, num_classes=2, **model_kwargs)
    args = dict(model='sd_vit_tiny_patch16_224', num_classes=2, input_size=[1, 32, 32], mean=[0.4], std=[0.2])
    args |= dict(drop_path=0.2, model_kwargs=model_kwargs)
    (run / 'args.yaml').write_text(yaml.safe_dump(args))
    checkpoint = dict(state_dict=model.state_dict(), arch=args['model'], epoch=0, args=argparse.Namespace(**args))
    torch.save(checkpoint, run / 'last.pth.tar')
    return run, model.eval()


def test_a_run_of_a_converted_network_is_pruned_and_not_pushed(vit_run, tmp_path, capsys):
    run, trained = vit_run
    write_images(tmp_path / 'images')
    model, x = load(str(run)), torch.randn(2, 1, 32, 32)
    assert torch.equal(model(x), trained(x))
    assert [block.block_drop_path.drop_prob for block in converted_blocks(model).values()] == pytest.approx(
        [0, 0.1, 0.2]
    )
    command = ['prune', str(run), '--data', str(tmp_path / 'images'), '--images', '4', '--share', '0.7']
    assert cli.main([*command, '--out', str(tmp_path / 'small')]) == 0
    small = timm.create_model(f'local-dir:{tmp_path / "small"}', pretrained=True)
    assert type(small) is type(timm.create_model('test_vit'))
    assert len(small.blocks) == 2
    assert small(x).shape == (2, 2)
    capsys.readouterr()
    assert cli.main(['push', str(run), '--repo-id', 'me/mine', '--dry-run', str(tmp_path / 'dry')]) == 1
    assert "sd_vit_tiny_patch16_224 is timm's network" in one_line(capsys)


def test_the_folder_is_written_before_what_may_fail(folder, capsys):
    command = ['prune', str(folder / 'run'), '--data', str(folder / 'images'), '--images', '4', '--share', '0.9']
    assert cli.main([*command, '--out', str(folder / 'small'), '--json', '/dev/full']) == 1
    assert 'No space left' in one_line(capsys)
    assert (folder / 'small' / 'model.safetensors').is_file()


def test_the_last_batch_of_statistics_is_as_large_as_the_others(tmp_path, monkeypatch):
    """A smaller one would count as much; a single image would not do for a map of one pixel."""
    model = make('sd_resnet20_cifar', num_classes=2)
    dataset = open_images(write_images(tmp_path), 'train', model, 'it')
    monkeypatch.setattr(pruning, 'BATCH', 5)
    monkeypatch.setattr(pruning, 'STATISTICS_IMAGES', 16)
    held_out, statistics = pruning._training_images(model, dataset, 7)
    assert [len(y) for _, y in held_out] == [5, 2]
    assert [len(y) for _, y in statistics] == [5, 5, 5]
    monkeypatch.setattr(pruning, 'STATISTICS_IMAGES', 3)
    assert [len(y) for _, y in pruning._training_images(model, dataset, 7)[1]] == [3]


@pytest.mark.parametrize('classes', [3, 1000])
def test_a_model_of_other_classes_is_refused(classes, tmp_path):
    """Every answer of a model of 1000 classes would be wrong on images of two."""
    write_images(tmp_path)
    with pytest.raises(ValueError, match=rf'net has {classes} classes, the train images in .* have 2'):
        prune(make('sd_resnet20_cifar', num_classes=classes), 'net', tmp_path, progress=False)


def test_missing_test_images_are_missed_before_the_search(tmp_path, monkeypatch):
    write_images(tmp_path, test=0)
    monkeypatch.delattr(pruning, 'subnetwork')
    with pytest.raises(FileNotFoundError, match='"validation" or "val"'):
        prune(make('sd_resnet20_cifar', num_classes=2), 'net', tmp_path, progress=False)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('data', ['folder', 'fashion'])
def test_images_are_grey_or_coloured_as_the_model_takes_them(channels, data, tmp_path, fashion, monkeypatch):
    monkeypatch.setattr(pruning, 'STATISTICS_IMAGES', 5)
    classes = 2 if data == 'folder' else 10
    overlay = dict(input_size=(channels, 28, 28), mean=(0.5,) * channels, std=(0.5,) * channels)
    model = make('sd_resnet20_cifar', in_chans=channels, num_classes=classes, pretrained_cfg_overlay=overlay)
    record, _ = prune(model, 'it', write_images(tmp_path) if data == 'folder' else fashion, 0.95, 5, progress=False)
    assert len(record.points) > 1


def test_padded_training_images_are_those_that_were_padded(fashion):
    """`sd-resnet data --pad` enlarges training images only; scaled down, they would choose other blocks."""
    overlay = dict(input_size=(1, 28, 28), mean=(0.5,), std=(0.5,))
    model = make('sd_resnet20_cifar', in_chans=1, pretrained_cfg_overlay=overlay)
    padded = datasets.write_fashion_mnist(fashion.parent / 'padded', pad=4, source=fashion)
    plain, cut = (
        pruning._training_images(model, open_images(data, 'train', model, 'it'), 7) for data in (fashion, padded)
    )
    for part, other in zip(plain, cut):
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(part, other))


def test_a_network_built_for_another_size_and_type_is_pruned_at_its_own(tmp_path):
    """The configuration says 224 pixels."""
    model = timm.create_model('sd_vit_tiny_patch16_224', **{**VIT, 'num_classes': 2}).bfloat16()
    record, networks = prune(model, 'it', write_images(tmp_path), 0.7, 5, progress=False)
    assert [len(point.kept) for point in record.points] == [3, 2]
    pruning.measure_latency(record.points, networks)
    assert record.points[0].flops == count_flops(model.float(), (3, 32, 32))['']


def test_the_block_whose_absence_costs_least_is_removed_and_of_equals_the_one_of_lower_loss(tmp_path, monkeypatch):
    error = {5: 1.0, 1: 2.0, 7: 2.0, 0: 3.0, 2: 4.0, 4: 5.0, 8: 6.0}  # of each block's absence; 3 and 6 are fixed
    loss = {**error, 7: 1.5}
    real = pruning.subnetwork

    def remembering(model, keep):
        network = real(model, keep=keep)
        network.absent = set(range(9)) - set(keep)
        return network

    monkeypatch.setattr(pruning, 'subnetwork', remembering)
    monkeypatch.setattr(
        pruning,
        'measure',
        lambda network, images: types.SimpleNamespace(
            top1=100 - sum(map(error.get, network.absent)), loss=sum(map(loss.get, network.absent))
        ),
    )
    monkeypatch.setattr(
        pruning, 'evaluate', lambda network, data: types.SimpleNamespace(top1=100 - len(network.absent))
    )
    record, _ = prune(make('sd_resnet20_cifar', num_classes=2), 'net', write_images(tmp_path), progress=False)
    assert [point.removed for point in record.points] == ['', *(record.blocks[index] for index in (5, 7, 1, 0, 2))]
    assert [point.test_error for point in record.points] == [0, None, None, None, None, 5]


def test_no_image_chooses_a_block_and_estimates_statistics(tmp_path, monkeypatch):
    model = make('sd_resnet20_cifar', num_classes=2)
    dataset = open_images(write_images(tmp_path), 'train', model, 'it')
    monkeypatch.setattr(pruning, 'loader', lambda dataset, part, size: [(torch.tensor(part), None)])
    held_out, statistics = (images.tolist() for ((images, _),) in pruning._training_images(model, dataset, 7))
    assert (len(held_out), len(statistics)) == (7, 17)
    assert sorted(held_out + statistics) == list(range(24))


def test_long_names_of_blocks_do_not_run_into_other_columns():
    point = pruning.Point([0], 'layers.1.blocks.10', 1, 1.0, 0.0, 0.0)
    (line,) = (
        x
        for x in pruning.table([pruning.Pruning('m', ['layers.1.blocks.10'], 5, [point])]).splitlines()
        if 'layers' in x
    )
    assert line.split()[:2] == ['1', 'layers.1.blocks.10']
