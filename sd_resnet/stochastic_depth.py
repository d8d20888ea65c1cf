"""The `StochasticDepth` module and the draw.

Section and equation numbers refer to Huang et al., "Deep Networks with Stochastic Depth"
(https://arxiv.org/abs/1603.09382). The field's words: a residual block computes `act(shortcut(x) + branch(x))`;
p_l is block l's survival probability, b_l its draw.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

ModuleT = TypeVar('ModuleT', bound=nn.Module)

MODES = ('batch', 'row', 'subset')
RESCALES = ('test', 'train')

# A whole number is a constant to `torch.compile`; a float that changes, in a ramp, would become a symbol, and so would
# numbers of rows. p_l as a multiple of 2^-60 is exact where p_l is at least 2^-7.
_ONE = 2**60

# What a block is told about one training step. Batch mode: is the block active? Row mode: the mask of the rows,
# (N, 1, ..., 1). Subset mode: the first row of the window, in a compiled graph as a tensor of one number, on the
# input's device. None: the block draws for itself.
Decision = bool | int | Tensor | None


class _Scriptable(DropPath):
    """`StochasticDepth` as TorchScript sees it: `survival_prob` is the travelling scalar, not the Python number."""

    __jit_unused_properties__ = ('drop_prob', 'test_scale')
    per_batch = False  # it decides nothing: the gate is one more factor

    if TYPE_CHECKING:
        p_l: float
        mode: str
        rescale: str

    def gate(self, x: Tensor) -> Tensor:
        """A factor for the undropped branch, for TorchScript, where no autograd function can skip it.

        The values are those of the mode, broadcast to (N, 1, 1, 1); nothing is saved, and BatchNorm sees every row.
        """
        batch = x.shape[0]
        if self.mode == 'row':
            gate, share = self.mask(x), self.p_l
        elif self.mode == 'batch':
            gate, share = self.mask(x[:1]), self.p_l
        else:
            rows = max(1, int(round(self.p_l * batch)))  # noqa: RUF046 - TorchScript's round() gives a float
            offset = torch.arange(batch, device=x.device) - int(torch.randint(batch, (1,)).item())
            gate, share = (offset.remainder(batch) < rows).to(x.dtype).view(batch, 1, 1, 1), rows / batch
        return gate / share if self.rescale == 'train' else gate

    def mask(self, x: Tensor) -> Tensor:
        """Row mode's draw: 1 for a surviving sample, else 0; shape (N, 1, ..., 1), on the device of `x`."""
        return x.new_empty([x.shape[0]] + [1] * (x.dim() - 1)).bernoulli_(self.p_l)

    def forward(self, x: Tensor) -> Tensor:
        if self.p_l == 1.0:
            return x
        if self.training:
            mask = self.mask(x)
            return x * (mask / self.p_l if self.rescale == 'train' else mask)
        return x * self.p_l if self.rescale == 'test' else x


