"""Does a recipe reach timm's accuracy with subset or batch mode, and in how much less time? Cells, and their records.

Everything here was fixed before any test error was seen. Three small networks that timm builds, on the first images of
each class of Fashion-MNIST: few images, many epochs, for drop path helps where a network overfits. Each is trained

- `none`: without dropping;
- `timm`: with timm's drop path. Of the CIFAR net, which timm does not have, that is row mode: timm's own mask;
- `subset` and `batch`: in these modes, at the same rates in the same blocks: timm's rule, l-1 over L-1;
- `decay`: in subset mode at twice the rate, which falls in a line to 0, so that its mean is the same; at 0.9 at most,
  so that in place of 0.6 it is 0.45.

The rate is that of `RATES` at which timm's drop path errs least on `held_out` further training images, mean over the
search's cells, the lower one of equals. Then every arm trains with it and is tested once, on the 10,000 test images,
after the last epoch. No two cells share a seed, so that their errors are independent. Time is measured apart, in one
`time` cell of each network: machines differ, and so do their hours, so there the arms take turns, step by step.

Added after errors were seen: the fifth and sixth seed of all arms but `decay`, when ViT and ConvNeXt had four seeds and
the CIFAR net two, whatever they would show; and the `time` cells, when the same cell had taken half the time elsewhere.

The recipe: AdamW with weight decay 0.05 (ViT, ConvNeXt), or SGD with Nesterov's momentum and 5e-4 (CIFAR net), none of
it on biases and norms; batch 64; the learning rate goes up in a line over the first twentieth of all steps, then down
to 0 in a cosine; pad by 2 pixels, crop at a random place, flip. No mixup. timm's model, optimiser and learning rate, in
a loop of our own over images in memory: at this size timm's script would spend most of the time on its loader. The
ViT's weights start as its authors' did (`weight_init='jax'`). Seen before anything was fixed, on held-out images
without dropping: how fast the losses of ViT and ConvNeXt fall, and that ConvNeXt overfits.
"""

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from .cells import read_record

ARMS = ('none', 'timm', 'subset', 'batch', 'decay')
SEARCH = 'search'  # for the rate, with timm's drop path
TIME = 'time'  # of all arms
RATES = (0.2, 0.4, 0.6)  # of the last block; on average over the blocks half of it
SEARCHES = 1  # cells for each rate and network
REPEATS = {'none': 6, 'timm': 6, 'subset': 6, 'batch': 6, 'decay': 4}  # cells for each network


@dataclass(frozen=True)
class Network:
    """What is trained, and how."""

    title: str
    model: str  # timm's name; `sd_` before it is its counterpart here
    kwargs: Mapping[str, Any]
    optimizer: Mapping[str, Any]  # timm's arguments
    bfloat16: bool = False  # autocast and channels_last, where that is faster on a CPU


ADAMW = {'opt': 'adamw', 'lr': 1e-3, 'weight_decay': 0.05}
SGD = {'opt': 'sgd', 'lr': 0.1, 'momentum': 0.9, 'weight_decay': 5e-4}  # Nesterov's, in timm
NETWORKS = {
    'vit': Network(
        'ViT, 8 blocks of width 64, patch 4',
        'vit_tiny_patch16_224',
        {'img_size': 28, 'patch_size': 4, 'embed_dim': 64, 'depth': 8, 'num_heads': 2, 'weight_init': 'jax'},
        ADAMW,
    ),
    'convnext': Network(  # timm's have four stages: the last two at 3 pixels; kernels of 3, for maps of 14, 7 and 3
        'ConvNeXt, 2, 2, 4, 2 blocks',
        'convnext_atto',
        {'patch_size': 2, 'output_stride': 8, 'depths': (2, 2, 4, 2), 'dims': (24, 48, 96, 96), 'kernel_sizes': 3},
        ADAMW,
    ),
    'resnet': Network('ResNet-32 (CIFAR)', 'sd_resnet32_cifar', {}, SGD, bfloat16=True),
}


