"""Step times and memory of stochastic depth beside timm's drop path: a race for each model, rate, batch and size.

Its contestants take turns, step by step in one process, so that a noisy machine hits them alike.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, product
from timeit import timeit
from types import MethodType
from typing import Any

import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from tqdm import tqdm

from ..analysis.costs import NetworkCost, network_cost, size_args
from ..analysis.networks import network_of
from ..converted.trial import find_slots
from ..core.compiling import with_own_code
from ..core.refusals import MODES
from ..core.schedules import Schedule
from .peers import BLOCKS, COMPOSER, expected_shares, on_forward, peer_networks

CONSTANT_DEPTH = 'constant depth'
TIMM = "timm's drop_path_rate"
UNDROPPED = ', undropped'  # behind a peer's name: its own code at rate 0
WARMUP = 3  # rounds that are not counted
LONG_WARMUP = 20  # of compiled or CUDA steps: until nearly every block was seen kept and dropped, in every shape


@dataclass
class Settings:
    """What is measured: each combination of model, batch, size and rate in a race of its own.

    Raises:
        ValueError: A value is not allowed, or is given twice.
    """

    models: tuple[str, ...] = ('sd_resnet50',)  # architectures of this package, or timm's under `sd_` names
    rates: tuple[float, ...] = (0.5,)  # 1 - p_L
    batches: tuple[int, ...] = (16,)  # images of a step
    sizes: tuple[int | None, ...] = (None,)  # their height and width in pixels; None is the architecture's own
    modes: tuple[str, ...] = ('batch', 'subset')  # of this package
    schedule: Schedule | None = None  # None is the model's own; 'uniform' is for timm's drop path too
    steps: int = 60  # counted ones of each contestant and seed; 0 counts FLOPs only
    seeds: int = 1  # runs, each with draws of its own
    saved_steps: int = 20  # over which the bytes kept for backward are counted; 0 for none
    amp: bool = False  # bfloat16 autocast
    channels_last: bool = False  # memory format of images and weights
    compile: bool = False  # run every contestant through `torch.compile`
    peers: bool = False  # all of `peers.PEERS`, not only timm's drop path
    device: str = 'cpu'  # or 'cuda', 'cuda:1'

    def __post_init__(self) -> None:
        if self.device != 'cpu' and self.device.partition(':')[0] != 'cuda':
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if self.device != 'cpu' and not torch.cuda.is_available():
            raise ValueError(f"device must be 'cpu' where torch finds no CUDA device, got {self.device!r}")
        if not set(self.modes) <= set(MODES):
            raise ValueError(f'modes must be among {", ".join(MODES)}, got {list(self.modes)}')
        for name in ('models', 'rates', 'batches', 'sizes', 'modes'):
            values = list(getattr(self, name))
            if not values or len(set(values)) < len(values):
                raise ValueError(f'{name} must be one or more, each another one, got {values}')
        if not all(0 <= rate < 1 for rate in self.rates):
            raise ValueError(f'rates must be in [0, 1), got {list(self.rates)}')
        if self.steps == 1 or self.steps < 0:
            raise ValueError(f'steps must be at least 2, or 0 to count FLOPs only, got {self.steps!r}')
        if self.seeds < 1:
            raise ValueError(f'seeds must be at least 1, got {self.seeds!r}')


def growth(**given: Any) -> list[list[Settings]]:
    """How the saving grows with depth, batch and size, a list of settings for each; `given` holds for all of them.

    20 steps, where nothing else is given, take a quarter of an hour on two cores. The deepest are not measured.
    """
    given = {'steps': 20, 'saved_steps': 0} | given
    depth: dict[str, Any] = {'batches': (128,)} | given  # the paper's batches, on CIFAR
    nets = tuple(f'sd_resnet{layers}_cifar' for layers in (20, 32, 44, 56, 110))
    deepest = ('sd_resnet152_cifar', 'sd_resnet1202_cifar')
    transformers = tuple(f'sd_vit_{size}_patch16_224' for size in ('tiny', 'small', 'base', 'large'))
    return [
        [Settings(models=nets, **depth), Settings(models=deepest + transformers, **depth | {'steps': 0})],
        [Settings(batches=(1, 2, 4, 8, 16, 32), sizes=(64,), **given)],
        [Settings(batches=(8,), sizes=(64, 96, 128, 160, 224), **given)],
    ]


def beside_peers(**given: Any) -> list[list[Settings]]:
    """This package beside its peers on a ResNet and a transformer, a list of settings for each; `given` holds for both.

    15 steps, where nothing else is given, take some six minutes on two cores. At batch 16 rate 0.375 drops 6 rows:
    DINOv2 drops no more than it says.
    """
    given = {'peers': True, 'rates': (0.375,), 'schedule': 'uniform', 'steps': 15, 'saved_steps': 30} | given
    nets: list[dict[str, Any]] = [
        dict(models=('sd_resnet50',), sizes=(128,)),
        dict(models=('sd_vit_tiny_patch16_224',)),
    ]
    return [[Settings(**net | given)] for net in nets]


@dataclass
class Contestant:
    """What was measured of one contestant of a race."""

    seconds: list[list[float]] = field(default_factory=list)  # of each run's steps: forward, backward, SGD
    peak_bytes: list[int] = field(default_factory=list)  # at most in each run's steps; on CUDA only
    saved_bytes: list[int] = field(default_factory=list)  # that steps kept for backward; see `saved_bytes`
    bound: float | None = None  # share of constant depth's FLOPs that is left on average, if it drops work
    observed: list[float] = field(default_factory=list)  # that each run's steps computed: the luck of the draw

    def ratios(self, other: 'Contestant', mean: Callable[[list[float]], float] = statistics.fmean) -> list[float]:
        """Of step times, by a mean or a median, in each run."""
        return [mean(own) / mean(its) for own, its in zip(self.seconds, other.seconds)]

    def ratio(self, other: 'Contestant', mean: Callable[[list[float]], float] = statistics.fmean) -> float:
        """The mean of `ratios` over runs."""
        return statistics.fmean(self.ratios(other, mean))

    def ratios_without_luck(self, other: 'Contestant') -> list[float]:
        """Of mean step times in each run, less what its draw left out or added; empty where nothing is drawn."""
        if self.bound is None:
            return []
        return [ratio - (ran - self.bound) for ratio, ran in zip(self.ratios(other), self.observed)]


@dataclass
class Race:
    """One model at one rate, 1 - p_L, with one batch of images."""

    model: str
    rate: float
    batch: int
    size: int  # height and width of an image in pixels
    contestants: dict[str, Contestant]  # constant depth, timm or all peers, modes; modes only, if 0 steps

    def undropped(self, name: str) -> Contestant:
        """What a contestant is compared with: a peer's own code that drops nothing, or constant depth, if there is."""
        others = (each for each in (name + UNDROPPED, CONSTANT_DEPTH, name) if each in self.contestants)
        return self.contestants[next(others)]


