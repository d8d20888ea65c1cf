"""`sd-resnet prune`: which blocks a trained network can do without, and what is gained and lost."""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..converted.convert import own_input_size
from ..converted.search import copy_without_data
from ..core.private_api import save_config_for_hf
from ..figures import KEPT, OTHER, PROBABILITY, new_figure, save_figure
from .evaluation import evaluate, open_images, prepare
from .runs import read_run
from .subnetworks import Removable, blocks_of, subnetwork

BATCH = 250
STATISTICS_IMAGES = 500
LATENCY_RUNS = 50


@dataclass
class Point:
    """A network on the way from the whole one to the smallest.

    Attributes:
        kept: Blocks that are left, counted from 0.
        removed: Name of the block that was removed last; empty for the whole network.
        flops: Of one forward pass of one image.
        branch_share: Share of the FLOPs of all branches that is left.
        held_out_error: On the held-out training images, in percent.
        held_out_loss: Mean cross entropy on them.
        latency: Median time of one image's forward pass, in milliseconds.
        test_error: On the test set, in percent; of the whole and of the last network only.
    """

    kept: list[int]
    removed: str
    flops: int
    branch_share: float
    held_out_error: float
    held_out_loss: float
    latency: float = 0.0
    test_error: float | None = None


@dataclass
class Pruning:
    """One network, block by block.

    Attributes:
        model: What was pruned.
        blocks: Names of its blocks.
        images: Held-out training images that the choice was made on.
        points: From the whole network on.
    """

    model: str
    blocks: list[str]
    images: int
    points: list[Point] = field(default_factory=list)


def load(source: str) -> Any:
    """A run folder of timm's `train.py`, or timm's name of pretrained weights.

    Raises:
        RuntimeError: There are no such weights.
        ValueError: The folder's network is not of this package nor converted, or damaged.
    """
    if Path(source).is_dir():
        return read_run(Path(source)).model()
    return timm.create_model(source, pretrained=True).eval()


def prune(
    model: nn.Module, name: str, data: Path, share: float = 0.5, images: int = 1000, progress: bool = True
) -> tuple[Pruning, list[Any]]:
    """Remove one block after another, each time the one whose absence costs least on held-out training images.

    The least is the lowest error, of equals the lowest cross entropy. BatchNorm's statistics are estimated anew, on
    other training images, for every network that is looked at.

    Args:
        model: Of this package, or converted, trained on `data`.
        name: Of the network, for the record.
        data: A folder with Fashion-MNIST in torchvision's layout, or one with folders `train`, and `validation` or
            `val`, of images.
        share: Stop as soon as at most this share of the branches' FLOPs is left.
        images: Number of held-out images.
        progress: Show a bar.

    Returns:
        The record, without latencies, and the networks that it is about.

    Raises:
        FileNotFoundError: There is no data set in `data`.
        ValueError: `share` is not in (0, 1), or cannot be reached, or the model has another number of classes.
    """
    if not 0 < share < 1:
        raise ValueError(f'share must be between 0 and 1, got {share!r}')
    blocks = blocks_of(model)
    size = own_input_size(model)
    branches = _branch_flops(model, blocks, size)
    if sum(branches[index] for index in blocks.fixed) > share * sum(branches):
        least = sum(branches[index] for index in blocks.fixed) / sum(branches)
        raise ValueError(f'share must be at least {least:.3f}, what blocks that change the shape need, got {share!r}')
    training_images = _split(model, name, data, 'train')
    _split(model, name, data, 'test')  # whether it is there is said before the search
    held_out, statistics_images = _training_images(model, training_images, images)
    bar = tqdm(disable=not progress, desc=name, unit='network')

    def measured(kept: set[int], removed: str) -> tuple[Point, Any]:
        bar.update()
        network = subnetwork(model, keep=sorted(kept))
        if len(kept) < len(blocks.names):
            estimate_statistics(network, statistics_images)
        error, loss = error_and_loss(network, held_out)
        left = sum(branches[index] for index in kept) / sum(branches)
        return Point(sorted(kept), removed, forward_flops(network, size), left, error, loss), network

    kept = set(range(len(blocks.names)))
    with bar:
        point, network = measured(kept, '')
        record, networks = Pruning(name, list(blocks.names), sum(len(y) for _, y in held_out), [point]), [network]
        while record.points[-1].branch_share > share:
            # one after another: they would not all fit into memory
            candidates = (measured(kept - {index}, blocks.names[index]) for index in sorted(kept - blocks.fixed))
            point, network = min(candidates, key=lambda c: (c[0].held_out_error, c[0].held_out_loss))
            kept = set(point.kept)
            record.points.append(point)
            networks.append(network)
    for place in (0, -1):
        record.points[place].test_error = round(100 - evaluate(networks[place], data).top1, 6)
    return record, networks


