"""`sd-resnet prune`: which blocks a trained network can do without, and what is gained and lost."""

import itertools
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from ..converted.convert import own_input_size
from ..figures import KEPT, OTHER, PROBABILITY, new_figure, save_figure
from ..files import written_whole
from .costs import count_flops, model_cost
from .evaluation import BATCH, evaluate, loader, measure, open_images
from .networks import check_name, network_of
from .runs import read_run
from .subnetworks import subnetwork

STATISTICS_IMAGES = 500
LATENCY_RUNS = 50
WARMUP = 3  # runs that are not counted


@dataclass
class Point:
    """A network on the way from the whole one to the smallest."""

    kept: list[int]  # blocks that are left, counted from 0
    removed: str  # the block that was removed last; empty for the whole network
    flops: int  # of one image's forward pass
    branch_share: float  # of the FLOPs of all branches
    held_out_error: float  # on the held-out training images, in percent
    held_out_loss: float  # mean cross entropy on them
    latency: float = 0.0  # of one image's forward pass, the median in milliseconds
    test_error: float | None = None  # in percent; of the whole and of the last network only


@dataclass
class Pruning:
    """One network, block by block."""

    model: str
    blocks: list[str]  # their names
    images: int  # held-out training images that the choice was made on
    points: list[Point]  # from the whole network on


def load(source: str) -> Any:
    """The network of a run folder of timm's `train.py`, or of timm's name of pretrained weights."""
    if Path(source).is_dir():
        return read_run(Path(source)).model()
    check_name(source)
    return timm.create_model(source, pretrained=True).eval()


def prune(
    model: nn.Module, name: str, data: Path, share: float = 0.5, images: int = 1000, progress: bool = True
) -> tuple[Pruning, list[Any]]:
    """Remove one block after another, each time the one whose absence costs least on held-out training images.

    The least is the lowest error, of equals the lowest cross entropy. BatchNorm's statistics are estimated anew, on
    other training images, for every network that is looked at. It ends as soon as at most the `share`, in (0, 1), of
    the branches' FLOPs is left; for `data` see `open_images`.

    Returns:
        The record, without latencies, and the networks that it is about.
    """
    if not 0 < share < 1:
        raise ValueError(f'share must be between 0 and 1, got {share!r}')
    fixed, blocks = network_of(model).fixed, model_cost(model).blocks

    def left(kept: set[int] | frozenset[int]) -> float:
        return sum(blocks[index].branch_flops for index in kept) / sum(block.branch_flops for block in blocks)

    if left(fixed) > share:
        needed = f'{left(fixed):.3f}, what blocks that change the shape need'
        raise ValueError(f'share must be at least {needed}, got {share!r}')
    training_images = open_images(data, 'train', model, name)
    open_images(data, 'test', model, name)  # whether it is there is said before the search
    held_out, statistics_images = _training_images(model, training_images, images)

    def measured(kept: set[int], removed: str) -> tuple[Point, Any]:
        bar.update()
        network = subnetwork(model, keep=sorted(kept))
        if removed:
            update_bn(statistics_images, network)
        found = measure(network, held_out)
        flops = count_flops(network, own_input_size(model))['']
        return Point(sorted(kept), removed, flops, left(kept), round(100 - found.top1, 6), found.loss), network

    with tqdm(disable=not progress, desc=name, unit='network') as bar:
        path = [measured(set(range(len(blocks))), '')]
        while path[-1][0].branch_share > share:
            kept = set(path[-1][0].kept)
            # one after another: they would not all fit into memory
            candidates = (measured(kept - {index}, blocks[index].name) for index in sorted(kept - fixed))
            path.append(min(candidates, key=lambda each: (each[0].held_out_error, each[0].held_out_loss)))
    points, networks = map(list, zip(*path))
    for end in (0, -1):
        points[end].test_error = round(100 - evaluate(networks[end], data).top1, 6)
    return Pruning(name, [block.name for block in blocks], sum(len(y) for _, y in held_out), points), networks


def measure_latency(points: Sequence[Point], networks: Sequence[nn.Module]) -> None:
    """All networks take turns, so that a noisy machine hits them alike."""
    types = [next(network.parameters()).dtype for network in networks]
    calls = [partial(each, torch.randn(1, *own_input_size(each), dtype=dtype)) for each, dtype in zip(networks, types)]
    with torch.no_grad():
        rounds = [[timeit(call, number=1) for call in calls] for _ in range(WARMUP + LATENCY_RUNS)]
    for point, seconds in zip(points, zip(*rounds[WARMUP:])):
        point.latency = 1000 * statistics.median(seconds)


