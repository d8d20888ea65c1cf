"""What breaks under each peer and each mode of this package: tried out, on small networks.

Nothing here knows an answer: every word of the table comes from a run.
"""

import copy
import datetime
import hashlib
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from math import sqrt
from operator import itemgetter
from pathlib import Path
from typing import Any

import timm
import torch
import torch.distributed as dist
from functorch.compile import aot_module_simplified, make_boxed_func
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..errors import one_line
from .peers import peer_networks
from .private_api import COMPILER_LOG, default_recompile_limit

MODES = ('batch', 'subset')  # of this package
RATE = 0.4  # of every block
# The networks; for the odds a block, the shape of a row of its input, and what is silenced, so that one branch is left
NETWORKS: dict[str, dict[str, Any]] = {
    'sd_vit_tiny_patch16_224': dict(img_size=32, embed_dim=32, depth=4, num_heads=2),
    'sd_resnet26': dict(channels=(8, 8, 16, 16), zero_init_last=False),
}
BLOCKS: dict[str, tuple[str, tuple[int, ...], str | None]] = {
    'sd_vit_tiny_patch16_224': ('blocks.3', (5, 32), 'blocks.3.mlp.fc2'),
    'sd_resnet26': ('layer4.1', (64, 2, 2), None),
}
SIZES = (1, 4, 16)  # of the mini-batches
DRAWS = 500
COMPILED_STEPS, DDP_STEPS = 30, 3
DDP, RANKS, FULLGRAPH, GRAPHS, LIMIT, CHECKPOINTING = 'DDP', 'ranks', 'fullgraph', 'graphs', 'limit', 'checkpoint'
_LEGEND = f"""
DDP: {DDP_STEPS} steps on two ranks without find_unused_parameters; ranks: are their parameters then equal, bit by bit;
fullgraph: {COMPILED_STEPS} steps of torch.compile in one graph; graphs, limit: how many there are, and whether
torch's limit of recompilations was hit; checkpoint: are loss and gradients those without, from the same seed; odds:
does every row survive with p_l but for chance, in batches of that size, else the share that does"""


@dataclass
class Tried:
    """What became of one way to drop."""

    words: dict[str, str] = field(default_factory=dict)  # by the columns of the table
    errors: dict[str, str] = field(default_factory=dict)  # why, where a word is 'fails'
    survived: dict[int, float] = field(default_factory=dict)  # share of the rows, by batch size; 1 - `RATE` is due


def try_all(progress: bool = True) -> dict[str, dict[str, Tried]]:
    """Every trial of every peer and mode, on one thread, by models and names."""
    found: dict[str, dict[str, Tried]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the networks are small
    ddp = _try_ddp(tuple(NETWORKS))
    for model in NETWORKS:
        networks = networks_of(model)
        for name, network in tqdm(networks.items(), disable=not progress, desc=f'what breaks, {model}'):
            tried = found.setdefault(model, {})[name] = Tried()
            _note(tried, (DDP, RANKS), partial(_both_ranks, ddp[model, name]))
            if not _note(tried, (FULLGRAPH, GRAPHS, LIMIT), partial(train_compiled, network, fullgraph=True)):
                _note(tried, (GRAPHS, LIMIT), partial(train_compiled, network, fullgraph=False))
            _note(tried, (CHECKPOINTING,), partial(train_checkpointed, network))
            for size in SIZES:
                share, exact = odds(model, network, size)
                tried.survived[size], tried.words[f'odds, {size}'] = share, 'exact' if exact else f'{share:.3f}'
    torch.set_num_threads(threads)
    return found


def networks_of(model: str) -> dict[str, Any]:
    """The peers' small networks and this package's, by their names."""

    def create(name: str, **kwargs: Any) -> Any:
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=10, **NETWORKS[model], **kwargs).train()

    drop_path = dict(drop_path_rate=RATE, drop_path_schedule='uniform')
    own = {mode: create(model, **drop_path, drop_path_mode=mode) for mode in MODES}
    return peer_networks(model, RATE, create, 'uniform') | own


def _images() -> Tensor:
    return torch.randn(4, 3, 32, 32)


def _note(tried: Tried, columns: Sequence[str], trial: Callable[[], dict[str, str]]) -> bool:
    """Do it, and note what came of it; did it work?"""
    try:
        tried.words |= trial()
    except Exception as error:
        tried.words |= {**dict.fromkeys(columns, '-'), columns[0]: 'fails'}
        tried.errors[columns[0]] = one_line(error)
    return columns[0] not in tried.errors


