"""`drop_path_rescale='test'`, the paper's letter: unscaled in training, times p_l in evaluation (equation 5).

By default the branch is divided by p_l in training instead, which is the same function with p_l kept in the weight and
bias of the branch's last norm, and leaves timm's state dict as it is. Here is everything that the letter needs beside
it: p_l in the state dict, as `<block>.drop_path.survival_prob`, and the rescaling of the last norm where a setting
changes or a checkpoint of another convention is loaded. The first edition wrote such checkpoints by default; every
network here folds them in.
"""

from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..core.drop_path import StochasticDepth
from ..core.private_api import buffer_of
from ..core.refusals import check_settings

KEY = 'drop_path.survival_prob'  # after a block's name


class PaperStochasticDepth(StochasticDepth):
    """`StochasticDepth` to the paper's letter, for a block that drops; `like` is a tensor of it, for the buffer."""

    rescale = 'test'

    def __init__(self, survival_prob: float, mode: str, like: Tensor) -> None:
        nn.Module.__init__(self)
        self.register_buffer('survival_prob', torch.full((), survival_prob, device=like.device, dtype=like.dtype))
        self.scale_by_keep = self.network_drops = self.ramped = False
        self.configure(survival_prob, mode)

    def configure(self, survival_prob: float, mode: str) -> None:
        super().configure(survival_prob, mode)
        # Another tensor: this one may have been made in inference mode, or be another's
        self.register_buffer('survival_prob', torch.full_like(self.survival_prob, survival_prob))

    @property
    def survival_prob(self) -> Any:
        """p_l, as it is in the state dict: an ordinary buffer."""
        raise AttributeError('survival_prob')  # so that nn.Module looks for it among its buffers

    def _refuse_rate(self, value: float) -> None:
        if value != self.drop_prob:
            raise AttributeError(
                f"drop_prob cannot be assigned (got {value!r}) under drop_path_rescale='test': it would change what "
                'the network computes at test time; call model.set_drop_path(rate=...) instead'
            )

    drop_prob = property(lambda self: 1 - self.p_l, _refuse_rate)

    def train_factor(self, p_l: float) -> float:
        """1: the branch is unscaled in training."""
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) to (N, ...): row mode's mask in training, times p_l in evaluation."""
        return x * (self.mask(x) if self.training else buffer_of(self, 'survival_prob'))


def check_rescale(block: nn.Module, survival_prob: float, mode: str, rescale: str) -> None:
    """Raise a ValueError where `set_block` could not do this, before anything has changed."""
    check_settings(survival_prob, mode, rescale)
    if evaluation_factor(block) == (survival_prob if rescale == 'test' else 1.0):
        return
    try:
        check_rescalable(block)
    except ValueError as error:
        raise ValueError(f"drop_path_rescale='test' {error}; use drop_path_rescale='train'") from None


def set_block(block: Any, survival_prob: float, mode: str, rescale: str, keep_function: bool) -> None:
    """Set a block's p_l, mode and rescaling, in place, after `check_rescale`.

    With `keep_function` the last norm is rescaled, so that the test-time function stays.
    """
    before = evaluation_factor(block)
    letter = rescale == 'test' and survival_prob < 1
    if letter and not isinstance(block.drop_path, PaperStochasticDepth):
        block.drop_path = PaperStochasticDepth(survival_prob, mode, last_norm(block).weight).train(block.training)
    elif not letter and type(block.drop_path) is not StochasticDepth:
        block.drop_path = StochasticDepth().train(block.training)
    block.drop_path.configure(survival_prob, mode)
    factor = before / evaluation_factor(block)
    if keep_function and factor != 1:
        own = last_norm(block).state_dict()  # tensors that share their data
        for name, value in _rescaled(block, own, factor).items():
            own[name].data.copy_(value)


def evaluation_factor(block: Any) -> float:
    """What the branch is multiplied by in evaluation."""
    return block.drop_path.p_l if isinstance(block.drop_path, PaperStochasticDepth) else 1.0


def fold(
    block: Any, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], errors: list[str]
) -> None:
    """Before a block loads: meet a state dict of another convention by rescaling its last norm, in the state dict.

    A state dict says what it multiplies the branch by as `<block>.drop_path.survival_prob`, absent where it is 1.

    Args:
        block: A residual block of timm's ResNet, or of this package.
        state_dict: What `Module._load_from_state_dict` is given, as `prefix`, `local_metadata`, and `errors`.
    """
    own = block.drop_path if isinstance(block.drop_path, PaperStochasticDepth) else None
    stored = state_dict.pop(f'{prefix}{KEY}', None)
    if stored is None and own is None:
        return
    valid = isinstance(stored, Tensor) and stored.numel() == 1 and (stored.is_meta or 0 < float(stored) <= 1)
    if stored is not None and not valid:
        return errors.append(f'{prefix}{KEY} must be a survival probability in (0, 1], got {stored!r}')
    norm_prefix = f'{prefix}{last_norm_name(block)}.'
    given = {k.removeprefix(norm_prefix): tensor for k, tensor in state_dict.items() if k.startswith(norm_prefix)}
    factor, assign = _factor(stored, own), local_metadata.get('assign_to_params_buffers', False)
    try:
        if factor != 1 and (given or stored is not None):
            check_rescalable(block)
            _check_whole(block, given, stored is None)
            for name, value in _rescaled(block, given, factor).items():
                state_dict[f'{norm_prefix}{name}'] = value.to(given[name].dtype) if assign else value
    except ValueError as error:
        return errors.append(f'{prefix}{KEY} cannot be folded into the weights: it {error}')
    if own is not None:
        like = given.get('weight', own.survival_prob) if assign else own.survival_prob
        state_dict[f'{prefix}{KEY}'] = torch.full((), own.p_l, dtype=like.dtype, device=like.device)


