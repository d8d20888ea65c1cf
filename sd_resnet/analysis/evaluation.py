"""`sd-resnet evaluate`: the accuracy of a model on a test set, with timm's own data sets, preprocessing and metrics."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.utils import AverageMeter, accuracy
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import CenterCrop, Compose, Grayscale
from tqdm import tqdm

from ..converted.convert import own_input_size
from .datasets import LABELS, NAME, RAW, SIZE
from .networks import check_name

BATCH = 250


@dataclass(frozen=True)
class Accuracy:
    """Of a model on labelled images."""

    top1: float  # percent of the images whose class has the highest score
    top5: float  # percent of the images whose class is among the five highest
    loss: float  # mean cross entropy
    images: int  # their number


def evaluate(model: Any, data: Path, images: int | None = None, progress: bool = False) -> Accuracy:
    """Measure in the model's own precision, with the preprocessing of its pretrained configuration.

    `model` is a network, or a name of timm's (`hf-hub:`, `local-dir:`), whose weights are loaded; for `data` see
    `open_images`, of which the first `images` are taken.
    """
    name = type(model).__name__
    if isinstance(model, str):
        name = model
        _find(data, 'test')  # before weights are downloaded
        check_name(name, own=False)
        model = timm.create_model(name, pretrained=True)
    dataset = open_images(data, 'test', model, name)
    batches = loader(dataset, range(len(dataset))[:images], BATCH)
    return measure(model, tqdm(batches, disable=not progress, unit='batch'))


@torch.no_grad()
def measure(model: Any, images: Iterable[tuple[Any, Any]]) -> Accuracy:
    """The accuracy on batches of images and labels; the model is left in evaluation mode."""
    like = next(model.eval().parameters())
    top1, top5, loss = AverageMeter(), AverageMeter(), AverageMeter()
    for x, y in images:
        y = y.to(like.device)
        logits = model(x.to(like)).float()
        values = (*accuracy(logits, y, topk=(1, 5)), torch.nn.functional.cross_entropy(logits, y))
        for meter, value in zip((top1, top5, loss), values):
            meter.update(value.item(), len(y))
    return Accuracy(round(top1.avg, 6), round(top5.avg, 6), loss.avg, top1.count)


def loader(dataset: Any, part: Sequence[int], size: int) -> DataLoader[Any]:
    """Some of the images, in that order, with their labels."""
    return DataLoader(Subset(dataset, part), batch_size=size)


def open_images(data: Path, split: str, model: Any, name: str) -> Any:
    """A data set with the preprocessing of a model's pretrained configuration, in grey or colour as the model takes it.

    `data` holds Fashion-MNIST, whose padded training images are cut back, or folders `train`, and `validation` or
    `val`, of one folder of images a class. A ValueError says if `model`, called `name`, has another number of classes.
    """
    reader, folder = _find(data, split)
    dataset: Any = create_dataset(reader, root=str(data), split=folder)
    fashion = isinstance(dataset, FashionMNIST)
    classes = len(LABELS if fashion else dataset.reader.class_to_idx)
    if model.num_classes != classes:
        raise ValueError(f'{name} has {model.num_classes} classes, the {split} images in {data} have {classes}')
    config = resolve_model_data_config(model)
    if getattr(model, 'pretrained_cfg', None):
        config['input_size'] = own_input_size(model)  # that it is built for, whatever it was configured for
    grey = config['input_size'][0] == 1
    dataset.transform = create_transform(**config)
    if fashion:
        dataset.transform = Compose([CenterCrop(SIZE), *([] if grey else [Grayscale(3)]), dataset.transform])
    else:
        dataset.input_img_mode = 'L' if grey else 'RGB'
    return dataset


def _find(data: Path, split: str) -> tuple[str, str]:
    """timm's names of the data set and of its split; a FileNotFoundError where there is none."""
    if (data / RAW).is_dir():
        return NAME, split
    folders = ('train',) if split == 'train' else ('validation', 'val')
    if found := next((folder for folder in folders if (data / folder).is_dir()), None):
        return '', found
    named = ' or '.join(f'"{folder}"' for folder in folders)
    raise FileNotFoundError(f'{data} holds neither {RAW} nor a folder {named} of images')
