"""ResNets for ImageNet: timm's own `ResNet` with blocks that skip, one entrypoint per model.

The pretrained tags name weights on the Hub that were trained with stochastic depth and have the same layout: timm's
"ResNet strikes back" recipes A1 and A2 (drop path 0.05, https://arxiv.org/abs/2110.00476).
"""

from dataclasses import replace
from typing import Any

from timm.models import PretrainedCfg, generate_default_cfgs, get_arch_pretrained_cfgs, get_pretrained_cfg_value
from timm.models.resnet import ResNet

from .blocks import StochasticBasicBlock, StochasticBottleneck
from .network import StochasticDepthNet
from .packaged import entrypoint, released


class StochasticResNet(StochasticDepthNet, ResNet):
    """timm's ResNet, of `StochasticBasicBlock` or `StochasticBottleneck`, trained with stochastic depth."""

    plain_class = ResNet
    stage_names = ('layer1', 'layer2', 'layer3', 'layer4')

    def __init__(self, block: Any, layers: Any, drop_path_rate: float | None = None, **kwargs: Any) -> None:
        super().__init__(block, layers, drop_path_rate=drop_path_rate, **kwargs)


_BASIC: dict[str, Any] = dict(block=StochasticBasicBlock)
_BOTTLENECK: dict[str, Any] = dict(block=StochasticBottleneck)
_D: dict[str, Any] = dict(_BOTTLENECK, stem_width=32, stem_type='deep', avg_down=True)

# Of each model of timm what it is, and what builds it
_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    'resnet18': ('ResNet-18, L = 8 blocks.', dict(_BASIC, layers=(2, 2, 2, 2))),
    'resnet34': ('ResNet-34, L = 16 blocks.', dict(_BASIC, layers=(3, 4, 6, 3))),
    'resnet50': ('ResNet-50, L = 16 blocks.', dict(_BOTTLENECK, layers=(3, 4, 6, 3))),
    'resnet101': ('ResNet-101, L = 33 blocks.', dict(_BOTTLENECK, layers=(3, 4, 23, 3))),
    'resnet152': ("ResNet-152, L = 50 blocks, the paper's ImageNet net.", dict(_BOTTLENECK, layers=(3, 8, 36, 3))),
    'resnet50d': ('ResNet-50-D: a deep stem, average pooling before the projections.', dict(_D, layers=(3, 4, 6, 3))),
    'resnet101d': ('ResNet-101-D.', dict(_D, layers=(3, 4, 23, 3))),
    'resnet152d': ('ResNet-152-D.', dict(_D, layers=(3, 8, 36, 3))),
    'wide_resnet50_2': (
        'Wide ResNet-50-2: twice the width inside each bottleneck.',
        dict(_BOTTLENECK, layers=(3, 4, 6, 3), base_width=128),
    ),
    'resnext50_32x4d': (
        'ResNeXt-50 32x4d: 32 groups of 4 channels in the 3x3 convolutions.',
        dict(_BOTTLENECK, layers=(3, 4, 6, 3), cardinality=32, base_width=4),
    ),
}


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


default_cfgs = generate_default_cfgs(
    {
        **released(*(f'sd_{variant}' for variant in _VARIANTS)),
        **{name: cfg for variant in _VARIANTS for name, cfg in _cfgs(variant).items()},
    }
)


for _name, (_text, _args) in _VARIANTS.items():
    globals()[f'sd_{_name}'] = entrypoint(__name__, StochasticResNet, f'sd_{_name}', _text, **_args)
