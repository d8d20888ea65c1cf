"""`sd-resnet evaluate`: the accuracy of a model on a test set, with timm's own data sets, loader and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, resolve_model_data_config
from timm.utils import AverageMeter, accuracy
from torchvision.datasets import FashionMNIST
from torchvision.transforms import CenterCrop, Compose, Grayscale
from tqdm import tqdm

from ..converted.convert import own_input_size
from .datasets import LABELS, NAME, RAW, SIZE, evaluation_loader


@dataclass(frozen=True)
class Accuracy:
    """Of a model on a test set, in percent.

    Attributes:
        top1: Share of the images whose class has the highest score.
        top5: Share of the images whose class is among the five highest.
        loss: Mean cross entropy.
        images: Their number.
    """

    top1: float
    top5: float
    loss: float
    images: int


@torch.no_grad()
def evaluate(model: Any, data: Path, images: int | None = None, progress: bool = False) -> Accuracy:
    """Measure in the model's own precision, with the preprocessing of its pretrained configuration.

    Args:
        model: A name of timm's, `hf-hub:` and `local-dir:` too, whose pretrained weights are loaded, or a model.
        data: A folder with Fashion-MNIST in torchvision's layout, or one with a folder `validation` or `val` that holds
            one folder of images per class.
        images: Only the first ones; None for all.
        progress: Show a progress bar.

    Raises:
        FileNotFoundError: The folder holds neither.
        ValueError: The model has another number of classes than the data set.
    """
    name = model if isinstance(model, str) else type(model).__name__
    dataset, classes = open_images(data, 'test')
    if isinstance(model, str):
        model = timm.create_model(model, pretrained=True)
    if model.num_classes != classes:
        raise ValueError(f'{name} has {model.num_classes} classes, the data set in {data} has {classes}')
    model.eval()
    loader = prepare(dataset, model, batch_size=250)
    top1, top5, losses = AverageMeter(), AverageMeter(), AverageMeter()
    like = next(model.parameters())
    left = min(images or len(dataset), len(dataset))
    with tqdm(total=left, unit='image', disable=not progress) as bar:
        for batch, target in loader:
            batch, target = batch[:left].to(like), target[:left].to(like.device)
            logits = model(batch).float()
            for meter, value in zip((top1, top5), accuracy(logits, target, topk=(1, min(5, classes)))):
                meter.update(value.item(), len(target))
            losses.update(torch.nn.functional.cross_entropy(logits, target).item(), len(target))
            bar.update(len(target))
            left -= len(target)
            if not left:
                break
    return Accuracy(round(top1.avg, 6), round(top5.avg, 6), losses.avg, int(top1.count))


def open_images(data: Path, split: str) -> tuple[Any, int]:
    """A data set and the number of its classes.

    Args:
        data: See `evaluate`; for training images the folder is `train`.
        split: `'train'` or `'test'`.

    Raises:
        FileNotFoundError: The folder holds neither.
    """
    if (data / RAW).is_dir():
        return create_dataset(NAME, root=str(data), split=split), len(LABELS)
    folders = {'train': ('train',), 'test': ('validation', 'val')}[split]
    if not any((data / folder).is_dir() for folder in folders):
        named = ' or '.join(f'"{folder}"' for folder in folders)
        raise FileNotFoundError(f'{data} holds neither {RAW} nor a folder {named} of images')
    dataset = create_dataset('', root=str(data), split=folders[0])
    return dataset, len(dataset.reader.class_to_idx)


def prepare(dataset: Any, model: Any, batch_size: int) -> Any:
    """Give a data set the evaluation's preprocessing, in grey or colour as the model takes it; timm's loader of it.

    Args:
        dataset: Of `open_images`. Training images of Fashion-MNIST that `sd-resnet data --pad` enlarged are cut back.
        model: Whose pretrained configuration says how.
        batch_size: Images of a batch.
    """
    config = resolve_model_data_config(model)
    if getattr(model, 'pretrained_cfg', None):
        config['input_size'] = own_input_size(model)  # that it is built for, whatever it was configured for
    loader = evaluation_loader(dataset, config, batch_size=batch_size)
    grey = config['input_size'][0] == 1
    if isinstance(dataset, FashionMNIST):
        dataset.transform = Compose([CenterCrop(SIZE), *([] if grey else [Grayscale(3)]), dataset.transform])
    else:
        dataset.input_img_mode = 'L' if grey else 'RGB'
    return loader
