"""Peers of this package: networks that drop as others let them drop, written anew here after what those do.

- timm's `DropPath` and torchvision's `stochastic_depth`, the originals, which compute the whole branch and multiply.
- DINOv2: Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision", arXiv 2304.07193, section 5, and
  `dinov2/layers/block.py` of github.com/facebookresearch/dinov2. Each branch runs on a random subset of the rows.
- Composer: block-wise stochastic depth of Huang et al., arXiv 1603.09382, as in `composer/algorithms/stochastic_depth`
  of github.com/mosaicml/composer. Each block is drawn once per mini-batch.

DINOv2 has transformer blocks only, Composer ResNet's bottlenecks only; both are written here for the three blocks of
`SUMS`. Every peer is timm's plain network, of the same weights under the same names, and drops each block with the
probability with which this package's network drops it, so that their steps can be compared.
"""

from collections.abc import Callable
from functools import cache
from statistics import fmean
from typing import Any

import timm
import torch
from timm.layers import DropPath, drop_path
from timm.models.convnext import ConvNeXtBlock
from timm.models.resnet import Bottleneck
from timm.models.vision_transformer import Block as ViTBlock
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from ..analysis.networks import network_of
from ..converted.trial import find_slots
from ..core.schedules import Schedule

TIMM, TORCHVISION, DINOV2, COMPOSER = 'timm', 'torchvision', 'DINOv2', 'Composer'
PEERS = (TIMM, TORCHVISION, DINOV2, COMPOSER)

Branch = Callable[[Tensor], Tensor]
Add = Callable[[Tensor, Tensor, Branch], Tensor]  # of the input, the shortcut and the branch: their sum


def vit_block(block: Any, x: Tensor, add: Add) -> Tensor:
    """Two branches, each with its norm and LayerScale; (N, L, C)."""
    x = add(x, x, lambda x: block.ls1(block.attn(block.norm1(x))))
    return add(x, x, lambda x: block.ls2(block.mlp(block.norm2(x))))


