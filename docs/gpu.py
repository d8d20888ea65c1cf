"""What a training step should cost on a GPU, on paper: `python -m docs.gpu`, in a clone.

Counts FLOPs and bytes of every operation of a step on `meta` tensors, and writes docs/results/roofline.json and the
table of docs/gpu.md. An operation takes as long as the card's arithmetic or its memory needs, whichever is longer.
"""

import argparse
import json
import math
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import sd_resnet  # noqa: F401
from sd_resnet.core.drop_path import StochasticDepth
from sd_resnet.files import written_whole

aten = torch.ops.aten

FOLDER = Path(__file__).parent
RECORD, PAGE = FOLDER / 'results' / 'roofline.json', FOLDER / 'gpu.md'
BEGIN, END = '<!-- made by python -m docs.gpu -->\n', '<!-- end of what is made -->\n'
MODELS = ('sd_resnet50', 'sd_vit_base_patch16_224', 'sd_convnext_tiny')
BATCH, RATES, SEEDS = 128, (None, 0.4), 4  # None is the model's own rate
CARDS = {  # FLOP/s of dense bfloat16 matrix products, bytes/s of memory, as published
    'H100 SXM': (989e12, 3.35e12),
    'A100 SXM 80 GB': (312e12, 2.039e12),
}
HOW = ('eager', 'fused')
ALWAYS, NEVER = 1 - 2**-40, 2**-40  # survival probabilities of a block that is kept, and of one that is dropped

_NOTHING = {'empty', 'empty_like', 'new_empty', 'empty_strided', 'empty_permuted', '_unsafe_view', 'lift_fresh'}
# A compiler makes them as it does pointwise operations
_LIKE_POINTWISE = {'copy_', '_to_copy', 'clone', 'arange', 'full', 'full_like', 'zeros', 'zeros_like', 'index_select'}
_KERNELS = {'convolution', 'mm', 'addmm', 'bmm', '_scaled_dot_product_flash_attention'}

Record = dict[str, Any]


class Operation(NamedTuple):
    """One operation of a step."""

    name: str
    flops: int
    eager: int  # bytes of the tensors that it reads and writes
    fused: int  # of these, what is left where a compiler computes in a neighbour's kernel what it can


class Step(list[Operation]):
    """The operations of a step, and what they need together."""

    def seconds(self, card: str, how: str) -> float:
        """At least so long; see `Operation` for `how`."""
        flops, memory = CARDS[card]
        return sum(max(each.flops / flops, getattr(each, how) / memory) for each in self)

    def totals(self) -> dict[str, float]:
        """FLOPs; and eager and fused bytes, and milliseconds on each card."""
        totals: dict[str, float] = {'flops': sum(each.flops for each in self)}
        for how in HOW:
            totals[f'bytes, {how}'] = sum(getattr(each, how) for each in self)
            totals |= {f'{card}, {how}': 1e3 * self.seconds(card, how) for card in CARDS}
        return totals


class Counting(TorchDispatchMode):
    """Collects the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.step = Step()
        self._gathered: list[Tensor] = []  # not yet read by a kernel into which a gather cannot go

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = str(func.overloadpacket).removeprefix('aten.')
        if not func.is_view and name not in _NOTHING:
            written = sum(map(_bytes, tree_leaves(out)))
            size = written + sum(map(_bytes, tree_leaves((args, kwargs))))
            fused = 0 if torch.Tag.pointwise in func.tags or name in _LIKE_POINTWISE else size
            if name in _KERNELS:  # which no gather is fused into: it writes, and they read
                fused += sum(_bytes(each) for each in self._gathered if any(each is arg for arg in args))
                self._gathered = [each for each in self._gathered if not any(each is arg for arg in args)]
            if name == 'index_select':
                self._gathered.append(out)
            self.step.append(Operation(name, self._flops(func, args, kwargs, out), size, fused))
        return out

    def compiler(self, graph: Any, inputs: Any) -> Any:
        """Of `torch.compile`: runs a graph as it is, and counts it."""

        def run(*args: Any) -> Any:
            with self:
                return graph(*args)

        return make_boxed_func(run)

    def _flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> int:
        if func is aten.convolution_backward.default:  # torch's own count forgets groups
            grad, _, weight, *_, wanted = args
            return 2 * grad.numel() * weight[0].numel() * sum(wanted[:2])
        count = flop_registry.get(func.overloadpacket)
        return int(count(*args, **kwargs, out_val=out)) if count else 0


class FlashAttention(TorchFunctionMode):
    """On `meta` attention comes in pieces; on a card it is one kernel, which keeps no scores."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            return aten._scaled_dot_product_flash_attention(*args[:3])[0]
        return func(*args, **(kwargs or {}))


def _bytes(x: Any) -> int:
    """Of its different elements, unless it is on the host, or no tensor."""
    if not isinstance(x, Tensor) or x.is_cpu:
        return 0
    sizes = [size for size, stride in zip(x.shape, x.stride()) if stride or size == 0]
    return math.prod(sizes) * x.element_size()