def run(settings: Settings, progress: bool = True) -> list[Race]:
    """Measure every combination; a ValueError, before anything is measured, where one is not allowed."""
    costs = {}
    for model, size, rate in product(settings.models, settings.sizes, settings.rates):
        cost = costs[model, size, rate] = network_cost(model, size, rate, settings.schedule)
        if rate and cost.expected_share == 1:
            raise ValueError(f'model must have blocks that drop at rate {rate} and this schedule, got {model!r}')
    for model in settings.models if settings.peers else ():
        if not timm.is_model(model.removeprefix('sd_')):
            raise ValueError(f'model must be a network of timm, to be measured beside peers, got {model!r}')
    races = []
    for model, batch, size, rate in product(settings.models, settings.batches, settings.sizes, settings.rates):
        cost = costs[model, size, rate]
        races.append(Race(model, rate, batch, cost.image_size, {}))
        if settings.steps:
            _measure(settings, races[-1], cost, progress)
        for mode in settings.modes:
            contestant = races[-1].contestants.setdefault(mode, Contestant())
            contestant.bound = 1.0 if mode == 'row' else cost.expected_share
    return races


def _measure(settings: Settings, race: Race, cost: NetworkCost, progress: bool) -> None:
    networks = _networks(settings, race)
    torch.manual_seed(0)
    images = torch.randn(race.batch, networks[CONSTANT_DEPTH].default_cfg['input_size'][0], race.size, race.size)
    labels = torch.randint(10, (race.batch,))
    trainings = {name: _Training(network, images, labels, settings) for name, network in networks.items()}
    ran: dict[str, list[list[float]]] = {}  # in each step the share of each block's branch
    for mode in settings.modes:
        if mode == 'batch' or (mode == 'subset' and not settings.compile):  # a graph in subset mode draws for itself
            network_of(networks[mode]).on_forward(ran.setdefault(mode, []).append)
    race.contestants.update({name: Contestant() for name in networks})
    for name in networks.keys() - {CONSTANT_DEPTH, TIMM, *settings.modes}:
        race.contestants[name].bound = cost.share(expected_shares(networks[name], race.batch))
        if not settings.compile:
            on_forward(networks[name], ran.setdefault(name, []).append)

    torch.backends.cudnn.benchmark = True  # as timm's script: convolutions are tried in several ways
    warmup = LONG_WARMUP if settings.compile or settings.device != 'cpu' else WARMUP
    title = f'{race.model}, {race.rate:g}, {race.batch} x {race.size} px'
    with tqdm(total=warmup + settings.seeds * settings.steps, disable=not progress, desc=title, unit='round') as bar:
        _rounds(trainings, warmup, bar)
        for seed in range(settings.seeds):
            torch.manual_seed(seed)
            for shares in ran.values():
                shares.clear()
            for name, steps in _rounds(trainings, settings.steps, bar).items():
                contestant = race.contestants[name]
                contestant.seconds.append([seconds for seconds, _ in steps])
                if settings.device != 'cpu':
                    contestant.peak_bytes.append(max(peak for _, peak in steps))
            for mode, shares in ran.items():
                race.contestants[mode].observed.append(statistics.fmean(map(cost.share, shares)))
    for name, network in networks.items():
        varies = name in {COMPOSER, *settings.modes} - {'row'}  # from step to step
        repeats = settings.saved_steps if varies else min(settings.saved_steps, 1)
        kept = [saved_bytes(network, trainings[name].loss) for _ in range(repeats)]
        race.contestants[name].saved_bytes = kept


