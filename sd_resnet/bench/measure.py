"""Step times and memory of stochastic depth beside what else timm's users have: a race for each model and rate.

Its contestants take turns, step by step in one process, so that a noisy machine hits them alike.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from timeit import timeit
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth as TorchvisionStochasticDepth
from tqdm import tqdm

from ..analysis.costs import NetworkCost, network_cost, size_args
from ..analysis.networks import check_name, network_of
from ..converted.trial import find_slots
from ..core.drop_path import StochasticDepth
from ..core.refusals import MODES
from ..core.schedules import Schedule

CONSTANT_DEPTH = 'constant depth'
TIMM, TORCHVISION = "timm's drop_path_rate", "torchvision's stochastic_depth"
PEERS = {'timm': TIMM, 'torchvision': TORCHVISION}
WARMUP = 3  # steps that are not counted
COMPILED_WARMUP = 20  # until nearly every block was seen kept and dropped


@dataclass
class Settings:
    """What is measured; a ValueError where `precision`, `rates` or `steps` is not allowed."""

    models: tuple[str, ...] = ('sd_resnet50',)  # architectures of this package, or timm's under `sd_` names
    rates: tuple[float, ...] = (0.5,)  # 1 - p_L, each in a race of its own
    batch: int = 16  # images of a step
    size: int | None = None  # their height and width in pixels; None is the architecture's own
    steps: int = 60  # counted ones of each contestant
    precision: str = 'float32'  # or 'bfloat16' or 'float16' for autocast
    channels_last: bool = False  # memory format of images and weights
    compile: bool = False  # run every contestant through `torch.compile`
    device: str = 'cpu'
    others: tuple[str, ...] = ()  # further timm models
    modes: tuple[str, ...] = MODES  # of this package
    peers: tuple[str, ...] = tuple(PEERS)  # whose drop paths, where timm has the net
    saved_steps: int = 200  # over which the bytes kept for backward are counted; 0 for none
    schedule: Schedule | None = None  # None is the model's own; 'uniform' is for other drop paths too

    def __post_init__(self) -> None:
        if self.precision not in ('float32', 'bfloat16', 'float16'):
            raise ValueError(f"precision must be 'float32', 'bfloat16' or 'float16', got {self.precision!r}")
        if self.steps < 2:
            raise ValueError(f'steps must be at least 2, to state their spread, got {self.steps!r}')
        if len(set(self.rates)) < len(self.rates) or not all(0 <= rate < 1 for rate in self.rates):
            raise ValueError(f'rates must be different numbers in [0, 1), got {list(self.rates)}')


@dataclass
class Contestant:
    """What was measured of one contestant of a race."""

    seconds: list[float] = field(default_factory=list)  # of each counted step: forward, backward, SGD with momentum
    saved_bytes: list[int] = field(default_factory=list)  # that steps kept for backward; see `saved_bytes`
    bound: float | None = None  # share of constant depth's FLOPs that is left on average, if it drops work
    observed: float | None = None  # that the counted steps really ran; it differs by the luck of the draw

    def ratio(self, other: 'Contestant', mean: Callable[[list[float]], float] = statistics.fmean) -> float:
        """Of step times, by a mean or a median."""
        return mean(self.seconds) / mean(other.seconds)

    def ratio_without_luck(self, other: 'Contestant') -> float | None:
        """Of mean step times, less what the draw left out or added; None where nothing is drawn."""
        if self.bound is None or self.observed is None:
            return None
        return self.ratio(other) - (self.observed - self.bound)


@dataclass
class Race:
    """One model at one rate, 1 - p_L."""

    model: str
    rate: float
    contestants: dict[str, Contestant]  # constant depth, peers, modes, others: by these names


def run(settings: Settings, progress: bool = True) -> list[Race]:
    """Measure every model at every rate; a ValueError, before anything is measured, where one is not allowed."""
    for name in settings.others:
        check_name(name, own=False)
    costs = {}
    for model, rate in product(settings.models, settings.rates):
        cost = costs[model, rate] = network_cost(model, settings.size, rate, settings.schedule)
        if rate and cost.expected_share == 1:
            raise ValueError(f'model must have blocks that drop at rate {rate} and this schedule, got {model!r}')
    return [Race(*key, _race(settings, *key, cost, progress)) for key, cost in costs.items()]


def _race(settings: Settings, model: str, rate: float, cost: NetworkCost, progress: bool) -> dict[str, Contestant]:
    networks = _networks(settings, model, rate)
    torch.manual_seed(0)
    channels = networks[CONSTANT_DEPTH].default_cfg['input_size'][0]
    images = torch.randn(settings.batch, channels, cost.image_size, cost.image_size)
    labels = torch.randint(10, (settings.batch,))
    trainings = {name: _Training(network, images, labels, settings) for name, network in networks.items()}
    contestants = {name: Contestant() for name in networks}
    ran: dict[str, list[list[float]]] = {}  # in each step the share of each block's branch
    for mode in settings.modes:
        if mode == 'batch' or (mode == 'subset' and not settings.compile):  # a graph in subset mode draws for itself
            network_of(networks[mode]).on_forward(ran.setdefault(mode, []).append)

    warmup = COMPILED_WARMUP if settings.compile else WARMUP
    for step in tqdm(range(-warmup, settings.steps), disable=not progress, desc=f'{model}, {rate:g}', unit='round'):
        for name, training in trainings.items():
            seconds = timeit(training.step, number=1)
            if step >= 0:
                contestants[name].seconds.append(seconds)
    for mode in settings.modes:
        bound = contestants[mode].bound = 1.0 if mode == 'row' else cost.expected_share
        seen = [cost.share(shares) for shares in ran.get(mode, [])[-settings.steps :]]
        contestants[mode].observed = statistics.fmean(seen or [bound])
    for name, network in networks.items():
        varies = any(isinstance(m, StochasticDepth) and m.drops and m.mode != 'row' for m in network.modules())
        repeats = settings.saved_steps if varies else min(settings.saved_steps, 1)
        contestants[name].saved_bytes = [saved_bytes(network, trainings[name].loss) for _ in range(repeats)]
    return contestants


def _networks(settings: Settings, model: str, rate: float) -> dict[str, Any]:
    """The contestants' networks by their names."""

    def create(name: str, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=10, **size_args(name, settings.size), **kwargs)

    plain = model.removeprefix('sd_')
    has_plain = timm.is_model(plain)  # of the CIFAR nets there is none
    networks = {CONSTANT_DEPTH: create(plain) if has_plain else create(model, drop_path_rate=0)}
    for peer in settings.peers if has_plain else ():
        network = networks[PEERS[peer]] = create(plain, drop_path_rate=rate)
        for slot in list(find_slots(network)):
            if own := rate if settings.schedule == 'uniform' else slot.rate:
                drop_path = DropPath(own) if peer == 'timm' else TorchvisionStochasticDepth(own, 'row')
                setattr(network.get_submodule(slot.holder), slot.name, drop_path)
    given = {'drop_path_rate': rate, 'drop_path_schedule': settings.schedule}
    networks |= {mode: create(model, **given, drop_path_mode=mode) for mode in settings.modes}
    return networks | {name: create(name) for name in settings.others}


class _Training:
    """A contestant's network and its training step."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, settings: Settings) -> None:
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.device = torch.device(settings.device)
        network.to(self.device, memory_format=layout).train()  # type: ignore[call-overload]
        self.images, self.labels = images.to(self.device, memory_format=layout), labels.to(self.device)
        self.call: Any = torch.compile(network) if settings.compile else network
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
        self.precision = None if settings.precision == 'float32' else getattr(torch, settings.precision)

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, dtype=self.precision, enabled=self.precision is not None):
            return nn.functional.cross_entropy(self.call(self.images), self.labels)

    def step(self) -> None:
        """Forward, backward and SGD, to the end of what the device does."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)


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