def train_compiled(network: Callable[[Tensor], Tensor], fullgraph: bool) -> dict[str, str]:
    """How many graphs a number of steps takes, and whether torch gave up compiling something."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:  # 'aot_eager', counting
        graphs.append(graph)
        return aot_module_simplified(graph, inputs, fw_compiler=lambda graph, _: make_boxed_func(graph.forward))

    torch.compiler.reset()
    torch.manual_seed(0)
    compiled = torch.compile(network, backend=backend, fullgraph=fullgraph)
    with default_recompile_limit(), _compiler_says() as said:
        for _ in range(COMPILED_STEPS):
            compiled(_images()).square().mean().backward()
    torch.compiler.reset()
    hit = any('hit config.' in message for message in said)  # the limit's name differs between versions
    whole = {FULLGRAPH: 'works'} if fullgraph else {}
    return {**whole, GRAPHS: str(len(graphs)), LIMIT: 'hit' if hit else 'not hit'}


@contextmanager
def _compiler_says() -> Iterator[list[str]]:
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    log, listener = logging.getLogger(COMPILER_LOG), Listener(logging.WARNING)
    handlers, log.handlers = log.handlers, [listener]  # instead of those that print
    try:
        yield said
    finally:
        log.handlers = handlers


def train_checkpointed(network: Any) -> dict[str, str]:
    """Whether loss and gradients are those without, from the same seed."""
    images = _images()

    def step(checkpointing: bool) -> list[Tensor]:
        twin = copy.deepcopy(network)
        twin.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        loss = twin(images).square().mean()
        loss.backward()
        return [loss.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in twin.parameters())]

    same = all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(step(False), step(True)))
    return {CHECKPOINTING: 'same' if same else 'differs'}


def odds(model: str, network: nn.Module, size: int) -> tuple[float, bool]:
    """Share of the rows of `size` that survive in a block, and whether it is p_l but for chance, of each row too.

    Chance: four standard errors of what was drawn, five of a coin's for a row.
    """
    name, shape, silenced = BLOCKS[model]
    network = copy.deepcopy(network)
    block = network.get_submodule(name)
    for parameter in network.get_submodule(silenced).parameters() if silenced else ():
        nn.init.zeros_(parameter)
    torch.manual_seed(0)
    x = torch.rand(size, *shape) + 0.1  # positive: an activation after the addition changes nothing
    with torch.no_grad():
        alive = torch.stack([(block(x.clone()) != x).flatten(1).any(1) for _ in range(DRAWS)]).double()
    share, error = alive.mean().item(), alive.mean(1).std().item() / sqrt(DRAWS)
    of_rows = (alive.mean(0) - (1 - RATE)).abs().max().item()
    return share, abs(share - (1 - RATE)) <= 4 * error and of_rows <= 5 * sqrt(RATE * (1 - RATE) / DRAWS)


Ended = tuple[float, str | None, str]  # of a rank: when, its error, and its parameters as a hash


def _try_ddp(models: Sequence[str]) -> dict[tuple[str, str], list[Ended]]:
    """A few steps on two ranks, for each model and name what each rank ended with."""
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(2, multiprocessing.get_context('spawn')) as pool:
        ranks = [pool.submit(_rank, rank, str(Path(folder, 'store')), tuple(models)) for rank in range(2)]
        first, second = (rank.result() for rank in ranks)
    return {key: [first[key], second[key]] for key in first}


def _rank(rank: int, path: str, models: Sequence[str]) -> dict[tuple[str, str], Ended]:
    torch.set_num_threads(1)
    store = dist.FileStore(path, 2)
    ended: dict[tuple[str, str], Ended] = {}
    for model in models:
        for name, network in networks_of(model).items():
            # A process group each: what fails in one leaves the others alone
            own, limit = dist.PrefixStore(f'{model} {name}', store), datetime.timedelta(seconds=60)
            dist.init_process_group('gloo', store=own, rank=rank, world_size=2, timeout=limit)
            torch.manual_seed(rank)  # as in timm's train.py: each rank draws for itself
            try:
                ended[model, name] = time.time(), None, _train_on_ranks(network)
            except RuntimeError as error:
                ended[model, name] = time.time(), str(error), ''
            dist.destroy_process_group()
    return ended


def _train_on_ranks(network: nn.Module) -> str:
    wrapped = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    for _ in range(DDP_STEPS):
        optimizer.zero_grad()
        wrapped(_images()).square().mean().backward()
        optimizer.step()
    return hashlib.sha256(b''.join(p.detach().numpy().tobytes() for p in network.parameters())).hexdigest()


def _both_ranks(ended: list[Ended]) -> dict[str, str]:
    """A RuntimeError with what failed first, which is what the other rank then missed."""
    for _, error, _ in sorted(ended, key=itemgetter(0)):
        if error is not None:
            raise RuntimeError(error)
    return {DDP: 'works', RANKS: 'equal' if len({digest for _, _, digest in ended}) == 1 else 'differ'}


def table(found: dict[str, dict[str, Tried]]) -> str:
    """Words, and below them why what fails fails."""
    lines = [f'What breaks, tried out on small networks at rate {RATE:g}']
    for model, tried in found.items():
        columns = list(next(iter(tried.values())).words)
        lines += ['', model, _row('', columns)]
        lines += [_row(name, [each.words[column] for column in columns]) for name, each in tried.items()]
        for name, each in tried.items():
            lines += [f'{name}, {column}: {error}' for column, error in each.errors.items()]
    return '\n'.join((*lines, _LEGEND))


def _row(name: str, cells: Sequence[str]) -> str:
    return f'  {name:<12}' + ''.join(f'{cell:>12}' for cell in cells)


def record(found: dict[str, dict[str, Tried]]) -> dict[str, Any]:
    """For JSON."""
    return {model: {name: asdict(each) for name, each in tried.items()} for model, tried in found.items()}
