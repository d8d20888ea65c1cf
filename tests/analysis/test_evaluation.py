"""Whoever compares a model with its card: the same number as by hand, from timm's own preprocessing."""

import json

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torch.utils.data import Subset

from sd_resnet.analysis import evaluation
from sd_resnet.analysis.datasets import NAME
from sd_resnet.analysis.evaluation import evaluate
from sd_resnet.cli import main as cli

from ..conftest import make, one_line


def grey(**kwargs):
    model = make('sd_resnet20_cifar', in_chans=1, **kwargs)
    cfg = {'input_size': (1, 28, 28), 'mean': (0.286,), 'std': (0.353,)}
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg}
    return model


@torch.no_grad()
def by_hand(model, dataset):
    transform = create_transform(**resolve_data_config({}, model=model))
    images, labels = zip(*((transform(image), label) for image, label in dataset))
    ranked = model.eval()(torch.stack(images)).argsort(descending=True)
    hits = ranked == torch.tensor(labels)[:, None]
    return [100 * hits[:, :k].any(1).double().mean().item() for k in (1, 5)]


def test_the_same_as_by_hand(fashion):
    model = grey().train()
    found = evaluate(model, fashion)
    expected = by_hand(model, create_dataset(NAME, root=str(fashion), split='test'))
    assert [found.top1, found.top5] == pytest.approx(expected, abs=1e-4)
    assert found.images == 100


def test_the_first_images_only(fashion, monkeypatch):
    """Of several batches, the last of which is cut; without a terminal no progress bar counts along."""
    monkeypatch.setattr(evaluation, 'BATCH', 20)
    model = grey()
    found = evaluate(model, fashion, images=30)
    first = Subset(create_dataset(NAME, root=str(fashion), split='test'), range(30))
    assert found.images == 30
    assert [found.top1, found.top5] == pytest.approx(by_hand(model, first), abs=1e-4)
    assert evaluate(model, fashion, images=1000).images == 100


def test_grey_images_for_a_model_of_colour_images(fashion):
    """Three equal channels into a stem of three thirds are one channel into the stem."""
    model, colour = grey(), make('sd_resnet20_cifar')
    state = model.state_dict()
    colour.load_state_dict({**state, 'conv1.weight': state['conv1.weight'].repeat(1, 3, 1, 1) / 3})
    colour.pretrained_cfg = {
        **model.pretrained_cfg,
        'input_size': (3, 28, 28),
        'mean': (0.286,) * 3,
        'std': (0.353,) * 3,
    }
    assert evaluate(colour, fashion).loss == pytest.approx(evaluate(model, fashion).loss, rel=1e-4)


def test_folders_of_images_and_a_checkpoint_by_name(tmp_path, monkeypatch, capsys):
    for label in range(3):
        folder = tmp_path / 'images' / 'validation' / str(label)
        folder.mkdir(parents=True)
        for index in range(4):
            pixels = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
            Image.fromarray(pixels).save(folder / f'{index}.png')
    model = make('sd_resnet20_cifar', num_classes=3)
    timm.models.save_for_hf(
        model, str(tmp_path / 'model'), model_args={'num_classes': 3, 'zero_init_last': False}, safe_serialization=True
    )
    name = f'local-dir:{tmp_path / "model"}'
    assert cli.main(['evaluate', name, '--data', str(tmp_path / 'images'), '--json']) == 0
    found = json.loads(capsys.readouterr().out)
    expected = by_hand(model, create_dataset('', root=str(tmp_path / 'images'), split='validation'))
    assert found['top1'] == pytest.approx(expected[0], abs=1e-4)
    assert (found['images'], found['top5'], found['model']) == (12, 100.0, name)
    assert cli.main(['evaluate', name, '--data', str(tmp_path / 'images')]) == 0
    assert f'error {100 - found["top1"]:.2f} %, 12 images' in capsys.readouterr().out


def test_folders_of_images_for_a_model_of_grey_images(tmp_path):
    for label in range(10):
        folder = tmp_path / 'val' / str(label)
        folder.mkdir(parents=True)
        pixels = torch.randint(256, (28, 28, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / 'one.png')
    model = grey()
    grey_images = create_dataset('', root=str(tmp_path), split='validation', input_img_mode='L')
    assert evaluate(model, tmp_path).top5 == pytest.approx(by_hand(model, grey_images)[1], abs=1e-4)


def test_what_does_not_fit_is_said(fashion, tmp_path, capsys):
    with pytest.raises(ValueError, match='StochasticCifarResNet has 7 classes, the test images in'):
        evaluate(make('sd_resnet20_cifar', num_classes=7), fashion)
    assert cli.main(['evaluate', 'sd_resnet20_cifar', '--data', str(tmp_path)]) == 1
    assert 'holds neither FashionMNIST/raw nor a folder "validation"' in one_line(capsys)
