"""`sd-resnet evaluate`: the accuracy of a model on a test set, with timm's own data sets, loader and metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, resolve_model_data_config
from timm.utils import AverageMeter, accuracy
from torchvision.transforms import Compose, Grayscale
from tqdm import tqdm

from .datasets import LABELS, NAME, RAW, evaluation_loader


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
    """Measure in float32, with the preprocessing of the model's pretrained configuration.

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
    dataset, classes = _test_set(data)
    if isinstance(model, str):
        model = timm.create_model(model, pretrained=True)
    if model.num_classes != classes:
        raise ValueError(f'{name} has {model.num_classes} classes, the data set in {data} has {classes}')
    model.eval()
    config = resolve_model_data_config(model)
    loader = evaluation_loader(dataset, config, batch_size=250)
    grey = config['input_size'][0] == 1
    if not (data / RAW).is_dir():
        dataset.input_img_mode = 'L' if grey else 'RGB'
    elif not grey:
        dataset.transform = Compose([Grayscale(3), dataset.transform])
    top1, top5, losses = AverageMeter(), AverageMeter(), AverageMeter()
    device = next(model.parameters()).device
    left = min(images or len(dataset), len(dataset))
    with tqdm(total=left, unit='image', disable=not progress) as bar:
        for batch, target in loader:
            batch, target = batch[:left].to(device), target[:left].to(device)
            logits = model(batch).float()
            for meter, value in zip((top1, top5), accuracy(logits, target, topk=(1, min(5, classes)))):
                meter.update(value.item(), len(target))
            losses.update(torch.nn.functional.cross_entropy(logits, target).item(), len(target))
            bar.update(len(target))
            left -= len(target)
            if not left:
                break
    return Accuracy(round(top1.avg, 6), round(top5.avg, 6), losses.avg, int(top1.count))


def _test_set(data: Path) -> tuple[Any, int]:
    """The images and the number of classes."""
    if (data / RAW).is_dir():
        return create_dataset(NAME, root=str(data), split='test'), len(LABELS)
    if not any((data / split).is_dir() for split in ('validation', 'val')):
        raise FileNotFoundError(f'{data} holds neither {RAW} nor a folder "validation" or "val" of images')
    dataset = create_dataset('', root=str(data), split='validation')
    return dataset, len(dataset.reader.class_to_idx)