class StochasticDepth(_Scriptable):
    """Survival probability, mode and rescaling of one residual block; each block holds its own as `drop_path`.

    The block skips the work. Called like timm's `DropPath`, the module applies the row mode's mask in training and
    the factor that the rescaling asks for, so that code which treats it as a `DropPath` gets a right answer.

    In test-time rescaling the state dict holds one scalar, `survival_prob`, where p_l < 1. It is rebuilt from the
    Python number, which alone decides; see `resnet_blocks.ResidualBlock` for what loading makes of it.

    Args:
        survival_prob: p_l, in (0, 1].
        mode: `'batch'`, one draw per mini-batch (section 3); `'row'`, one per sample; `'subset'`, the branch runs on
            round(p_l * N) neighbouring rows.
        rescale: `'test'`, the branch times p_l in evaluation (equation 5); `'train'`, the branch over p_l in training.
        device: Device of the travelling scalar.
        dtype: Type of the travelling scalar.

    Attributes:
        network_drops: Does any block of its network drop? Set by the network.
        ramped: Does a `DropPathRamp` set its rate? Set by the network.

    Raises:
        ValueError: An argument is outside what is allowed.
    """

    def __init__(
        self,
        survival_prob: float = 1.0,
        mode: str = 'batch',
        rescale: str = 'test',
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Module.__init__(self)  # DropPath's own would assign drop_prob
        self._carrier_options = {'device': device, 'dtype': dtype}
        self._buffers['survival_prob'] = None  # not register_buffer: the public attribute is the Python number
        self.network_drops = self.ramped = False
        self.configure(survival_prob, mode, rescale)

    def configure(self, survival_prob: float, mode: str, rescale: str) -> None:
        """Set all three at once. It does not touch the branch's weights; `model.set_drop_path` does both."""
        check_settings(survival_prob, mode, rescale)
        self.p_l = float(survival_prob)
        self.fixed_point = round(self.p_l * _ONE)
        self.drops = self.p_l < 1
        self.mode = mode
        self.rescale = rescale
        self.scale_by_keep = rescale == 'train'
        self.rebuild_carrier()

    def rebuild_carrier(self, like: Tensor | None = None) -> None:
        """Make the scalar that travels in the state dict anew from the Python number, on the device of `like`."""
        carrier = self._buffers['survival_prob']
        if self.p_l == 1 or self.rescale == 'train':
            if carrier is not None:
                self._carrier_options = {'device': carrier.device, 'dtype': carrier.dtype}
            self._buffers['survival_prob'] = None
        elif carrier is None or like is not None or carrier.is_inference():
            like = carrier if like is None else like
            options = self._carrier_options if like is None else {'device': like.device, 'dtype': like.dtype}
            self._buffers['survival_prob'] = torch.full((), self.p_l, **options)
        else:
            with torch.no_grad():
                carrier.fill_(self.p_l)

    @property
    def survival_prob(self) -> float:
        """p_l."""
        return _Number(self.p_l)

    @property
    def per_batch(self) -> bool:  # type: ignore[override]
        """Does its network take decisions for whole mini-batches?

        Also where its own p_l is 1: compiled among blocks that decide, those would be many graphs of one code object.
        """
        return self.mode == 'batch' and (self.drops or self.network_drops)

    @property
    def test_scale(self) -> float:
        """What the branch is multiplied by in evaluation."""
        return self.p_l if self.rescale == 'test' else 1.0

    @property
    def drop_prob(self) -> float:
        """1 - p_l, under timm's name. Assigning it acts as in timm under train-time rescaling."""
        return 1 - self.p_l

    @drop_prob.setter
    def drop_prob(self, value: float) -> None:
        if not 0 <= value < 1:
            raise ValueError(f'drop_prob must be in [0, 1), got {value!r}')
        if self.ramped:
            raise AttributeError(f'drop_prob cannot be assigned (got {value!r}): drop_path_ramp sets it at every step')
        if self.rescale == 'test' and value != self.drop_prob:
            raise AttributeError(
                f"drop_prob cannot be assigned (got {value!r}) under drop_path_rescale='test': it would change what "
                'the network computes at test time; call model.set_drop_path(rate=...) instead'
            )
        self.configure(1 - value, self.mode, self.rescale)

    def rows(self, batch: int) -> int:
        """Number k of rows that a branch runs on in subset mode: round(p_l * batch), ties to even, at least 1."""
        return rows_of(self.fixed_point / _ONE, batch)

    def train_factor(self, share: float) -> float:
        """What the branch is multiplied by in training where the share `share` of the work survives."""
        return 1 / share if self.rescale == 'train' else 1.0

    def extra_repr(self) -> str:
        return f'survival_prob={self.p_l:.4g}, mode={self.mode!r}, rescale={self.rescale!r}'

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        carrier = self._buffers['survival_prob']
        if carrier is not None and not carrier.is_meta:
            self.rebuild_carrier()  # to_empty(), or arithmetic on state dicts, may have changed it
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        """Nothing to copy: the block reads the stored probability and rescales its weights instead."""


class _Number(float):
    """With a scalar tensor's shape: transformers compares it with the file's, then fills the buffer of that name."""

    shape = torch.Size()


def scriptable_copy(module: ModuleT) -> ModuleT:
    """A copy that shares all tensors, for `torch.jit.script`, which reads a buffer by the attribute of its name."""
    if not any(isinstance(child, StochasticDepth) for child in module.modules()):
        return module
    memo: dict[int, Any] = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copied = copy.deepcopy(module, memo)
    for child in copied.modules():
        if isinstance(child, StochasticDepth):
            child.__class__ = _Scriptable  # type: ignore[assignment]
    copied.__dict__['_copied_from'] = (module,)  # torch.jit tells modules apart by id: keep this one's from reuse
    return copied


def rows_of(survival_prob: float, batch: int) -> int:
    """Number k of rows that survive in subset mode: round(p_l * batch), ties to even, at least 1."""
    return max(1, round(survival_prob * batch))


def check_settings(survival_prob: float, mode: str, rescale: str) -> None:
    """Raise a ValueError that names the argument, its value and what is allowed."""
    if not 0 < survival_prob <= 1:
        raise ValueError(f'survival_prob must be in (0, 1], got {survival_prob!r}')
    if mode not in MODES:
        raise ValueError(f'drop_path_mode must be one of {", ".join(map(repr, MODES))}, got {mode!r}')
    if rescale not in RESCALES:
        raise ValueError(f'drop_path_rescale must be one of {", ".join(map(repr, RESCALES))}, got {rescale!r}')


def draw_per_batch(drop_paths: Sequence[StochasticDepth], generator: torch.Generator | None = None) -> list[Decision]:
    """Draw b_1 .. b_L (section 3) for one mini-batch, on the host: is the block active?

    Args:
        drop_paths: One module per block.
        generator: None is torch's default generator.
    """
    uniform = torch.rand(len(drop_paths), dtype=torch.float64, device='cpu', generator=generator).tolist()
    return [u < drop_path.p_l for u, drop_path in zip(uniform, drop_paths)]


def draw_per_sample(drop_paths: Sequence[StochasticDepth], x: Tensor) -> list[Decision]:
    """Draw for every sample of one mini-batch: row mode's masks, or subset mode's windows.

    The same seed gives the same numbers in eager and in compiled code (which `torch.rand` and `randint` would not).

    Args:
        drop_paths: One module per block, all of one mode.
        x: Input of the network (N, ...). A row mode's masks are drawn on its device, windows on the host. Nothing here
            waits for a device.
    """
    if drop_paths[0].mode == 'row':
        return [drop_path.mask(x) for drop_path in drop_paths]
    if x.shape[0] == 0:
        return [0] * len(drop_paths)
    starts = torch.ones(x.shape[0], device='cpu').multinomial(len(drop_paths), replacement=True)
    if torch.compiler.is_compiling():
        return list(starts.to(x.device, non_blocking=True).unbind())
    return starts.tolist()