def _rounds(trainings: dict[str, '_Training'], steps: int, bar: Any) -> dict[str, list[tuple[float, int]]]:
    """What `measured` says of steps in which all take turns, by name."""
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in trainings}
    for _ in range(steps):
        for name, training in trainings.items():
            found[name].append(training.measured())
        bar.update()
    return found


def _networks(settings: Settings, race: Race) -> dict[str, Any]:
    """The contestants' networks by their names."""

    def create(name: str, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=10, **size_args(name, race.size), **kwargs)

    plain = race.model.removeprefix('sd_')
    if timm.is_model(plain) and settings.peers:
        networks = {CONSTANT_DEPTH: create(plain), **peer_networks(race.model, race.rate, create, settings.schedule)}
        undropped = peer_networks(race.model, 0.0, create)
        networks |= {name + UNDROPPED: network for name, network in undropped.items() if name in BLOCKS}
    elif timm.is_model(plain):
        networks = {CONSTANT_DEPTH: create(plain), TIMM: create(plain, drop_path_rate=race.rate)}
        for slot in list(find_slots(networks[TIMM])):
            if own := race.rate if settings.schedule == 'uniform' else slot.rate:
                setattr(networks[TIMM].get_submodule(slot.holder), slot.name, DropPath(own))
    else:  # timm has no CIFAR nets
        networks = {CONSTANT_DEPTH: create(race.model, drop_path_rate=0)}
    given = {'drop_path_rate': race.rate, 'drop_path_schedule': settings.schedule}
    return networks | {mode: create(race.model, **given, drop_path_mode=mode) for mode in settings.modes}


class _Training:
    """A contestant's network and its training step."""

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, settings: Settings) -> None:
        layout = torch.channels_last if settings.channels_last else torch.contiguous_format
        self.device, self.amp = torch.device(settings.device), settings.amp
        self.network = network.to(self.device, memory_format=layout).train()  # type: ignore[call-overload]
        self.images, self.labels = images.to(self.device, memory_format=layout), labels.to(self.device)
        if settings.compile:  # torch gives up on a frame by its code: not on that of the others of its class, too
            network.forward = MethodType(with_own_code(type(network).forward), network)
        self.call: Any = torch.compile(network) if settings.compile else network
        self.optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)

    def loss(self) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            return nn.functional.cross_entropy(self.call(self.images), self.labels)

    def step(self) -> None:
        """Forward, backward and SGD, to the end of what the device does."""
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()
        if self.device.type == 'cuda':
            torch.cuda.synchronize(self.device)

    def measured(self) -> tuple[float, int]:
        """Seconds of a step, and on CUDA its peak bytes, as they would be without the other contestants."""
        if self.device.type == 'cpu':
            return timeit(self.step, number=1), 0
        torch.cuda.synchronize(self.device)
        others = torch.cuda.memory_allocated(self.device) - self._held_bytes()
        torch.cuda.reset_peak_memory_stats(self.device)
        seconds = timeit(self.step, number=1)
        return seconds, torch.cuda.max_memory_allocated(self.device) - others

    def _held_bytes(self) -> int:
        """That stay between steps: images, weights, gradients, the optimiser's state."""
        weights = list(self.network.parameters())
        state = chain.from_iterable(values.values() for values in self.optimizer.state.values())
        held = (self.images, self.labels, *weights, *self.network.buffers(), *(each.grad for each in weights), *state)
        return sum(each.nbytes for each in held if isinstance(each, Tensor))


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
