"""ResNets for ImageNet: timm's own `ResNet` with blocks that skip, one entrypoint per model.

Every architecture that the installed timm builds of its class with its own blocks, with all of timm's tags. The default
tag is one that was trained with stochastic depth, by the "ResNet strikes back" recipes A1, else A2 (drop path 0.05,
https://arxiv.org/abs/2110.00476); where there is none, timm's own default.
"""

from copy import copy
from typing import Any

from timm.models import generate_default_cfgs, get_arch_pretrained_cfgs, get_pretrained_cfg_value, is_model, list_models
from timm.models.resnet import ResNet

from .architectures import blocks_of, recorded
from .blocks import StochasticBasicBlock, StochasticBottleneck
from .network import StochasticDepthNet
from .packaged import entrypoint, released


class StochasticResNet(StochasticDepthNet, ResNet):
    """timm's ResNet, of `StochasticBasicBlock` or `StochasticBottleneck`, trained with stochastic depth."""

    plain_class = ResNet
    stage_names = ('layer1', 'layer2', 'layer3', 'layer4')

    def __init__(self, block: Any, layers: Any, drop_path_rate: float | None = None, **kwargs: Any) -> None:
        super().__init__(block, layers, drop_path_rate=drop_path_rate, **kwargs)


ARCHITECTURES: dict[str, dict[str, Any]] = {}  # by timm's name what builds it

default_cfgs: dict[str, Any] = {}

_OWN = {block.plain_class: block for block in (StochasticBasicBlock, StochasticBottleneck)}
_TRAINED_WITH_IT = ('a1_in1k', 'a2_in1k')


def register_architecture(name: str) -> bool:
    """Register timm's model `name`, without tag, as `sd_<name>`, if it is a `ResNet` of timm's own blocks.

    It may be anybody's that is registered with timm. All of its tags come with it.

    Returns:
        Is `sd_<name>` a network of this module now? False where the entrypoint builds something else, or does more than
        to build, and where the name is taken.
    """
    if name in ARCHITECTURES or is_model(f'sd_{name}'):
        return name in ARCHITECTURES
    args = recorded(name)
    if args is None:
        return False
    blocks = tuple(_OWN[block] for block in blocks_of(args))
    ARCHITECTURES[name] = {**args, 'block': blocks if len(blocks) > 1 else blocks[0]}
    default_cfgs.update(generate_default_cfgs(_cfgs(name)))
    text = f"timm's `{name}`, L = {sum(args['layers'])} blocks, with stochastic depth."
    globals()[f'sd_{name}'] = entrypoint(__name__, StochasticResNet, f'sd_{name}', text, **ARCHITECTURES[name])
    return True


def _cfgs(name: str) -> dict[str, Any]:
    """What is released here, and all of timm's tags, the default marked; what timm has on the Hub comes from there."""
    cfgs = get_arch_pretrained_cfgs(name)
    tags = [f'{name}.{tag}' for tag in (*_TRAINED_WITH_IT, get_pretrained_cfg_value(name, 'tag'))]
    default = next((tag for tag in tags if tag in cfgs), name)
    found: dict[str, Any] = {tag: cfg for tag, cfg in _RELEASED.items() if tag.startswith(f'sd_{name}.')}
    for tag, cfg in cfgs.items():
        mark = '' if tag != default else '*' if '.' in tag else '.*'
        found[f'sd_{tag}{mark}'] = cfg
        if cfg.hf_hub_id == f'timm/{tag}':
            found[f'sd_{tag}{mark}'] = cfg = copy(cfg)
            cfg.url, cfg.hf_hub_filename = '', 'model.safetensors'
    return found


_NAMES = list_models(module='resnet')
_RELEASED = released(*(f'sd_{name}' for name in _NAMES))

for _name in _NAMES:
    register_architecture(_name)
