"""The paper's ResNets for CIFAR and SVHN: depth 6n + 2, three stages of n basic blocks, parameter-free shortcuts.

Huang et al., section 4; the nets are those of He et al. (https://arxiv.org/abs/1512.03385), section 4.2.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import generate_default_cfgs
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from ..core.private_api import feature_take_indices
from .blocks import StochasticBasicBlock
from .network import StochasticDepthNet
from .packaged import entrypoint, released


class PadShortcut(nn.Module):
    """Shortcut of a block with a stride, without parameters: average-pooled, and zero-padded by so many channels."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + channels, ceil(H/stride), ceil(W/stride))."""
        x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.channels))


class CifarResNet(ResNet):
    """A ResNet of the paper's CIFAR kind, without stochastic depth: timm's ResNet, another stem, three stages.

    Args:
        blocks_per_stage: n, at least 1; the network has L = 3n blocks and 6n + 2 layers. Or one number for each stage.
        channels: Width of each stage.
        block: The residual blocks' class.

    The others are those of timm's ResNet.
    """

    stage_names: tuple[str, ...] = ('layer1', 'layer2', 'layer3')

    if TYPE_CHECKING:  # TorchScript would read plain annotations
        conv1: Any
        maxpool: Any
        layer1: Any
        layer2: Any
        layer3: Any

    def __init__(
        self,
        blocks_per_stage: int | Sequence[int],
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        channels: tuple[int, int, int] = (16, 32, 64),
        drop_rate: float = 0.0,
        zero_init_last: bool = True,
        block: Any = BasicBlock,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        nn.Module.__init__(self)  # ResNet's own would build four stages
        dd = {'device': device, 'dtype': dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(channels[0], **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity()  # these nets do not pool; the name is the one that timm's ResNet uses
        self.feature_info = [dict(num_chs=channels[0], reduction=1, module='act1')]
        inplanes, reduction = channels[0], 1
        sizes = (blocks_per_stage,) * 3 if isinstance(blocks_per_stage, int) else tuple(blocks_per_stage)
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f'blocks_per_stage must be one number of at least 1 or three, got {blocks_per_stage!r}')
        for name, planes, size in zip(self.stage_names, channels, sizes):
            stride = 1 if name == 'layer1' else 2
            reduction *= stride
            blocks = []
            for index in range(size):
                first = index == 0 and stride > 1
                shortcut = PadShortcut(planes - inplanes, stride) if first else None
                blocks.append(block(inplanes, planes, stride if first else 1, shortcut, **dd))
                inplanes = planes
            setattr(self, name, nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=planes, reduction=reduction, module=name))
        self.num_features = inplanes
        self.global_pool, self.fc = create_classifier(inplanes, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = inplanes * self.global_pool.feat_mult()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            if zero_init_last and isinstance(module, BasicBlock):
                module.zero_init_last()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0 classes for none; `global_pool=''` for no pooling, None for the one that is there."""
        self.num_classes = num_classes
        like, pool = self.conv1.weight, self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pool, device=like.device, dtype=like.dtype
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last wanted feature, and the head; `prune_norm` has no effect."""
        taken, highest = feature_take_indices(1 + len(self.stage_names), indices)
        for name in self.stage_names[highest:]:
            setattr(self, name, nn.Identity())
        if prune_head:
            self.reset_classifier(0, '')
        return taken

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images to the last stage's (N, 64, H/4, W/4)."""
        x = self.maxpool(self.act1(self.bn1(self.conv1(x))))
        return self.layer3(self.layer2(self.layer1(x)))


class StochasticCifarResNet(StochasticDepthNet, CifarResNet):
    """A ResNet of the paper's CIFAR kind, trained with stochastic depth."""

    plain_class = CifarResNet

    def __init__(
        self, blocks_per_stage: int | Sequence[int], drop_path_rate: float | None = None, **kwargs: Any
    ) -> None:
        super().__init__(blocks_per_stage, block=StochasticBasicBlock, drop_path_rate=drop_path_rate, **kwargs)


_DEPTHS = {
    20: 'L = 9 blocks.',
    32: 'L = 15 blocks.',
    44: 'L = 21 blocks.',
    56: 'L = 27 blocks.',
    110: "L = 54 blocks, the paper's CIFAR net.",
    152: "L = 75 blocks, the paper's SVHN net.",
    1202: "L = 600 blocks, the paper's deepest net.",
}

_CFG = dict(
    num_classes=10,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    interpolation='bilinear',
    mean=(0.4914, 0.4822, 0.4465),  # CIFAR-10's, as the standard deviation
    std=(0.2470, 0.2435, 0.2616),
    first_conv='conv1',
    classifier='fc',
    paper_ids='arXiv:1603.09382',
    paper_name='Deep Networks with Stochastic Depth',
    license='apache-2.0',
)

# The untagged configuration stays the default ('*'), of colour images; released weights are asked for by their tag.
default_cfgs = generate_default_cfgs(
    {
        **released(*(f'sd_resnet{depth}_cifar' for depth in _DEPTHS)),
        **{f'sd_resnet{depth}_cifar.*': dict(_CFG) for depth in _DEPTHS},
    }
)

for _depth, _text in _DEPTHS.items():
    _name, _size = f'sd_resnet{_depth}_cifar', (_depth - 2) // 6
    globals()[_name] = entrypoint(
        __name__, StochasticCifarResNet, _name, f'{_depth} layers, {_text}', blocks_per_stage=_size
    )