class Training:
    """A model of this package on `meta`, all in bfloat16."""

    def __init__(self, name: str, batch: int, **options: Any) -> None:
        with torch.device('meta'):
            model = timm.create_model(name, **options)
        self.model = model.to(torch.bfloat16).train()
        self.drop_paths = [each for each in model.modules() if isinstance(each, StochasticDepth)]
        size = model.pretrained_cfg['input_size']
        self.x = torch.empty(batch, *size, device='meta', dtype=torch.bfloat16)
        self.y = torch.empty(batch, device='meta', dtype=torch.long)
        self.optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
        self.step()  # the optimiser's momentum is made

    def step(self, compiled: bool = False) -> Step:
        """Forward, backward, optimiser; operations of one compiled graph, or those that eager mode calls."""
        counting = Counting()
        if compiled:
            torch._dynamo.reset()
            backend = aot_autograd(fw_compiler=counting.compiler)
            with FlashAttention():
                loss = self._loss(torch.compile(self.model, backend=backend, fullgraph=True))
            torch.autograd.backward(loss)
            with counting:
                self.optimizer.step()
        else:
            with counting, FlashAttention():
                torch.autograd.backward(self._loss(self.model))
                self.optimizer.step()
        self.optimizer.zero_grad()
        return counting.step

    def _loss(self, forward: Any) -> Tensor:
        return torch.nn.functional.cross_entropy(forward(self.x), self.y)


def measure(name: str, batch: int = BATCH, rates: Sequence[float | None] = RATES, seeds: int = SEEDS) -> list[Record]:
    """One model: constant depth, and both modes at every rate."""
    constant = Training(name, batch, drop_path_rate=0.0).step().totals()
    records: list[Record] = [{'model': name, 'mode': 'constant depth', **constant}]
    for rate in rates:
        given = {} if rate is None else {'drop_path_rate': rate}
        for mode, mean in (('batch', _mean_of_batch), ('subset', _mean_of_subset)):
            training = Training(name, batch, drop_path_mode=mode, **given)
            probs = [each.p_l for each in training.drop_paths]
            head = {'model': name, 'mode': mode, 'rate': round(1 - min(probs), 4), 'own_rate': rate is None}
            records.append(head | mean(training, seeds))
    return records


def _mean_of_batch(training: Training, seeds: int) -> dict[str, float]:
    """Exactly: blocks take their time one after another, so what each one saves is weighted by its odds."""
    probs = [each.p_l for each in training.drop_paths]

    def totals(dropped: int | None) -> dict[str, float]:
        for l, each in enumerate(training.drop_paths):
            each.configure(NEVER if l == dropped else ALWAYS, each.mode)
        return training.step().totals()

    whole = totals(None)
    without = [(1 - p_l, totals(l)) for l, p_l in enumerate(probs) if p_l < 1]
    return {key: whole[key] - sum(q * (whole[key] - each[key]) for q, each in without) for key in whole}


def _mean_of_subset(training: Training, seeds: int) -> dict[str, float]:
    """Eager over draws, for a window that wraps is copied, another is a view; fused of the compiled graph."""
    drawn = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        drawn.append(training.step().totals())
    compiled = training.step(compiled=True).totals()
    return {key: compiled[key] if 'fused' in key else sum(each[key] for each in drawn) / seeds for key in drawn[0]}


def table(records: list[Record]) -> str:
    """Shares of constant depth's step, and of its FLOPs and bytes."""
    columns = [f'{card}, {how}' for card in CARDS for how in HOW]
    heads = ('model', 'rate', 'mode', 'FLOPs', 'bytes, eager', 'bytes, fused', *columns)
    lines = [f'| {" | ".join(heads)} |', f'|{" --- |" * len(heads)}']
    for record in records:
        if record['mode'] == 'constant depth':
            constant = record
            units = (f'{record["flops"] / 1e12:.2f} T', f'{record["bytes, eager"] / 1e9:.1f} GB')
            units += (f'{record["bytes, fused"] / 1e9:.1f} GB', *(f'{record[column]:.1f} ms' for column in columns))
            cells = (f'`{record["model"]}`', '', 'constant depth', *units)
        else:
            shares = (record[key] / constant[key] for key in ('flops', 'bytes, eager', 'bytes, fused', *columns))
            own = ', its own' if record['own_rate'] else ''
            cells = ('', f'{record["rate"]:g}{own}', record['mode'], *(f'{share:.2f}' for share in shares))
        lines.append(f'| {" | ".join(cells)} |')
    return '\n'.join(lines) + '\n'


def write(records: list[Record]) -> None:
    """The record, and the table in the page."""
    made_with = {package: version(package) for package in ('timm', 'torch')}
    content = {'versions': made_with, 'batch': BATCH, 'cards': CARDS, 'steps': records}
    before, _, rest = PAGE.read_text(encoding='utf-8').partition(BEGIN)
    texts = {
        RECORD: json.dumps(content, indent=1) + '\n',
        PAGE: f'{before}{BEGIN}{table(records)}{END}{rest.partition(END)[2]}',
    }
    for path, text in texts.items():
        with written_whole(path) as part:
            part.write_text(text, encoding='utf-8')


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m docs.gpu', description=__doc__)
    parser.add_argument('models', nargs='*', metavar='MODEL', help=f'count these again ({", ".join(MODELS)})')
    again = parser.parse_args(argv).models or MODELS
    known = json.loads(RECORD.read_text(encoding='utf-8'))['steps'] if RECORD.exists() else []
    kept = [record for record in known if record['model'] not in again]
    counted = kept + [record for name in again for record in measure(name)]
    write(sorted(counted, key=lambda record: MODELS.index(record['model'])))


if __name__ == '__main__':
    main()
