"""ResNets for ImageNet: timm's own `ResNet` with blocks that skip, one entrypoint per model.

The pretrained tags name weights on the Hub that were trained with stochastic depth and have the same layout: timm's
"ResNet strikes back" recipes A1 and A2 (drop path 0.05, https://arxiv.org/abs/2110.00476).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from timm.models import (
    PretrainedCfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg_value,
    register_model,
)
from timm.models.resnet import ResNet
from torch import Tensor

from ..core.schedules import Schedule
from .blocks import Stage, StochasticBasicBlock, StochasticBottleneck
from .network import StochasticDepthNet, build
from .packaged import released


class StochasticResNet(StochasticDepthNet, ResNet):
    """timm's ResNet, trained with stochastic depth.

    Args:
        block: `StochasticBasicBlock` or `StochasticBottleneck`.
        layers: Number of blocks of each of the four stages.
        drop_path_rate: 1 - p_L, in [0, 1); None is 0.5 where the schedule needs one.
        drop_path_schedule: See `sd_resnet.survival_probs`.
        drop_path_mode: `'batch'`, `'row'` or `'subset'`; see `sd_resnet.StochasticDepth`.
        drop_path_rescale: `'train'`, timm's, or `'test'`, the paper's letter; see `paper_rescaling`.
        drop_path_sync: In batch mode all ranks of a distributed training drop the same blocks.
        drop_path_ramp: (kind, steps), a rate that changes during training; see `DropPathRamp`.
        **kwargs: What timm's `ResNet` takes.

    Raises:
        ValueError: An argument is outside what is allowed.
    """

    plain_class = ResNet
    stage_names = ('layer1', 'layer2', 'layer3', 'layer4')

    def __init__(
        self,
        block: Any,
        layers: tuple[int, ...],
        drop_path_rate: float | None = None,
        drop_path_schedule: Schedule = 'linear',
        drop_path_mode: str = 'batch',
        drop_path_rescale: str = 'train',
        drop_path_sync: bool = True,
        drop_path_ramp: tuple[str, int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(block, layers, **kwargs)
        for name in self.stage_names:
            setattr(self, name, Stage(*getattr(self, name)))
        self.init_drop_path(
            drop_path_rate, drop_path_schedule, drop_path_mode, drop_path_rescale, drop_path_sync, drop_path_ramp
        )

    def forward_features(self, x: Tensor) -> Tensor:
        """(N, C, H, W) images to the last stage's (N, C', H/32, W/32)."""
        return self.forward_stages(x)[0]


def _cfgs(variant: str) -> dict[str, PretrainedCfg]:
    """Tags of `sd_<variant>`, with the preprocessing that timm's registry holds for the same weights; the first, or
    the untagged one, is the default ('*'), whatever is released here."""
    cfgs = get_arch_pretrained_cfgs(variant)
    tags = [f'{variant}.{tag}' for tag in ('a1_in1k', 'a2_in1k') if f'{variant}.{tag}' in cfgs]
    if not tags:  # no weights trained with stochastic depth
        plain = cfgs[f'{variant}.{get_pretrained_cfg_value(variant, "tag")}']
        return {f'sd_{variant}.*': replace(plain, url='', hf_hub_id=None, tag=None)}
    return {
        f'sd_{name}{"*" * (name == tags[0])}': replace(
            cfgs[name], url='', hf_hub_id=f'timm/{name}', hf_hub_filename='model.safetensors'
        )
        for name in tags
    }


_VARIANTS = (
    *('resnet18', 'resnet34', 'resnet50', 'resnet101', 'resnet152', 'resnet50d', 'resnet101d', 'resnet152d'),
    *('wide_resnet50_2', 'resnext50_32x4d'),
)


default_cfgs = generate_default_cfgs(
    {
        **released(*(f'sd_{variant}' for variant in _VARIANTS)),
        **{name: cfg for variant in _VARIANTS for name, cfg in _cfgs(variant).items()},
    }
)


def _create(variant: str, pretrained: bool, model_args: dict[str, Any], kwargs: dict[str, Any]) -> StochasticResNet:
    return build(StochasticResNet, variant, pretrained, **{**model_args, **kwargs})


@register_model
def sd_resnet18(pretrained: bool = False, **kwargs: Any) -> StochasticResNet:
    """ResNet-18, L = 8 blocks."""
    return _create('sd_resnet18', pretrained, dict(block=StochasticBasicBlock, layers=(2, 2, 2, 2)), kwargs)


@register_model
def sd_resnet34(pretrained: bool = False, **kwargs: Any) -> StochasticResNet:
    """ResNet-34, L = 16 blocks."""
    return _create('sd_resnet34', pretrained, dict(block=StochasticBasicBlock, layers=(3, 4, 6, 3)), kwargs)


@register_model
def sd_resnet50(pretrained: bool = False, **kwargs: Any) -> StochasticResNet:
    """ResNet-50, L = 16 blocks."""
    return _create('sd_resnet50', pretrained, dict(block=StochasticBottleneck, layers=(3, 4, 6, 3)), kwargs)


@register_model
def sd_resnet101(pretrained: bool = False, **kwargs: Any) -> StochasticResNet:
    """ResNet-101, L = 33 blocks."""
    return _create('sd_resnet101', pretrained, dict(block=StochasticBottleneck, layers=(3, 4, 23, 3)), kwargs)


@register_model
def sd_resnet152(pretrained: bool = False, **kwargs: Any) -> StochasticResNet:
    """ResNet-152, L = 50 blocks, the paper's ImageNet net."""
    return _create('sd_resnet152', pretrained, dict(block=StochasticBottleneck, layers=(3, 8, 36, 3)), kwargs)


_D_ARGS = dict(block=StochasticBottleneck, stem_width=32, stem_type='deep', avg_down=True)


@register_model
def sd_resnet50d(pretrained: bool = False, **kwargs: Any) -> StochasticResNet:
    """ResNet-50-D: a deep stem, and average pooling before the projections."""
    return _create('sd_resnet50d', pretrained, dict(_D_ARGS, layers=(3, 4, 6, 3)), kwargs)


@register_model
def sd_resnet101d(pretrained: bool = False, **kwargs: Any) -> StochasticResNet:
    """ResNet-101-D."""
    return _create('sd_resnet101d', pretrained, dict(_D_ARGS, layers=(3, 4, 23, 3)), kwargs)


@register_model
def sd_resnet152d(pretrained: bool = False, **kwargs: Any) -> StochasticResNet:
    """ResNet-152-D."""
    return _create('sd_resnet152d', pretrained, dict(_D_ARGS, layers=(3, 8, 36, 3)), kwargs)


@register_model
def sd_wide_resnet50_2(pretrained: bool = False, **kwargs: Any) -> StochasticResNet:
    """Wide ResNet-50-2: twice the width inside each bottleneck."""
    model_args = dict(block=StochasticBottleneck, layers=(3, 4, 6, 3), base_width=128)
    return _create('sd_wide_resnet50_2', pretrained, model_args, kwargs)


@register_model
def sd_resnext50_32x4d(pretrained: bool = False, **kwargs: Any) -> StochasticResNet:
    """ResNeXt-50 32x4d: 32 groups of 4 channels in the 3x3 convolutions."""
    model_args = dict(block=StochasticBottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create('sd_resnext50_32x4d', pretrained, model_args, kwargs)