def convnext_block(block: Any, x: Tensor, add: Add) -> Tensor:
    """Of ConvNeXt with its linear layers on the channels behind, or as 1x1 convolutions; (N, C, H, W)."""

    def branch(x: Tensor) -> Tensor:
        x = block.conv_dw(x)
        if block.use_conv_mlp:
            x = block.mlp(block.norm(x))
        else:
            x = block.mlp(block.norm(x.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        return x if block.gamma is None else x * block.gamma.view(-1, 1, 1)

    return add(x, block.shortcut(x), branch)


def bottleneck(block: Any, x: Tensor, add: Add) -> Tensor:
    """Of ResNet, with its projection where it has one; (N, C, H, W)."""

    def branch(x: Tensor) -> Tensor:
        x = block.act1(block.bn1(block.conv1(x)))
        x = block.act2(block.drop_block(block.bn2(block.conv2(x))))
        x = block.bn3(block.conv3(block.aa(x)))
        return x if block.se is None else block.se(x)

    return block.act3(add(x, x if block.downsample is None else block.downsample(x), branch))


SUMS: dict[type, Callable[[Any, Tensor, Add], Tensor]] = {
    ViTBlock: vit_block,
    ConvNeXtBlock: convnext_block,
    Bottleneck: bottleneck,
}


class Dropping(nn.Module):
    """Put before a block's own class."""

    act3: Any  # of a bottleneck
    sum_of: Any  # of `SUMS`
    rate: float  # at which it drops, 1 - p_l
    expected_share: Callable[[int], float]  # of the work of its branches, for a number of images


class DinoBlock(Dropping):
    """Above rate 0.1 each branch runs on floor(p_l N) rows, but at least one, that a permutation chooses.

    Up to there it runs on all, and is multiplied by 0 where it drops, as by timm's `DropPath`.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) to (N, ...)."""
        return self.sum_of(x, self.add)

    def expected_share(self, batch: int) -> float:
        """Share of the work of its branches that is done for `batch` images."""
        return self.rows(batch) / batch if self.rate > 0.1 else 1.0

    def rows(self, batch: int) -> int:
        """On how many of `batch` rows each branch runs."""
        return max(int(batch * (1 - self.rate)), 1)

    def add(self, x: Tensor, shortcut: Tensor, branch: Branch) -> Tensor:
        """The branch of a subset of rows, times N over their number, is added in their places."""
        if not self.training or self.rate == 0:
            return shortcut + branch(x)
        if self.rate <= 0.1:
            return shortcut + drop_path(branch(x), self.rate, training=True)
        kept = self.rows(len(x))
        rows = torch.randperm(len(x), device=x.device)[:kept]
        residual = branch(x[rows]).to(shortcut.dtype)
        return torch.index_add(shortcut, 0, rows, residual, alpha=len(x) / kept)


class ComposerBlock(Dropping):
    """One draw for each block and mini-batch: the whole block, or nothing of it; in evaluation branches times p_l."""

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) to (N, ...); where it drops, `x` itself, or the activation of its projection."""
        if not self.training or bool(torch.bernoulli(torch.tensor(1 - self.rate))):
            return self.sum_of(x, self.add)
        projection: Any = getattr(self, 'downsample', None)
        return x if projection is None else self.act3(projection(x))

    def expected_share(self, batch: int) -> float:
        """Share of the work of its branches that is done on average."""
        return 1 - self.rate

    def add(self, x: Tensor, shortcut: Tensor, branch: Branch) -> Tensor:
        """The sum of both."""
        return shortcut + (branch(x) if self.training else branch(x) * (1 - self.rate))


DROP_PATHS: dict[str, Callable[[float], nn.Module]] = {
    TIMM: DropPath,
    TORCHVISION: lambda rate: StochasticDepth(rate, 'row'),
}
BLOCKS: dict[str, Any] = {DINOV2: DinoBlock, COMPOSER: ComposerBlock}


def peer_networks(
    model: str, rate: float, create: Callable[..., Any], schedule: Schedule | None = None
) -> dict[str, Any]:
    """timm's network under the model's name without `sd_`, dropping as each peer drops, by the names of `PEERS`.

    None where timm has no such network; without DINOv2 and Composer where its blocks are not of `SUMS`.

    Args:
        model: An architecture of this package, or timm's under its `sd_` name.
        rate: 1 - p_L; at 0 each is the peer's own undropped network.
        create: Builds a network by its name with further arguments, as `timm.create_model`.
        schedule: Of the survival probabilities, see `survival_probs`; None is the model's own.
    """
    plain = model.removeprefix('sd_')
    if not timm.is_model(plain):
        return {}
    with torch.device('meta'):
        ours = network_of(create(model, drop_path_rate=rate, drop_path_schedule=schedule))
    rates = {name: 1 - fmean(each.p_l for each in own) for name, own in ours.drop_paths.items()}
    networks = {peer: create(plain) for peer in PEERS}
    for peer, drop_path_of in DROP_PATHS.items():
        _put_drop_paths(networks[peer], rates, drop_path_of)
    for peer, kind in BLOCKS.items():
        if not _change_blocks(networks[peer], rates, kind):
            del networks[peer]
    return networks


def expected_shares(network: nn.Module, batch: int) -> list[float]:
    """Of each block that DINOv2 or Composer drop, the share of its work that is done on average for `batch` images."""
    return [block.expected_share(batch) for block in _blocks(network)]


def on_forward(network: nn.Module, tell: Callable[[list[float]], None]) -> None:
    """Call `tell` after each forward pass with the share of the rows that each such block's branches ran on."""
    ran: dict[nn.Module, int] = {}
    blocks = _blocks(network)
    for block in blocks:
        first: Any = next(block.children())  # of its first branch; a second one runs on as many rows
        first.register_forward_pre_hook(lambda _, args, block=block: ran.update({block: len(args[0])}))
    network.register_forward_hook(lambda _, args, out: tell([ran.pop(b, 0) / len(args[0]) for b in blocks]))


def _blocks(network: nn.Module) -> list[Any]:
    return [module for module in network.modules() if isinstance(module, Dropping)]


def _put_drop_paths(network: nn.Module, rates: dict[str, float], drop_path_of: Callable[[float], nn.Module]) -> None:
    for slot in list(find_slots(network)):
        for block, rate in rates.items():
            if rate and slot.path.startswith(f'{block}.'):
                setattr(network.get_submodule(slot.holder), slot.name, drop_path_of(rate))


def _change_blocks(network: nn.Module, rates: dict[str, float], kind: Any) -> bool:
    """Are all blocks such as can be changed? Then they are."""
    blocks: list[Any] = [network.get_submodule(name) for name in rates]
    if any(type(block) not in SUMS for block in blocks):
        return False
    for block, rate in zip(blocks, rates.values()):
        plain: Any = type(block)
        block.__class__ = _class(kind, plain)
        block.rate = rate
    return True


@cache
def _class(kind: Any, plain: Any) -> Any:
    return type(f'{kind.__name__}Of{plain.__name__}', (kind, plain), {'sum_of': SUMS[plain]})
