"""Fashion-MNIST as timm's scripts read it (`--dataset torch/fashion_mnist`), with fewer or zero-padded images.

Xiao, Rasul, Vollgraf, "Fashion-MNIST" (https://arxiv.org/abs/1708.07747): 60,000 + 10,000 grey images of 28 pixels, ten
classes, MIT licence. Of training images padded to 36 pixels timm's `--train-crop-mode rrc --scale 0.605 0.605 --ratio 1
1` cuts exactly 28 x 28 at a random place, without resampling: the paper's augmentation.
"""

import gzip
import hashlib
import tempfile
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

from ..errors import one_line
from ..files import written_whole

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

    `folder` may hold the same files already, but no others. `pad` zero pixels come around each training image, of which
    `images` are kept, of each class as many, the first ones; `source` is a root without either, to read instead.
    """
    if pad < 0:
        raise ValueError(f'pad must be at least 0, got {pad}')
    if images is not None and not (10 <= images <= 60_000 and images % len(LABELS) == 0):
        raise ValueError(f'images must be a multiple of 10 from 10 to 60000, got {images}')
    files = _published(source)
    if images is not None:
        labels = _idx(files[TRAIN_LABELS])
        of_each = [np.flatnonzero(labels == label)[: images // len(LABELS)] for label in range(len(LABELS))]
        for name in (TRAIN_IMAGES, TRAIN_LABELS):
            files[name] = _to_idx(_idx(files[name])[np.sort(np.concatenate(of_each))])
    if pad:
        files[TRAIN_IMAGES] = _to_idx(np.pad(_idx(files[TRAIN_IMAGES]), ((0, 0), (pad, pad), (pad, pad))))

    raw = folder / RAW
    if raw.exists():
        if all((raw / name).is_file() and (raw / name).read_bytes() == content for name, content in files.items()):
            return folder
        raise FileExistsError(f'{raw} holds other images; remove it, or choose another folder')
    with written_whole(raw) as part:
        part.mkdir(parents=True)
        for name, content in files.items():
            (part / name).write_bytes(content)
    return folder


def _published(source: Path | None) -> dict[str, bytes]:
    """The four files, of a folder in torchvision's layout, of the Debian package, or downloaded."""
    if source is None and not DEBIAN.is_dir():
        with tempfile.TemporaryDirectory() as downloaded:
            try:
                FashionMNIST(downloaded, download=True)
            except (OSError, RuntimeError) as error:
                way_out = 'on Debian the package dataset-fashion-mnist holds it'
                raise RuntimeError(f'Fashion-MNIST could not be downloaded ({one_line(error)}); {way_out}') from error
            return _published(Path(downloaded))
    files = {}
    for name, expected in SHA256.items():
        path = DEBIAN / f'{name}.gz' if source is None else source / RAW / name
        try:
            files[name] = gzip.decompress(path.read_bytes()) if source is None else path.read_bytes()
        except (OSError, EOFError) as error:
            raise ValueError(f'{path} is missing or damaged, not a file of Fashion-MNIST: {error}') from error
        if (found := hashlib.sha256(files[name]).hexdigest()) != expected:
            raise ValueError(f'{path}: sha256 is {found}, Fashion-MNIST has {expected}')
    return files


def _idx(content: bytes) -> np.ndarray:
    """IDX: 0, 0, the type (8 is uint8), the number of dimensions, each dimension in four bytes, the values."""
    shape = np.frombuffer(content, '>u4', count=content[3], offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape)


def _to_idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, '>u4').tobytes() + values.tobytes()
