"""A trial run of a copy without data: how the drop paths of any network are found, and what is around them."""

import copy
import re
from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any, NamedTuple

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from .private_api import children_of

BATCH = 53  # images of a trial run; a size that no network has elsewhere

NEVER_USED = 'its drop path is never used: it has no shortcut there'


class Slot(NamedTuple):
    """The attribute `name` of the module `holder`, where a drop path is, or would be if its rate were not 0."""

    holder: str
    name: str
    rate: float

    @property
    def path(self) -> str:
        """As a name in the network."""
        return f'{self.holder}.{self.name}'.lstrip('.')


def find_slots(model: nn.Module, kinds: tuple[type, ...] = ()) -> Iterator[Slot]:
    """Every drop path: of timm, of such a name or of these classes, with its rate as `drop_prob` or `p`.

    At rate 0 also None or an `Identity` that is named like one.
    """
    for holder, module in model.named_modules():
        nothing = {name: None for name, value in vars(module).items() if value is None}
        for name, child in {**nothing, **children_of(module)}.items():
            rate: Any = None
            if is_drop_path(child, kinds):
                rate = None if why_unfit(child) else stated_rate(child)
            elif re.search(r'(^|_)drop_path\d*$', name) and (child is None or isinstance(child, nn.Identity)):
                rate = 0.0
            if rate is not None:
                yield Slot(holder, name, round(float(rate), 6))  # timm computes them in float32


def is_drop_path(module: Any, kinds: tuple[type, ...] = ()) -> bool:
    """By its class, of timm or one of these, or by its name, as torchvision's and transformers'."""
    return isinstance(module, (DropPath, *kinds)) or type(module).__name__.endswith(('DropPath', 'StochasticDepth'))


def why_unfit(drop_path: Any) -> str | None:
    """Why another cannot stand in the place of a drop path, if so."""
    if not isinstance(stated_rate(drop_path), Real):
        return f'{type(drop_path).__name__} has no number in drop_prob or p'
    if not getattr(drop_path, 'scale_by_keep', True):
        return 'it does not divide by the survival probability (scale_by_keep=False)'
    return None


def stated_rate(drop_path: Any) -> Any:
    """In `drop_prob` or `p`, if there is one; None stands for 0."""
    stated = [getattr(drop_path, name) for name in ('drop_prob', 'p') if hasattr(drop_path, name)]
    return 0.0 if stated and stated[0] is None else next(iter(stated), None)


def copy_without_data(model: nn.Module) -> nn.Module:
    """A float32 copy on the `meta` device, without a copy of the data on the way; its parameters take no gradient."""
    attributes = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {}
    with torch.inference_mode(False):
        for tensor in (*model.parameters(), *model.buffers(), *attributes):
            dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
            like = torch.empty_like(tensor, device='meta', dtype=dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(like, requires_grad=False) if is_parameter else like
        return copy.deepcopy(model, memo)


def run(tried: nn.Module, input_size: tuple[int, ...]) -> Any:
    """What a copy without data gives for images (C, H, W); a RuntimeError where it does not run on such."""
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # of no device: what is found does not depend on chance
        return tried(torch.zeros(BATCH, *input_size, dtype=torch.float32, device='meta', requires_grad=True))


def parents(node: Any) -> list[Any]:
    """Of a node of autograd's graph, those that it depends on."""
    return [] if node is None else [parent for parent, _ in node.next_functions if parent is not None]


# Autograd's names of what may lie between a block's input and its output, beside a branch that is added; and of pooling
_KIND = re.compile(
    r'(?:(?P<layout>Alias|AsStrided|Clone|Expand|Permute|ReshapeAlias|Squeeze|ToCopy|Transpose|UnsafeView|Unsqueeze|View)'
    r'|(?P<sum>Add|Sub|AddAlpha|CopySlices)|(?P<product>Mul|Div)|(?P<relu>Relu|Threshold)|(?P<max_pool>MaxPool\w*)'
    r'|(?P<piece>Slice|Stack|Sum)|(?P<shift>Roll|ConstantPadNd))Backward\d'
)


def kind_of(node: Any) -> str | None:
    """The group of `_KIND` that a node's operation is of, or None."""
    match = None if node is None or isinstance(node, str) else _KIND.match(node.name())
    return match and match.lastgroup


def product(sizes: Iterable[int]) -> str:
    """A shape, in a message."""
    return ' x '.join(map(str, sizes))
