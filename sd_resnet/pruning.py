"""`sd-resnet prune`: which blocks a trained network can do without, and what is gained and lost."""

from __future__ import annotations

import copy
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import create_dataset, create_loader, resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .records import read_run
from .residual_search import copy_without_data
from .subnetworks import Removable, blocks_of, subnetwork

FASHION_MNIST = Path('FashionMNIST') / 'raw'  # torchvision's layout
BATCH = 250
TEST_IMAGES = 10**9  # all
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
        ValueError: The folder's network is not of this package, or damaged.
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
        data: A folder with Fashion-MNIST in torchvision's layout, or with folders `train` and `validation` of images.
        share: Stop as soon as at most this share of the branches' FLOPs is left.
        images: Number of held-out images.
        progress: Show a bar.

    Returns:
        The record, without latencies, and the networks that it is about.

    Raises:
        FileNotFoundError: There is no data set in `data`.
        ValueError: `share` is not in (0, 1), or cannot be reached.
    """
    if not 0 < share < 1:
        raise ValueError(f'share must be between 0 and 1, got {share!r}')
    blocks = blocks_of(model)
    size = _input_size(model)
    branches = _branch_flops(model, blocks, size)
    if sum(branches[index] for index in blocks.fixed) > share * sum(branches):
        least = sum(branches[index] for index in blocks.fixed) / sum(branches)
        raise ValueError(f'share must be at least {least:.3f}, what blocks that change the shape need, got {share!r}')
    held_out, statistics_images = _training_images(model, data, images)

    def measured(kept: set[int], removed: str) -> tuple[Point, Any]:
        network = subnetwork(model, keep=sorted(kept))
        if len(kept) < len(blocks.names):
            estimate_statistics(network, statistics_images)
        error, loss = error_and_loss(network, held_out)
        left = sum(branches[index] for index in kept) / sum(branches)
        return Point(sorted(kept), removed, forward_flops(network, size), left, error, loss), network

    kept = set(range(len(blocks.names)))
    point, network = measured(kept, '')
    record, networks = Pruning(name, list(blocks.names), sum(len(y) for _, y in held_out), [point]), [network]
    with tqdm(disable=not progress, desc=name, unit='network') as bar:
        while record.points[-1].branch_share > share:
            candidates = []
            for index in sorted(kept - blocks.fixed):
                candidates.append(measured(kept - {index}, blocks.names[index]))
                bar.update()
            point, network = min(candidates, key=lambda c: (c[0].held_out_error, c[0].held_out_loss))
            kept = set(point.kept)
            record.points.append(point)
            networks.append(network)
    test = list(_loader(model, _split(data, 'test'), range(TEST_IMAGES)))
    for place in (0, -1):
        record.points[place].test_error = error_and_loss(networks[place], test)[0]
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
    inputs = [torch.randn(1, *_input_size(network)) for network in networks]
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


def save(network: Any, out: Path) -> str:
    """Write a network as a folder that timm loads, and say how.

    Raises:
        FileExistsError: `out` exists.
    """
    if out.exists():
        raise FileExistsError(f'{out} exists; remove it, or choose another folder')
    save_for_hf(network, str(out), model_args=network._model_args, safe_serialization=True)
    plugin = ' with the plugin' if network.pretrained_cfg['architecture'].startswith('sd_') else ', no plugin needed'
    return f"timm.create_model('local-dir:{out}', pretrained=True){plugin}"


def table(records: Sequence[Pruning]) -> str:
    """The table that `sd-resnet prune` prints."""
    lines = []
    for record in records:
        lines += [
            f'{record.model}: {len(record.blocks)} blocks, chosen on {record.images} held-out training images',
            f'{"blocks":>7}{"removed":>16}{"MFLOPs":>10}{"branches":>10}{"ms":>8}{"held out %":>12}{"test %":>8}',
        ]
        lines += [
            f'{len(p.kept):>7}{p.removed:>16}{p.flops / 1e6:>10.1f}{p.branch_share:>10.3f}{p.latency:>8.2f}'
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


def _input_size(model: Any) -> tuple[int, ...]:
    return resolve_model_data_config(model)['input_size']


def _split(data: Path, split: str) -> Any:
    if (data / FASHION_MNIST).is_dir():
        return create_dataset('torch/fashion_mnist', root=str(data), split=split)
    folder = {'train': 'train', 'test': 'validation'}[split]
    if not (data / folder).is_dir():
        raise FileNotFoundError(f'{data} holds neither {FASHION_MNIST} nor a folder "{folder}" of images')
    return create_dataset('', root=str(data), split=folder)


def _training_images(model: Any, data: Path, images: int) -> tuple[Any, Any]:
    """Two disjoint parts of the training images, chosen by a fixed seed: held out, and for BatchNorm's statistics."""
    dataset = _split(data, 'train')
    if len(dataset) < 2:
        raise ValueError(f'{data} holds {len(dataset)} training images, at least 2 are needed')
    count = min(images, len(dataset) // 2)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    held_out, rest = order[:count], order[count:][:STATISTICS_IMAGES]
    return list(_loader(model, copy.copy(dataset), held_out)), list(_loader(model, copy.copy(dataset), rest))


def _loader(model: Any, dataset: Any, part: Sequence[int]) -> Any:
    """Batches with the preprocessing of the model's configuration."""
    loader = create_loader(
        dataset,
        batch_size=BATCH,
        is_training=False,
        use_prefetcher=False,
        num_workers=0,
        persistent_workers=False,
        device=torch.device('cpu'),
        **resolve_model_data_config(model),
    )  # timm gives the data set its transform
    return torch.utils.data.DataLoader(Subset(loader.dataset, part[: len(dataset)]), batch_size=BATCH)
