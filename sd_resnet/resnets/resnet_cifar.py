"""The paper's ResNets for CIFAR and SVHN: depth 6n + 2, three stages of n basic blocks, parameter-free shortcuts.

Huang et al., section 4; the nets are those of He et al. (https://arxiv.org/abs/1512.03385), section 4.2.
"""

# No postponed annotations here: torch.fx copies forward's into the code that it writes.
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from ..core.private_api import feature_take_indices
from ..core.schedules import Schedule
from .blocks import Stage, StochasticBasicBlock
from .network import StochasticDepthNet, build
from .packaged import released


class PadShortcut(nn.Module):
    """Shortcut where the shape changes, without parameters: average-pool by the stride, zero-pad the channels.

    Args:
        channels: Number of channels to add.
        stride: Stride of the block.
    """

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels = channels
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + channels, ceil(H/stride), ceil(W/stride))."""
        x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, (0, 0, 0, 0, 0, self.channels))


class CifarResNet(nn.Module):
    """A ResNet of the paper's CIFAR kind, with timm's model interface and without stochastic depth.

    Args:
        blocks_per_stage: n; the network has L = 3n blocks and 6n + 2 layers. Or one number for each stage.
        num_classes: Size of the classifier, 0 for none.
        in_chans: Number of channels of the images.
        global_pool: timm's pooling type.
        channels: Width of each stage.
        drop_rate: Dropout before the classifier.
        zero_init_last: Start with branches that return zero, as timm's ResNet does.
        block: The residual blocks' class.
        stage: The stages' class.
        device: Device of the parameters.
        dtype: Type of the parameters.

    Raises:
        ValueError: `blocks_per_stage` is not allowed.
    """

    stage_names: tuple[str, ...] = ('layer1', 'layer2', 'layer3')

    if TYPE_CHECKING:  # TorchScript would read plain annotations
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
        stage: Any = nn.Sequential,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
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
            setattr(self, name, stage(*blocks))
            self.feature_info.append(dict(num_chs=planes, reduction=reduction, module=name))

        self.num_features = inplanes
        self.global_pool: Any
        self.fc: Any
        self.global_pool, self.fc = create_classifier(inplanes, num_classes, pool_type=global_pool, **dd)

        self.head_hidden_size = inplanes * self.global_pool.feat_mult()

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        if zero_init_last:
            for module in self.modules():
                if isinstance(module, BasicBlock):
                    module.zero_init_last()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Parameter groups for layer-wise learning rates: by stage, or by block."""
        return dict(stem=r'^conv1|bn1|maxpool', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """The classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier; 0 classes for none; `global_pool=''` for no pooling, None for the one that is there."""
        self.num_classes = num_classes
        weight = self.conv1.weight
        self.global_pool, self.fc = create_classifier(
            self.num_features,
            num_classes,
            pool_type=self.global_pool.pool_type if global_pool is None else global_pool,
            device=weight.device,
            dtype=weight.dtype,
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

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits (N, num_classes), or to what the classifier is given."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images to logits (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


class StochasticCifarResNet(StochasticDepthNet, CifarResNet):
    """A ResNet of the paper's CIFAR kind, trained with stochastic depth.

    Args:
        blocks_per_stage: See `CifarResNet`.
        drop_path_rate: 1 - p_L, in [0, 1); None is 0.5 where the schedule needs one.
        drop_path_schedule: See `sd_resnet.survival_probs`.
        drop_path_mode: `'batch'`, `'row'` or `'subset'`; see `sd_resnet.StochasticDepth`.
        drop_path_rescale: `'train'`, timm's, or `'test'`, the paper's letter; see `paper_rescaling`.
        drop_path_sync: In batch mode all ranks of a distributed training drop the same blocks.
        drop_path_ramp: (kind, steps), a rate that changes during training; see `DropPathRamp`.
        **kwargs: What `CifarResNet` takes.

    Raises:
        ValueError: An argument is outside what is allowed.
    """

    plain_class = CifarResNet

    def __init__(
        self,
        blocks_per_stage: int | Sequence[int],
        drop_path_rate: float | None = None,
        drop_path_schedule: Schedule = 'linear',
        drop_path_mode: str = 'batch',
        drop_path_rescale: str = 'train',
        drop_path_sync: bool = True,
        drop_path_ramp: tuple[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(blocks_per_stage, block=StochasticBasicBlock, stage=Stage, **kwargs)
        self.init_drop_path(
            drop_path_rate, drop_path_schedule, drop_path_mode, drop_path_rescale, drop_path_sync, drop_path_ramp
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images to the last stage's (N, 64, H/4, W/4)."""
        return self.forward_stages(x)[0]


def _cfg(**kwargs: Any) -> dict[str, Any]:
    """Channel means and standard deviations are CIFAR-10's; a pad-4 crop is the paper's augmentation."""
    return {
        'num_classes': 10,
        'input_size': (3, 32, 32),
        'pool_size': (8, 8),
        'crop_pct': 1.0,
        'interpolation': 'bilinear',
        'mean': (0.4914, 0.4822, 0.4465),
        'std': (0.2470, 0.2435, 0.2616),
        'first_conv': 'conv1',
        'classifier': 'fc',
        'paper_ids': 'arXiv:1603.09382',
        'paper_name': 'Deep Networks with Stochastic Depth',
        'license': 'apache-2.0',
        **kwargs,
    }


# The untagged configuration stays the default ('*'), of colour images; released weights are asked for by their tag.
default_cfgs = generate_default_cfgs(
    {
        **released(*(f'sd_resnet{depth}_cifar' for depth in (20, 32, 44, 56, 110, 152, 1202))),
        'sd_resnet20_cifar.*': _cfg(),
        'sd_resnet32_cifar.*': _cfg(),
        'sd_resnet44_cifar.*': _cfg(),
        'sd_resnet56_cifar.*': _cfg(),
        'sd_resnet110_cifar.*': _cfg(),
        'sd_resnet152_cifar.*': _cfg(),
        'sd_resnet1202_cifar.*': _cfg(),
    }
)


def _create(variant: str, pretrained: bool, depth: int, kwargs: dict[str, Any]) -> StochasticCifarResNet:
    return build(StochasticCifarResNet, variant, pretrained, **{'blocks_per_stage': (depth - 2) // 6, **kwargs})


@register_model
def sd_resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> StochasticCifarResNet:
    """20 layers, L = 9 blocks."""
    return _create('sd_resnet20_cifar', pretrained, 20, kwargs)


@register_model
def sd_resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> StochasticCifarResNet:
    """32 layers, L = 15 blocks."""
    return _create('sd_resnet32_cifar', pretrained, 32, kwargs)


@register_model
def sd_resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> StochasticCifarResNet:
    """44 layers, L = 21 blocks."""
    return _create('sd_resnet44_cifar', pretrained, 44, kwargs)


@register_model
def sd_resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> StochasticCifarResNet:
    """56 layers, L = 27 blocks."""
    return _create('sd_resnet56_cifar', pretrained, 56, kwargs)


@register_model
def sd_resnet110_cifar(pretrained: bool = False, **kwargs: Any) -> StochasticCifarResNet:
    """110 layers, L = 54 blocks, the paper's CIFAR net."""
    return _create('sd_resnet110_cifar', pretrained, 110, kwargs)


@register_model
def sd_resnet152_cifar(pretrained: bool = False, **kwargs: Any) -> StochasticCifarResNet:
    """152 layers, L = 75 blocks, the paper's SVHN net."""
    return _create('sd_resnet152_cifar', pretrained, 152, kwargs)


@register_model
def sd_resnet1202_cifar(pretrained: bool = False, **kwargs: Any) -> StochasticCifarResNet:
    """1202 layers, L = 600 blocks, the paper's deepest net."""
    return _create('sd_resnet1202_cifar', pretrained, 1202, kwargs)