@dataclass(frozen=True)
class Scale:
    """What all cells share."""

    images: int = 2000  # for training, as many of each class
    held_out: int = 10_000  # further training images, for the choice of the rate
    batch: int = 64  # the last, incomplete batch of an epoch is dropped
    epochs: Mapping[str, int] = field(
        default_factory=lambda: {'vit': 60, 'convnext': 100, 'resnet': 60}
    )  # of like time


@dataclass(frozen=True)
class Cell:
    """One training run."""

    network: str
    arm: str
    repeat: int
    rate: float | None = None  # of the search; None is the rate that it found, or 0 without dropping

    @property
    def name(self) -> str:
        """Of its record."""
        return '-'.join(map(str, (self.network, self.arm, *([] if self.rate is None else [self.rate]), self.repeat)))

    @property
    def recipe(self) -> dict[str, Any]:
        """Its network's, as a record holds it: one of another recipe is no record of this cell."""
        return json.loads(json.dumps(asdict(NETWORKS[self.network])))

    @property
    def seed(self) -> int:
        """Of weights, order, augmentation and draws: another one in each cell."""
        return zlib.crc32(self.name.encode())


CELLS = (  # in this order, so that at any time all networks and arms have as many records
    *(Cell(network, SEARCH, repeat, rate) for repeat in range(SEARCHES) for rate in RATES for network in NETWORKS),
    *(
        Cell(network, arm, repeat)
        for repeat in range(max(REPEATS.values()))
        for arm in ARMS
        if repeat < REPEATS[arm]
        for network in NETWORKS
    ),
    *(Cell(network, TIME, 0) for network in NETWORKS),
)


class Parity:
    """The records found in a folder, by their cells' names; a damaged one, or of something else, is a ValueError."""

    def __init__(self, folder: Path, scale: Scale | None = None) -> None:
        self.folder, self.scale = folder, scale or Scale()
        paths = {cell: folder / f'{cell.name}.json' for cell in CELLS}
        self.found = {cell.name: self._read(cell, path) for cell, path in paths.items() if path.is_file()}
        self.missing = [cell.name for cell in CELLS if cell.name not in self.found]
        for cell, path in paths.items():
            rate, record = self.rate(cell), self.found.get(cell.name)
            if record and rate not in (None, record['rate_used']):
                raise ValueError(
                    f'{path} must be of rate {rate}, which the search found; remove it to run that cell again'
                )

    def _read(self, cell: Cell, path: Path) -> dict[str, Any]:
        expected = asdict(cell) | {'recipe': cell.recipe, 'seed': cell.seed}
        entries = {'cpu_seconds'} if cell.arm == TIME else {'error', 'saved_bytes', 'epochs'}
        return read_record(path, expected, {'rate_used'} | entries, asdict(self.scale))

    def of(self, network: str, arm: str) -> list[dict[str, Any]]:
        """By seed."""
        return [r for r in self.found.values() if (r['network'], r['arm']) == (network, arm)]

    def searched(self, network: str) -> dict[float, list[float]]:
        """Errors in percent on the held-out images, by rate."""
        errors: dict[float, list[float]] = {}
        for record in self.of(network, SEARCH):
            errors.setdefault(record['rate'], []).append(record['error'])
        return errors

    def best_rate(self, network: str) -> float | None:
        """None where the search is not finished."""
        errors = self.searched(network)
        if any((c.network, c.arm) == (network, SEARCH) and c.name in self.missing for c in CELLS):
            return None
        return min(errors, key=lambda rate: (fmean(errors[rate]), rate))

    def rate(self, cell: Cell) -> float | None:
        """The highest rate, 1 - p_L, at which a cell trains; in a decay its first one, of a race that of timm's."""
        if cell.rate is not None:
            return cell.rate
        if cell.arm == 'none':
            return 0.0
        best = self.best_rate(cell.network)
        return best if best is None or cell.arm != 'decay' else min(2 * best, 0.9)