def check_savable(model: Any) -> None:
    """Refuse before a search, with a ValueError, a network of which timm cannot build a smaller one."""
    network = network_of(model)
    blocks = set(range(len(network.drop_paths)))
    smaller = subnetwork(model, keep=sorted(blocks - {max(blocks - network.fixed, default=-1)}))
    with tempfile.TemporaryDirectory() as folder:
        save(smaller, Path(folder) / 'smaller')


def save(network: Any, out: Path) -> str:
    """Write a network as a new folder that timm loads, and say how; a ValueError where timm builds another, or none."""
    if out.exists():
        raise FileExistsError(f'{out} exists; remove it, or choose another folder')
    with written_whole(out) as part:
        try:
            save_for_hf(network, str(part), model_args=network._model_args, safe_serialization=True)
            with torch.device('meta'):
                timm.create_model(f'local-dir:{part}').load_state_dict(network.state_dict(), assign=True)
        except (OSError, SafetensorError):
            raise
        except Exception as error:  # whatever a constructor raises for arguments that are not its own
            raise ValueError(
                f'a {type(network).__name__} of other size cannot be written: timm builds none from a configuration; '
                'leave --out away, or take the network itself from sd_resnet.subnetwork'
            ) from error
    plugin = ' with the plugin' if network.pretrained_cfg['architecture'].startswith('sd_') else ', no plugin needed'
    return f"timm.create_model('local-dir:{out}', pretrained=True){plugin}"


def _training_images(model: Any, dataset: Any, images: int) -> tuple[Any, Any]:
    """Two disjoint parts of the training images, chosen by a fixed seed: held out, and for BatchNorm's statistics."""
    if len(dataset) < 3:
        raise ValueError(f'data must hold at least 3 training images, got {len(dataset)}')
    count = min(images, len(dataset) // 2)
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
    rest = order[count:][:STATISTICS_IMAGES]
    rest = rest[: len(rest) // BATCH * BATCH or len(rest)]  # a smaller last batch would count as much as the others
    like = next(model.parameters())
    held_out, others = ([(x.to(like), y) for x, y in loader(dataset, part, BATCH)] for part in (order[:count], rest))
    return held_out, others


def table(records: Sequence[Pruning]) -> str:
    """The table that `sd-resnet prune` prints."""
    lines = []
    width = max([16, *(len(name) + 2 for record in records for name in record.blocks)])
    for record in records:
        lines += [
            f'{record.model}: {len(record.blocks)} blocks, chosen on {record.images} held-out training images',
            f'{"blocks":>7}{"removed":>{width}}{"MFLOPs":>10}{"branches":>10}{"ms":>8}{"held out %":>12}{"test %":>8}',
        ]
        for p in record.points:
            test = '-' if p.test_error is None else f'{p.test_error:.2f}'
            lines.append(
                f'{len(p.kept):>7}{p.removed:>{width}}{p.flops / 1e6:>10.1f}{p.branch_share:>10.3f}{p.latency:>8.2f}'
                f'{p.held_out_error:>12.2f}{test:>8}'
            )
        lines.append('')
    lines.append('branches: share of their FLOPs that is left; ms: median of one image, one forward pass; errors in %')
    return '\n'.join(lines)


def save_record(records: Sequence[Pruning], path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps([asdict(record) for record in records], indent=1) + '\n')


def plot_pruning(records: Sequence[Pruning], path: Path) -> None:
    """Draw the error of pruned networks against FLOPs and latency."""
    figure, ((flops, latency),) = new_figure(2, height=4)
    for record, color in zip(records, itertools.cycle((KEPT, OTHER, PROBABILITY))):  # one of constant depth is grey
        points, label = record.points, f'{record.model}, held-out training images'
        for axis, costs in ((flops, [p.flops / 1e6 for p in points]), (latency, [p.latency for p in points])):
            axis.plot(costs, [p.held_out_error for p in points], '.-', color=color, label=label)
            axis.plot(costs, [p.test_error for p in points], 'D', color=color, markersize=5, label='test images')
    flops.set(xlabel='FLOPs of one image (millions)', ylabel='error (%)', ylim=(0, None))
    latency.set(xlabel='latency of one image (ms, median)', ylabel='error (%)', ylim=(0, None))
    figure.legend(*flops.get_legend_handles_labels(), loc='outside lower center', ncols=2, fontsize=8, frameon=False)
    figure.suptitle('Blocks removed one by one, from right to left', fontsize=11)
    save_figure(figure, path)
