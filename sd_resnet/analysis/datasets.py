"""Fashion-MNIST as timm's scripts read it (`--dataset torch/fashion_mnist`), with fewer or zero-padded images.

Xiao, Rasul, Vollgraf, "Fashion-MNIST" (https://arxiv.org/abs/1708.07747): 60,000 + 10,000 grey images of 28 pixels, ten
classes, MIT licence. timm's script has no pad-and-crop augmentation; where the folder holds training images padded to
36 pixels, its `--train-crop-mode rrc --scale 0.605 0.605 --ratio 1 1` cuts exactly 28 x 28 of them at a random place,
without resampling: the paper's augmentation.
"""

from __future__ import annotations

import gzip
import hashlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_loader
from torchvision.datasets import FashionMNIST

from ..errors import one_line

NAME = 'torch/fashion_mnist'  # of timm's `--dataset`
HUB_ID = 'zalando-datasets/fashion_mnist'
SIZE = 28  # pixels
LABELS = ('T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot')
DEBIAN = Path('/usr/share/datasets/fashion-mnist')  # where the package `dataset-fashion-mnist` puts its files
RAW = Path('FashionMNIST') / 'raw'  # torchvision's layout

TRAIN_IMAGES, TRAIN_LABELS = 'train-images-idx3-ubyte', 'train-labels-idx1-ubyte'
SHA256 = {
    TRAIN_IMAGES: 'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
    TRAIN_LABELS: 'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
    't10k-images-idx3-ubyte': '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
    't10k-labels-idx1-ubyte': '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
}


def write_fashion_mnist(folder: Path, pad: int = 0, images: int | None = None, source: Path | None = None) -> Path:
    """Write the four files in torchvision's layout, from the Debian package or else from torchvision's download.

    Args:
        folder: The root that `--data-dir` names. One that holds the same files already is left as it is.
        pad: Zero pixels around each training image; test images stay as they are.
        images: Keep that many training images: of each class the same number, the first ones of the file. None keeps
            all.
        source: A root that was written without `pad` and `images`, to read instead.

    Raises:
        FileExistsError: The folder holds other images.
        RuntimeError: The download failed.
        ValueError: A file is not the published one, or an argument is outside what is allowed.
    """
    if pad < 0:
        raise ValueError(f'pad must be at least 0, got {pad}')
    if images is not None and not (10 <= images <= 60_000 and images % len(LABELS) == 0):
        raise ValueError(f'images must be a multiple of 10 from 10 to 60000, got {images}')
    files = _read(source)
    if images is not None:
        kept = _first_of_each_class(_idx(files[TRAIN_LABELS]), images // len(LABELS))
        for name in (TRAIN_IMAGES, TRAIN_LABELS):
            files[name] = _to_idx(_idx(files[name])[kept])
    if pad:
        files[TRAIN_IMAGES] = _to_idx(np.pad(_idx(files[TRAIN_IMAGES]), ((0, 0), (pad, pad), (pad, pad))))

    raw = folder / RAW
    if raw.exists():
        if all((raw / name).is_file() and (raw / name).read_bytes() == content for name, content in files.items()):
            return folder
        raise FileExistsError(f'{raw} holds other images; remove it, or choose another folder')
    part = raw.with_name('raw.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, content in files.items():
        (part / name).write_bytes(content)
    part.replace(raw)
    return folder


def evaluation_loader(dataset: Any, config: dict[str, Any], batch_size: int) -> Any:
    """timm's loader, in this process, in the data set's order.

    Args:
        dataset: One of timm's or torchvision's; its transform is set to evaluation's.
        config: The preprocessing, of timm's `resolve_model_data_config`.
        batch_size: Images of a batch.
    """
    return create_loader(
        dataset,
        batch_size=batch_size,
        is_training=False,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        device=torch.device('cpu'),
        **config,
    )


def _read(source: Path | None) -> dict[str, bytes]:
    """The published files."""
    if source is not None:
        return _checked(source / RAW, '')
    if DEBIAN.is_dir():
        return _checked(DEBIAN, '.gz')
    with tempfile.TemporaryDirectory() as folder:
        try:
            FashionMNIST(folder, download=True)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f'Fashion-MNIST could not be downloaded ({one_line(error)}); on Debian the package '
                'dataset-fashion-mnist holds it'
            ) from error
        return _checked(Path(folder) / RAW, '')


def _checked(folder: Path, suffix: str) -> dict[str, bytes]:
    files = {}
    for name, expected in SHA256.items():
        path = folder / f'{name}{suffix}'
        if not path.is_file():
            raise ValueError(f'{path} is missing: not a folder of Fashion-MNIST')
        content = path.read_bytes()
        try:
            files[name] = gzip.decompress(content) if suffix else content
        except (OSError, EOFError) as error:
            raise ValueError(f'{path} is damaged: {error}') from error
        if (found := hashlib.sha256(files[name]).hexdigest()) != expected:
            raise ValueError(f'{path}: sha256 is {found}, Fashion-MNIST has {expected}')
    return files


def _first_of_each_class(labels: np.ndarray, count: int) -> np.ndarray:
    return np.sort(np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(len(LABELS))]))


def _idx(content: bytes) -> np.ndarray:
    """IDX: 0, 0, the type (8 is uint8), the number of dimensions, each dimension in four bytes, the values."""
    dimensions = content[3]
    shape = np.frombuffer(content, '>u4', dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def _to_idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, '>u4').tobytes() + values.tobytes()
