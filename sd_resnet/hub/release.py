"""`sd-resnet release`: from a training run to `weights/<architecture>.<tag>`, and the index of what is there."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..analysis import datasets
from ..analysis.evaluation import Accuracy, evaluate
from ..analysis.runs import Run, read_run
from ..resnets.packaged import WEIGHTS, released_folders
from .card import OWNER
from .repository import write_repository
from .verify import CARD, RECORD

INDEX = 'README.md'
TITLE = '# Released weights'
MEASURED = 'the accuracy was measured again in float32, by sd-resnet evaluate'


def release(
    run_folder: Path,
    tag: str,
    data: Path,
    weights: Path,
    *,
    checkpoint: str = 'last.pth.tar',
    user: str = OWNER,
    notes: str | None = None,
    hardware: str | None = None,
    baseline: str | None = None,
) -> tuple[Path, Accuracy]:
    """Write a run's weights as a folder that is exactly a repository of the Hub, and a pretrained tag of timm.

    The accuracy in the card is measured again, in float32: what `sd-resnet evaluate` gives for the tag.

    Args:
        run_folder: Of timm's `train.py`, trained on Fashion-MNIST.
        tag: Of the weights, for example `fmnist`.
        data: Fashion-MNIST, as `sd-resnet data fashion-mnist` writes it.
        weights: The folder of all releases.
        checkpoint: File name in the run folder; the last one, because the best would be chosen on the test set.
        user: Owner of the repository, for the card.
        notes: What the run's arguments do not say, for the card, for example how the images were prepared. Without
            these three the card says what `args.yaml` does.
        hardware: What it was trained on, for the card.
        baseline: What the same recipe reaches otherwise, for the card.

    Raises:
        ValueError: The run was not trained on Fashion-MNIST, `tag` is not a name, or the folder's README.md is not the
            index.
    """
    if not tag.isidentifier():
        raise ValueError(f'tag must be a name of letters, digits and underscores, got {tag!r}')
    _check_index(weights)
    run = read_run(run_folder, checkpoint)
    if run.args.get('dataset') != datasets.NAME:
        raise ValueError(f'{run_folder} was trained on {run.args.get("dataset")!r}, not on {datasets.NAME}')
    reached = evaluate(run.model(), data)
    said = [notes or run.args.get('notes'), MEASURED]
    run.metrics = {'eval_loss': reached.loss, 'eval_top1': reached.top1, 'eval_top5': reached.top5}
    run.label_names = list(datasets.LABELS)
    config: Any = run.model().pretrained_cfg
    if run.args.get('resume'):
        said.append(_resumed(run))
    given = {'hardware': hardware, 'baseline': baseline, 'notes': '; '.join(filter(None, said)), 'packaged': True}
    run.args |= {key: value for key, value in given.items() if value is not None}

    name = f'{config["architecture"]}.{tag}'
    part = weights / f'{name}.new'
    try:
        write_repository(run, part, f'{user}/{name}', license='apache-2.0', dataset=datasets.HUB_ID)
        if (weights / name).exists():
            shutil.rmtree(weights / name)
        part.replace(weights / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    write_index(weights)
    return weights / name, reached


def _check_index(weights: Path) -> None:
    if (weights / INDEX).is_file() and not (weights / INDEX).read_text(encoding='utf-8').startswith(TITLE):
        raise ValueError(f'{weights / INDEX} is not an index of released weights, and would be overwritten')


def _resumed(run: Run) -> str:
    """Where a longer schedule began, the learning rate rises after the warm-up."""
    note = 'the training went on from a checkpoint (--resume)'
    warm = run.args.get('warmup_epochs') or 0
    later = [(before, now) for before, now in pairwise(run.epochs) if now['epoch'] > warm]
    rises = [str(int(now['epoch'])) for before, now in later if now.get('lr', 0) > before.get('lr', 0)]
    return f'{note}, the learning rate rising again at epoch {" and ".join(rises)}' if rises else note


def write_index(weights: Path) -> Path:
    """`README.md`: a table of what the folders hold, read from their records and cards.

    Raises:
        ValueError: There is a README.md that is not the index.
    """
    _check_index(weights)
    lines = [
        TITLE,
        '',
        'Written by `sd-resnet release`. Each folder is exactly a repository of the Hugging Face Hub. They come with',
        'the package, so `timm.create_model(NAME, pretrained=True)` needs no network.',
        '`sd-resnet evaluate NAME --data DIR` measures the test error again.',
        '',
        '| name | trained on | test error | parameters | FLOPs of one image | weights | sha256 |',
        '| --- | --- | --- | --- | --- | --- | --- |',
    ]
    for folder in released_folders(weights).values():
        record: dict[str, Any] = yaml.safe_load((folder / RECORD).read_text(encoding='utf-8'))
        size = (folder / WEIGHTS).stat().st_size / 1e6
        lines.append(
            f'| [`{folder.name}`]({folder.name}/{CARD}) | {record["dataset"]} | {100 - stated_accuracy(folder):.2f} % '
            f'| {record["parameters"]:,} | {record["flops"] / 1e6:,.1f} million, {record["image_size"]} px '
            f'| {size:.1f} MB | `{record["sha256"]}` |'
        )
    index = weights / INDEX
    index.write_text('\n'.join(lines) + '\n', encoding='utf-8')
    return index


def stated_accuracy(folder: Path) -> float:
    """The top-1 accuracy in percent that a folder's card states."""
    results = ModelCard.load(folder / CARD).data.eval_results or []
    return next(float(result.metric_value) for result in results if result.metric_type == 'accuracy')
