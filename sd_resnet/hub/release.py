"""From a training run to `weights/<architecture>.<tag>`, and the index of what is there."""

from itertools import pairwise
from math import sqrt
from pathlib import Path
from statistics import NormalDist
from typing import Any

import yaml
from huggingface_hub import ModelCard

from ..analysis import datasets
from ..analysis.evaluation import Accuracy, evaluate
from ..analysis.runs import Run, read_run
from ..resnets.packaged import WEIGHTS, released_folders
from .card import model_card
from .repository import write_repository
from .verify import CARD, RECORD

TEST_IMAGES = 10_000  # of Fashion-MNIST, on which all that is released was trained and tested
HEAD = f"""# Released weights

Written by `python -m sd_resnet.hub release`. Each folder is laid out like a repository of the Hugging Face Hub. They
come with the package, so `timm.create_model(NAME, pretrained=True)` needs no network.
`sd-resnet evaluate NAME --data DIR` measures the test error again. In brackets is Wilson's 95 % interval for
{TEST_IMAGES:,} test images: it holds the luck of the images, not that of the training, of which there was one of each.

| name | trained on | test error | parameters | FLOPs of one image | weights | sha256 |
| --- | --- | --- | --- | --- | --- | --- |
"""


def release(
    run_folder: Path, tag: str, data: Path, weights: Path, *, checkpoint: str = 'last.pth.tar', **said: str | None
) -> tuple[Path, Accuracy]:
    """Write a run's weights as a folder that is exactly a repository of the Hub, and a pretrained tag of timm.

    The accuracy in the card is measured again, in float32: what `sd-resnet evaluate` gives for the tag. The last
    checkpoint is taken, because the best would be chosen on the test set. What is `said` (`notes`, `hardware`,
    `baseline`) stands in the card instead of what `args.yaml` says.
    """
    if not tag.isidentifier():
        raise ValueError(f'tag must be a name of letters, digits and underscores, got {tag!r}')
    _check_index(weights / CARD)
    run = read_run(run_folder, checkpoint)
    if run.args.get('dataset') != datasets.NAME:
        raise ValueError(f'{run_folder} was trained on {run.args.get("dataset")!r}, not on {datasets.NAME}')
    model: Any = run.model()
    reached = evaluate(model, data)
    run.metrics = {'eval_loss': reached.loss, 'eval_top1': reached.top1, 'eval_top5': reached.top5}
    run.label_names = list(datasets.LABELS)
    run.args |= {key: value for key, value in said.items() if value is not None}
    measured = 'the accuracy was measured again in float32, by sd-resnet evaluate'
    notes = '; '.join(filter(None, [run.args.get('notes'), measured, _resumed(run)]))
    run.args |= {'notes': notes, 'packaged': True}
    name = f'{model.pretrained_cfg["architecture"]}.{tag}'
    folder = write_repository(run, weights / name, name, license='apache-2.0', dataset=datasets.HUB_ID)
    write_index(weights)
    return folder, reached


def _check_index(index: Path) -> None:
    if index.is_file() and not index.read_text(encoding='utf-8').startswith(HEAD.splitlines()[0]):
        raise ValueError(f'{index} is not an index of released weights, and would be overwritten')


def _resumed(run: Run) -> str | None:
    """Where a longer schedule began, the learning rate rises after the warm-up."""
    if not run.args.get('resume'):
        return None
    warm = run.args.get('warmup_epochs') or 0
    later = [pair for pair in pairwise(run.epochs) if pair[1]['epoch'] > warm]
    rises = [str(int(now['epoch'])) for before, now in later if now.get('lr', 0) > before.get('lr', 0)]
    again = f', the learning rate rising again at epoch {" and ".join(rises)}' if rises else ''
    return f'the training went on from a checkpoint (--resume){again}'


def write_index(weights: Path) -> Path:
    """`README.md`: a table of what the folders hold, read from their records and cards; another one is refused."""
    index = weights / CARD
    _check_index(index)
    rows = []
    for folder in released_folders(weights).values():
        record: dict[str, Any] = yaml.safe_load((folder / RECORD).read_text(encoding='utf-8'))
        size, error = (folder / WEIGHTS).stat().st_size / 1e6, 100 - stated_accuracy(folder)
        low, high = (100 * bound for bound in interval(error / 100, TEST_IMAGES))
        rows.append(
            f'| [`{folder.name}`]({folder.name}/{CARD}) | {record["dataset"]} '
            f'| {error:.2f} % ({low:.2f} to {high:.2f}) | {record["parameters"]:,} '
            f'| {record["flops"] / 1e6:,.1f} million, {record["image_size"]} px | {size:.1f} MB '
            f'| `{record["sha256"]}` |\n'
        )
    index.write_text(HEAD + ''.join(rows), encoding='utf-8')
    return index


def interval(share: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` independent cases."""
    z = NormalDist().inv_cdf(0.975)
    middle, half = share + z**2 / (2 * count), z * sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle - half) / (1 + z**2 / count), (middle + half) / (1 + z**2 / count)


def rewrite_cards(weights: Path) -> list[Path]:
    """All cards again, from the records beside them, after a change of the template; and the index."""
    _check_index(weights / CARD)
    folders = released_folders(weights)
    for name, folder in folders.items():
        record, args = (yaml.safe_load((folder / file).read_text('utf-8')) for file in (RECORD, 'args.yaml'))
        card = model_card(record, args, name, (folder / 'summary.csv').is_file())
        (folder / CARD).write_text(str(card), encoding='utf-8')
    return [*(folder / CARD for folder in folders.values()), write_index(weights)]


def stated_accuracy(folder: Path) -> float:
    """The top-1 accuracy in percent that a folder's card states."""
    results = ModelCard.load(folder / CARD).data.eval_results or []
    return next(float(result.metric_value) for result in results if result.metric_type == 'accuracy')
