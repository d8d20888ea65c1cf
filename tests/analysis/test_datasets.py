"""Whoever trains on Fashion-MNIST: it is the published one, and padding and choosing images do what they say."""

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
from timm.data import create_dataset, create_transform

from sd_resnet.analysis import datasets
from sd_resnet.cli import main as cli

from ..conftest import one_line


def raw(folder, name=datasets.TRAIN_IMAGES):
    return datasets._idx((folder / datasets.RAW / name).read_bytes())


def test_timm_reads_what_is_written(fashion, tmp_path):
    folder = datasets.write_fashion_mnist(tmp_path / 'out', source=fashion)
    train = create_dataset(datasets.NAME, root=str(folder), split='train')
    test = create_dataset(datasets.NAME, root=str(folder), split='test')
    assert (len(train), len(test)) == (400, 100)
    image, label = train[7]
    assert (np.asarray(image) == raw(fashion)[7]).all()
    assert label == raw(fashion, datasets.TRAIN_LABELS)[7]


def test_fewer_images_are_the_first_of_each_class_in_their_order(fashion, tmp_path):
    folder = datasets.write_fashion_mnist(tmp_path / 'out', images=50, source=fashion)
    labels, before = raw(folder, datasets.TRAIN_LABELS), raw(fashion, datasets.TRAIN_LABELS)
    assert (np.bincount(labels) == 5).all()
    kept = [index for index, label in enumerate(before) if (before[:index] == label).sum() < 5]
    assert (raw(folder) == raw(fashion)[kept]).all()
    assert (labels == before[kept]).all()
    assert (raw(folder, 't10k-images-idx3-ubyte') == raw(fashion, 't10k-images-idx3-ubyte')).all()


def test_timms_crop_of_padded_images_is_a_random_shift_without_resampling(fashion, tmp_path):
    """The recipes' `--scale 0.605 0.605 --ratio 1 1`: each result is one of the 81 windows of 28 x 28, each is met."""
    folder = datasets.write_fashion_mnist(tmp_path / 'out', pad=4, source=fashion)
    dataset = create_dataset(datasets.NAME, root=str(folder), split='train')
    image, _ = dataset[0]
    assert image.size == (36, 36)
    padded = np.asarray(image)
    assert (padded[4:-4, 4:-4] == raw(fashion)[0]).all()
    assert padded.sum() == raw(fashion)[0].sum()
    crop = create_transform(
        (1, 28, 28), is_training=True, scale=(0.605, 0.605), ratio=(1, 1), hflip=0, color_jitter=0, mean=(0,), std=(1,)
    )
    windows = {padded[i : i + 28, j : j + 28].tobytes(): (i, j) for i in range(9) for j in range(9)}
    assert len(windows) == 81
    met = set()
    for _ in range(1500):  # 81 windows: all are met but with a probability of 81 * (80 / 81) ** 1500 < 1e-6
        pixels = (crop(image)[0] * 255).round().byte().numpy()
        assert pixels.shape == (28, 28)
        met.add(windows[pixels.tobytes()])
    assert len(met) == 81


def test_the_debian_package_comes_first(fashion, tmp_path, monkeypatch):
    (tmp_path / 'debian').mkdir()
    for path in (fashion / datasets.RAW).iterdir():
        (tmp_path / 'debian' / f'{path.name}.gz').write_bytes(gzip.compress(path.read_bytes()))
    monkeypatch.setattr(datasets, 'DEBIAN', tmp_path / 'debian')
    monkeypatch.setattr(datasets, 'FashionMNIST', None)  # no download
    folder = datasets.write_fashion_mnist(tmp_path / 'out')
    assert (raw(folder) == raw(fashion)).all()


def test_without_it_torchvision_downloads(fashion, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, 'DEBIAN', tmp_path / 'none')
    monkeypatch.setattr(
        datasets, 'FashionMNIST', lambda root, download: shutil.copytree(fashion, root, dirs_exist_ok=True)
    )
    assert (raw(datasets.write_fashion_mnist(tmp_path / 'out')) == raw(fashion)).all()

    def unreachable(root, download):
        raise RuntimeError('Error downloading train-images-idx3-ubyte.gz')

    monkeypatch.setattr(datasets, 'FashionMNIST', unreachable)
    assert cli.main(['data', 'fashion-mnist', str(tmp_path / 'other')]) == 1
    assert 'the package dataset-fashion-mnist holds it' in one_line(capsys)


def test_other_bytes_are_refused(fashion, tmp_path):
    path = fashion / datasets.RAW / 't10k-labels-idx1-ubyte'
    path.write_bytes(path.read_bytes()[:-1] + b'\x0b')
    with pytest.raises(ValueError, match='t10k-labels-idx1-ubyte: sha256 is'):
        datasets.write_fashion_mnist(tmp_path / 'out', source=fashion)
    assert not (tmp_path / 'out').exists()


def test_a_folder_is_left_as_it_is_or_refused(fashion, tmp_path):
    folder = datasets.write_fashion_mnist(tmp_path / 'out', pad=4, source=fashion)
    before = {path: path.stat().st_mtime_ns for path in (folder / datasets.RAW).iterdir()}
    datasets.write_fashion_mnist(folder, pad=4, source=fashion)
    assert before == {path: path.stat().st_mtime_ns for path in (folder / datasets.RAW).iterdir()}
    with pytest.raises(FileExistsError, match='holds other images'):
        datasets.write_fashion_mnist(folder, source=fashion)


def test_the_command_passes_its_options(monkeypatch, capsys):
    given = []
    monkeypatch.setattr(datasets, 'write_fashion_mnist', lambda *args: given.append(args) or args[0])
    assert cli.main(['data', 'fashion-mnist', 'images', '--pad', '4', '--images', '100']) == 0
    assert given == [(Path('images'), 4, 100)]


@pytest.mark.parametrize('images', [0, 15, 70_000])
def test_images_must_be_as_many_of_each_class(images, fashion, tmp_path):
    with pytest.raises(ValueError, match=f'images must be a multiple of 10 from 10 to 60000, got {images}'):
        datasets.write_fashion_mnist(tmp_path / 'out', images=images, source=fashion)
