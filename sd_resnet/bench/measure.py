"""Step times, ratios and memory of stochastic depth beside what else timm's users have, measured side by side.

The contestants take turns, step by step in one process, so that a noisy machine hits them alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth
from tqdm import tqdm

from ..analysis.costs import NetworkCost, drop_paths, network_cost, size_args
from ..converted.blocks import ConvertedBlock
from ..converted.convert import converted_blocks
from ..converted.search import find_slots
from ..core.drop_path import MODES
from ..core.schedules import Schedule
from ..resnets.network import StochasticDepthNet

CONSTANT = 'constant depth'
TIMM = "timm's drop_path_rate"
TORCHVISION = "torchvision's stochastic_depth"
PEERS = ('timm', 'torchvision')
WARMUP = 3  # steps that are not counted
COMPILED_WARMUP = 20  # until nearly every block was seen kept and dropped


@dataclass
class Settings:
    """What is measured; also the record's first part.

    Attributes:
        model: Architecture of this package, or timm's under a `sd_` name.
        batch: Images of a step.
        size: Their height and width in pixels; None is the architecture's own.
        rate: 1 - p_L.
        steps: Counted steps of each contestant.
        precision: `'float32'`, or `'bfloat16'` or `'float16'` for autocast.
        channels_last: Memory format of images and weights.
        compile: Run every contestant through `torch.compile`.
        device: Where to run.
        others: Further timm models to measure.
        modes: Modes of this package to measure.
        peers: `'timm'` and `'torchvision'`, whose drop paths to measure where timm has the net.
        saved_steps: Steps over which the bytes kept for backward are counted.
        seed: Of weights, images and decisions.
        schedule: Of survival probabilities; None is the model's own. `'uniform'` is for other drop paths too.

    Raises:
        ValueError: `precision` or `steps` is not allowed.
    """

    model: str = 'sd_resnet50'
    batch: int = 16
    size: int | None = 128
    rate: float = 0.5
    steps: int = 60
    precision: str = 'float32'
    channels_last: bool = False
    compile: bool = False
    device: str = 'cpu'
    others: tuple[str, ...] = ()
    modes: tuple[str, ...] = MODES
    peers: tuple[str, ...] = PEERS
    saved_steps: int = 200
    seed: int = 0
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        if self.precision not in ('float32', 'bfloat16', 'float16'):
            raise ValueError(f"precision must be 'float32', 'bfloat16' or 'float16', got {self.precision!r}")
        if self.steps < 2:
            raise ValueError(f'steps must be at least 2, to state their spread, got {self.steps!r}')


@dataclass
class Row:
    """One contestant.

    Attributes:
        name: Contestant.
        seconds: Time of each counted step: forward, backward, SGD with momentum.
        saved_bytes: Distinct bytes that steps kept for backward, parameters and buffers excluded.
        bound: Share of the constant-depth net's FLOPs that is left on average, if it drops work.
        observed: Share of FLOPs that the counted steps really ran; it differs from `bound` by the luck of the draw.
    """

    name: str
    seconds: list[float] = field(default_factory=list)
    saved_bytes: list[int] = field(default_factory=list)
    bound: float | None = None
    observed: float | None = None


@dataclass
class Growth:
    """Batch mode at one depth and rate.

    Attributes:
        model: Architecture.
        survival_prob: p_L.
        bound: Share of the constant-depth net's FLOPs that is left on average.
        ratio: Of mean step times to constant depth.
        without_luck: The ratio, less what the draw left out or added.
        seconds: Time of each counted step.
        constant_seconds: The same of constant depth.
    """

    model: str
    survival_prob: float
    bound: float
    ratio: float
    without_luck: float
    seconds: list[float]
    constant_seconds: list[float]


def run(settings: Settings, progress: bool = True) -> list[Row]:
    """Measure all contestants.

    Raises:
        ValueError: An argument is outside what is allowed.
    """
    cost = network_cost(settings.model, settings.size, settings.rate, settings.schedule)
    costs = {f'{settings.model}, {mode}': cost for mode in settings.modes}
    return _measure(settings, _contestants(settings), cost.image_size, costs, progress)


def grow(settings: Settings, models: Sequence[str], rates: Sequence[float], progress: bool = True) -> list[Growth]:
    """Measure batch mode at several rates beside constant depth, model by model.

    Args:
        settings: Of every measurement, but for model and rate.
        models: Architectures of this package.
        rates: 1 - p_L.
        progress: Show a bar.

    Raises:
        ValueError: An argument is outside what is allowed.
    """
    if len(set(rates)) < len(rates):
        raise ValueError(f'rates, 1 - p_L, must be different numbers, got {[round(rate, 6) for rate in rates]}')
    growths = []
    for model in models:
        own = replace(settings, model=model, modes=(), peers=(), saved_steps=0)
        costs = {f'p_L = {1 - rate:g}': network_cost(model, settings.size, rate) for rate in rates}
        contestants = {CONSTANT: _contestants(own)[CONSTANT]}
        for name, rate in zip(costs, rates):
            contestants[name] = _contestants(replace(own, rate=rate, modes=('batch',)))[f'{model}, batch']
        constant, *rows = _measure(own, contestants, costs[name].image_size, costs, progress)
        for row, rate in zip(rows, rates):
            assert row.bound is not None
            share = ratio(row, constant, statistics.fmean)
            luck = (row.observed or row.bound) - row.bound
            growths.append(Growth(model, 1 - rate, row.bound, share, share - luck, row.seconds, constant.seconds))
    return growths


def _measure(
    settings: Settings,
    contestants: dict[str, Any],
    image_size: int,
    costs: dict[str, NetworkCost],
    progress: bool,
) -> list[Row]:
    torch.manual_seed(settings.seed)
    channels = next(iter(contestants.values())).default_cfg['input_size'][0]
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    images = torch.randn(settings.batch, channels, image_size, image_size, device=settings.device)
    images = images.to(memory_format=layout)
    labels = torch.randint(10, (settings.batch,), device=settings.device)

    rows, forwards, steps, shares = {}, {}, {}, {}
    for name, model in contestants.items():
        model.to(settings.device, memory_format=layout).train()
        rows[name] = Row(name)
        if cost := costs.get(name):
            mode = next(iter(drop_paths(model).values())).mode
            rows[name].bound = cost.expected_share if mode != 'row' else 1.0
            shares[name] = _record_shares(model, cost, settings.compile)
        forwards[name] = _forward(model, images, labels, settings)
        steps[name] = _step(model, forwards[name])

    warmup = COMPILED_WARMUP if settings.compile else WARMUP
    rounds = settings.steps + warmup
    with tqdm(total=rounds * len(rows), disable=not progress, desc=settings.model, unit='step') as bar:
        for index in range(rounds):
            for name, step in steps.items():
                seconds = _timed(step, settings.device)
                if index >= warmup:
                    rows[name].seconds.append(seconds)
                bar.update()
    for name, recorded in shares.items():
        rows[name].observed = statistics.fmean(recorded[-settings.steps :])
    for name in steps:
        varies = any(each.drops and each.mode != 'row' for each in drop_paths(contestants[name]).values())
        repeats = settings.saved_steps if varies else 1
        rows[name].saved_bytes = [saved_bytes(contestants[name], forwards[name]) for _ in range(repeats)]
    return list(rows.values())


def _contestants(settings: Settings) -> dict[str, Any]:
    def create(name: str, **kwargs: Any) -> Any:
        torch.manual_seed(settings.seed)
        return timm.create_model(name, num_classes=10, **size_args(name, settings.size), **kwargs)

    def peer() -> Any:
        model = create(plain, drop_path_rate=settings.rate)
        if settings.schedule == 'uniform':
            for slot in list(find_slots(model)):
                setattr(model.get_submodule(slot.holder), slot.name, DropPath(settings.rate))
        return model

    contestants = {}
    plain = settings.model.removeprefix('sd_')
    if timm.is_model(plain):
        contestants[CONSTANT] = create(plain)
        if 'timm' in settings.peers:
            contestants[TIMM] = peer()
        if 'torchvision' in settings.peers:
            contestants[TORCHVISION] = peer()
            for slot in [slot for slot in find_slots(contestants[TORCHVISION]) if slot.rate]:
                holder = contestants[TORCHVISION].get_submodule(slot.holder)
                setattr(holder, slot.name, TorchvisionStochasticDepth(slot.rate, 'row'))
    else:  # timm has no such net
        contestants[CONSTANT] = create(settings.model, drop_path_rate=0)
    for mode in settings.modes:
        contestants[f'{settings.model}, {mode}'] = create(
            settings.model, drop_path_rate=settings.rate, drop_path_schedule=settings.schedule, drop_path_mode=mode
        )
    for name in settings.others:
        contestants[name] = create(name)
    return contestants


def _forward(model: nn.Module, images: Tensor, labels: Tensor, settings: Settings) -> Callable[[], Tensor]:
    call: Any = torch.compile(model) if settings.compile else model
    device, low = torch.device(settings.device).type, settings.precision != 'float32'
    dtype = getattr(torch, settings.precision)

    def forward() -> Tensor:
        with torch.autocast(device, dtype=dtype if low else None, enabled=low):
            return nn.functional.cross_entropy(call(images), labels)

    return forward


def _step(model: nn.Module, forward: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def step() -> None:
        optimizer.zero_grad()
        forward().backward()
        optimizer.step()

    return step


def _timed(step: Callable[[], None], device: str) -> float:
    cuda = torch.device(device).type == 'cuda'
    if cuda:
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _record_shares(model: nn.Module, cost: NetworkCost, compiled: bool) -> list[float]:
    """A list that grows by the share of FLOPs that each step runs; else of one, where that is not to be seen."""
    own = list(drop_paths(model).values())
    if own[0].mode == 'row':
        return [1.0]
    if own[0].mode == 'subset' and compiled:  # one graph, which draws for itself
        return [cost.expected_share]

    shares: list[float] = []
    if isinstance(model, StochasticDepthNet):
        draw = model.draw

        def drawn(x: Tensor) -> Any:
            draws = draw(x)
            shares.append(cost.share([1.0] * len(own) if draws is None else [d.share(len(x)) for d in draws]))
            return draws

        model.draw = drawn  # type: ignore[method-assign, assignment]
        return shares

    ran = dict.fromkeys(own, 1.0)
    draws = next(iter(converted_blocks(model).values())).draws
    draw_one = draws.draw

    @torch.compiler.disable
    def drawn_one(block: ConvertedBlock, x: Tensor) -> Any:
        drawn = draw_one(block, x)
        ran[block.block_drop_path] = drawn.share(len(x))
        return drawn

    draws.draw = drawn_one
    model.register_forward_hook(torch.compiler.disable(lambda *args: shares.append(cost.share(list(ran.values())))))
    return shares


def saved_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Distinct bytes, parameters and buffers excluded, that a forward pass keeps for backward."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> None:
        # Held, so that no address is used twice; the storage, because a node that holds its own output is never freed
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda nothing: nothing):
        forward()
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def ratio(row: Row, other: Row, mean: Callable[[list[float]], float]) -> float:
    """Of step times, by a mean or a median."""
    return mean(row.seconds) / mean(other.seconds)