@torch.no_grad()
def error_and_loss(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Percent of wrong answers, and mean cross entropy."""
    wrong, loss, count = 0, 0.0, 0
    model.eval()
    for x, y in batches:
        logits = model(x).float()
        wrong += int((logits.argmax(1) != y).sum())
        loss += float(nn.functional.cross_entropy(logits, y, reduction='sum'))
        count += len(y)
    return 100 * wrong / count, loss / count


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """BatchNorm's running statistics anew, as the mean over the batches, in place."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    if not norms:
        return
    momentum = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # torch's way to ask for the plain mean
        norm.train()
    for x, _ in batches:
        model(x)
    for norm, value in zip(norms, momentum):
        norm.momentum = value
        norm.eval()


def forward_flops(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """FLOPs of one image's forward pass; a multiplication and its addition are two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy_without_data(model).eval()(torch.zeros(1, *input_size, device='meta'))
    return counter.get_total_flops()


def measure_latency(points: Sequence[Point], networks: Sequence[nn.Module]) -> None:
    """All networks take turns, so that a noisy machine hits them alike."""
    inputs = [torch.randn(1, *own_input_size(network), dtype=_dtype(network)) for network in networks]
    seconds: list[list[float]] = [[] for _ in points]
    with torch.no_grad():
        for turn in range(LATENCY_RUNS + 3):
            for times, network, x in zip(seconds, networks, inputs):
                start = time.perf_counter()
                network(x)
                if turn >= 3:
                    times.append(time.perf_counter() - start)
    for point, times in zip(points, seconds):
        point.latency = 1000 * statistics.median(times)


def check_savable(model: Any) -> None:
    """Refuse before a search what `save` would refuse after it.

    Args:
        model: Of this package, or converted.

    Raises:
        ValueError: timm cannot build a smaller one of its kind.
    """
    blocks = blocks_of(model)
    kept = set(range(len(blocks.names)))
    _check_rebuilds(subnetwork(model, keep=sorted(kept - {max(kept - blocks.fixed, default=-1)})))


def save(network: Any, out: Path) -> str:
    """Write a network as a folder that timm loads, and say how.

    Raises:
        FileExistsError: `out` exists.
        ValueError: timm cannot build a network of this size.
    """
    if out.exists():
        raise FileExistsError(f'{out} exists; remove it, or choose another folder')
    _check_rebuilds(network)
    save_for_hf(network, str(out), model_args=network._model_args, safe_serialization=True)
    plugin = ' with the plugin' if network.pretrained_cfg['architecture'].startswith('sd_') else ', no plugin needed'
    return f"timm.create_model('local-dir:{out}', pretrained=True){plugin}"


def table(records: Sequence[Pruning]) -> str:
    """The table that `sd-resnet prune` prints."""
    lines = []
    width = max([16, *(len(name) + 2 for record in records for name in record.blocks)])
    for record in records:
        lines += [
            f'{record.model}: {len(record.blocks)} blocks, chosen on {record.images} held-out training images',
            f'{"blocks":>7}{"removed":>{width}}{"MFLOPs":>10}{"branches":>10}{"ms":>8}{"held out %":>12}{"test %":>8}',
        ]
        lines += [
            f'{len(p.kept):>7}{p.removed:>{width}}{p.flops / 1e6:>10.1f}{p.branch_share:>10.3f}{p.latency:>8.2f}'
            f'{p.held_out_error:>12.2f}{"-" if p.test_error is None else format(p.test_error, ".2f"):>8}'
            for p in record.points
        ]
        lines.append('')
    lines.append('branches: share of their FLOPs that is left; ms: median of one image, one forward pass; errors in %')
    return '\n'.join(lines)


def save_record(records: Sequence[Pruning], path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps([asdict(record) for record in records], indent=1) + '\n')


def _branch_flops(model: nn.Module, blocks: Removable, input_size: tuple[int, ...]) -> list[int]:
    """What each block adds to a forward pass, beside its projection."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy_without_data(model).eval()(torch.zeros(1, *input_size, device='meta'))
    root = type(model).__name__
    flops = {name.removeprefix(f'{root}.'): sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return [flops[name] - flops.get(f'{name}.downsample', 0) for name in blocks.names]


def _check_rebuilds(network: Any) -> None:
    """Refuse a network of which timm builds another one, or none, from the configuration that `save` writes."""
    try:
        with tempfile.TemporaryDirectory() as folder, torch.device('meta'):
            save_config_for_hf(network, f'{folder}/config.json', model_args=network._model_args)
            again = timm.create_model(f'local-dir:{folder}')
        same = _shapes(again) == _shapes(network)
    except Exception:  # whatever a constructor raises for arguments that are not its own
        same = False
    if not same:
        raise ValueError(
            f'a {type(network).__name__} of other size cannot be written: timm builds none from a configuration; leave '
            '--out away, or take the network itself from sd_resnet.subnetwork'
        )


def _shapes(network: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in network.state_dict().items()}


def _split(model: Any, name: str, data: Path, split: str) -> Any:
    """The images, and labels that the model can tell apart."""
    dataset, classes = open_images(data, split)
    if model.num_classes != classes:
        raise ValueError(f'{name} has {model.num_classes} classes, the {split} images in {data} have {classes}')
    return dataset


def _training_images(model: Any, dataset: Any, images: int) -> tuple[Any, Any]:
    """Two disjoint parts of the training images, chosen by a fixed seed: held out, and for BatchNorm's statistics."""
    if len(dataset) < 3:
        raise ValueError(f'data must hold at least 3 training images, got {len(dataset)}')
    count = min(images, len(dataset) // 2)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    rest = order[count:][:STATISTICS_IMAGES]
    even = len(rest) // BATCH * BATCH or len(rest)  # a smaller last batch would count as much as the others
    return _batches(model, dataset, order[:count]), _batches(model, dataset, rest[:even])


def _batches(model: Any, dataset: Any, part: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """With the preprocessing of the model's configuration."""
    prepared = prepare(copy.copy(dataset), model, BATCH).dataset
    batches = torch.utils.data.DataLoader(Subset(prepared, part), batch_size=BATCH)
    return [(x.to(_dtype(model)), y) for x, y in batches]


def _dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


def plot_pruning(records: Sequence[Pruning], path: Path) -> None:
    """Draw the error of pruned networks against FLOPs and latency."""
    figure, ((flops, latency),) = new_figure(2, height=4)
    for record, color in zip(records, itertools.cycle((KEPT, OTHER, PROBABILITY))):  # a constant-depth twin is grey
        points = record.points
        tested = [p for p in points if p.test_error is not None]
        for axis, xs, ends in (
            (flops, [p.flops / 1e6 for p in points], [p.flops / 1e6 for p in tested]),
            (latency, [p.latency for p in points], [p.latency for p in tested]),
        ):
            errors = [p.held_out_error for p in points]
            axis.plot(xs, errors, '.-', color=color, label=f'{record.model}, held-out training images')
            axis.plot(ends, [p.test_error for p in tested], 'D', color=color, markersize=5, label='test images')
    flops.set_xlabel('FLOPs of one image (millions)')
    latency.set_xlabel('latency of one image (ms, median)')
    for axis in (flops, latency):
        axis.set_ylabel('error (%)')
        axis.set_ylim(bottom=0)
    figure.legend(*flops.get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    figure.suptitle('Blocks removed one by one, from right to left', fontsize=11)
    save_figure(figure, path)