def fold_all(module: nn.Module, state_dict: dict[str, Any], prefix: str, metadata: Any, errors: list[str]) -> None:
    """`fold` for a network whose blocks do not look for themselves: every block that the state dict has p_l of."""
    for key in [key for key in state_dict if key.startswith(prefix) and key.endswith(f'.{KEY}')]:
        name = key.removeprefix(prefix).removesuffix(f'.{KEY}')
        try:
            block = module.get_submodule(name)
            last_norm_name(block)
        except (AttributeError, ValueError):
            errors.append(f"{key}: only blocks of timm's ResNet fold survival probabilities in; load it there")
            continue
        fold(block, state_dict, f'{prefix}{name}.', metadata, errors)


def last_norm_name(block: nn.Module) -> str:
    """Of the norm layer that ends the branch; a ValueError where it is no block of timm's ResNet."""
    for kind, name in ((BasicBlock, 'bn2'), (Bottleneck, 'bn3')):
        if isinstance(block, kind):
            return name
    raise ValueError(f'{type(block).__name__} is no block of a ResNet')


def last_norm(block: nn.Module) -> Any:
    """The norm layer itself."""
    return getattr(block, last_norm_name(block))


def _factor(stored: Tensor | None, own: PaperStochasticDepth | None) -> float:
    """p_checkpoint / p_model; 1 where they agree at the stored precision."""
    mine = 1.0 if own is None else own.p_l
    if stored is None:
        return 1 / mine
    if stored.is_meta or float(torch.tensor(mine, dtype=stored.dtype)) == float(stored):
        return 1.0
    return float(stored) / mine


def check_rescalable(block: nn.Module) -> None:
    """Raise a ValueError where a factor of the branch cannot be kept in the weights of its last norm."""
    if getattr(block, 'se', None) is not None:
        raise ValueError('cannot be combined with an attention layer after the last norm layer')
    norm = last_norm(block)
    if getattr(norm, 'weight', None) is None or getattr(norm, 'bias', None) is None:
        raise ValueError(f'needs a last norm layer with weight and bias, got {norm}')
    tensors = norm.state_dict()
    if not any(tensor.is_meta for tensor in tensors.values()):
        _rescaled(block, tensors, 0.5)


def _check_whole(block: nn.Module, given: dict[str, Tensor], convention_unknown: bool) -> None:
    """Raise a ValueError unless the norm's tensors are all there, and it is known which convention they are of."""
    norm = last_norm(block)
    own = {name for name in norm.state_dict() if not name.startswith(('aux_bn.', 'running_', 'num_batches_tracked'))}
    if missing := own - given.keys():
        raise ValueError(f'needs {", ".join(sorted(missing))} of {last_norm_name(block)} beside it')
    if convention_unknown and getattr(norm, 'running_mean', None) is not None and 'running_mean' not in given:
        raise ValueError(
            'is missing: a state dict of parameters alone does not say whether it was scaled; add it (1 for a plain '
            "network's), or use drop_path_rescale='train'"
        )


def _rescaled(block: nn.Module, tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """What multiplies the last norm's output by a factor: new values for some of the tensors of its state dict.

    Parametrised, pruned and split norms included; a ValueError where there are no such values.
    """
    found: dict[str, Tensor] = {}
    for place, module in last_norm(block).named_modules():
        if 'parametrizations' in place:
            continue
        dot = f'{place}.' if place else ''
        held = {name for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))}
        for kind in ('weight', 'bias'):
            if parametrize.is_parametrized(module, kind):
                chain: Any = module.parametrizations[kind]
                count = [''] if chain.is_tensor else range(chain.ntensors)
                names = [f'{dot}parametrizations.{kind}.original{i}' for i in count]
                if all(name in tensors for name in names):
                    found.update(zip(names, _originals(chain, [tensors[name] for name in names], factor)))
                continue
            # Behind torch.nn.utils.prune, and torch.nn.utils.weight_norm; spectral_norm has no mask, and divides again
            name = f'{kind}_orig' if f'{kind}_mask' in held else f'{kind}_g' if f'{kind}_g' in held else kind
            if name not in held and getattr(module, kind, None) is not None:
                raise ValueError(f'needs a last norm layer whose {kind} is a parameter, got {module}')
            if f'{dot}{name}' in tensors:
                found[f'{dot}{name}'] = _times(tensors[f'{dot}{name}'], factor)
    return found


@torch.no_grad()
def _originals(chain: Any, originals: list[Tensor], factor: float) -> list[Tensor]:
    """What a parametrised tensor, times a factor, is made of."""

    def value(tensors: Sequence[Tensor]) -> Tensor:
        return reduce(lambda x, each: each(x), list(chain)[1:], chain[0](*tensors))

    def inverse(x: Any) -> list[Tensor]:
        x = reduce(lambda x, each: each.right_inverse(x), reversed(list(chain)), x)
        return [x] if isinstance(x, Tensor) else list(x)

    wanted = value(originals) * factor
    for candidate in (lambda: [_times(originals[0], factor), *originals[1:]], lambda: inverse(wanted)):
        try:
            tensors = candidate()
        except (AttributeError, NotImplementedError):  # a parametrisation without `right_inverse`: the next, or refused
            continue
        if torch.allclose(value(tensors), wanted):
            return tensors
    raise ValueError(f'needs a last norm layer whose parametrisation can be inverted, got {chain}')


def _times(tensor: Tensor, factor: float) -> Tensor:
    """The product, computed in float32 or better."""
    tensor = tensor.detach()
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor
