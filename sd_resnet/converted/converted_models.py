"""timm's own models under `sd_` names, converted: for timm's scripts, with timm's pretrained tags."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from timm.models import (
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg_value,
    is_model,
    is_model_in_modules,
    model_entrypoint,
    register_model,
)

from ..core.schedules import Schedule, survival_probs
from .convert import convert

NAMES = (
    *(f'vit_{size}_patch16_224' for size in ('tiny', 'small', 'base', 'large')),
    *(f'deit3_{size}_patch16_224' for size in ('small', 'medium', 'base', 'large')),
    *(f'convnext_{size}' for size in ('atto', 'femto', 'pico', 'nano', 'tiny', 'small', 'base', 'large')),
    *(f'convnextv2_{size}' for size in ('atto', 'femto', 'pico', 'nano', 'tiny', 'base', 'large')),
    *(f'swin_{size}_patch4_window7_224' for size in ('tiny', 'small', 'base', 'large')),
    *(f'swinv2_{size}_window8_256' for size in ('tiny', 'small', 'base')),
    *(f'caformer_{size}' for size in ('s18', 's36', 'm36', 'b36')),
    *(f'poolformerv2_{size}' for size in ('s12', 's24', 's36', 'm36', 'm48')),
    *(f'resnetv2_{size}' for size in ('18', '34', '50', '101', '152')),
    *(f'tf_efficientnetv2_{size}' for size in ('b0', 'b1', 'b2', 'b3', 's', 'm', 'l')),
)

default_cfgs: dict[str, Any] = {}


def register(name: str) -> str:
    """Register `sd_<name>`, timm's model `name` with blocks that skip what they drop, with all of its tags.

    The entrypoint takes what timm's takes, and

    * `drop_path_rate` (`--drop-path`): the highest 1 - p_l, in [0, 1); timm's own default, mostly 0, if not given
    * `drop_path_schedule`: `'timm'`, the network's own rule, or see `survival_probs`
    * `drop_path_mode`: `'subset'`, `'batch'` or `'row'`
    * `drop_path_sync`: in batch mode all ranks of a distributed training drop the same blocks
    * `drop_path_ramp`: (kind, steps), a rate that changes during training; see `DropPathRamp`

    Args:
        name: A model of timm, without tag.

    Returns:
        The new name.

    Raises:
        ValueError: timm has no such model, or this package has its own.
    """
    if not isinstance(name, str) or name.startswith('sd_') or '.' in name or not is_model(name):
        raise ValueError(f'name must be a model of timm, without tag, for example vit_tiny_patch16_224, got {name!r}')
    if not is_model(f'sd_{name}'):
        default_cfgs.update(_cfgs(name))
        register_model(_entrypoint(name))
    elif not is_model_in_modules(f'sd_{name}', ('converted_models',)):
        raise ValueError(
            f'name must be a model that sd_resnet has no network of its own for, got {name!r}: use sd_{name} as it is, '
            f'or sd_resnet.convert(model)'
        )
    return f'sd_{name}'


def _cfgs(name: str) -> dict[str, Any]:
    """Tags of `sd_<name>`: timm's own, whose repositories are named in full."""
    cfgs = get_arch_pretrained_cfgs(name)
    first = get_pretrained_cfg_value(name, 'tag')
    tags = sorted(cfgs, key=lambda tag: tag != (f'{name}.{first}' if first else name))  # the default tag first
    return generate_default_cfgs({f'sd_{tag}': cfgs[tag] for tag in tags})


def _entrypoint(name: str) -> Callable[..., Any]:
    create = model_entrypoint(name)

    def entrypoint(
        pretrained: bool = False,
        drop_path_rate: float | None = None,
        drop_path_schedule: Schedule = 'timm',
        drop_path_mode: str = 'subset',
        drop_path_sync: bool = True,
        drop_path_ramp: tuple[str, int] | None = None,
        **kwargs: Any,
    ) -> Any:
        if drop_path_rate is not None:
            survival_probs(1, drop_path_rate)  # checks it
            kwargs['drop_path_rate'] = drop_path_rate
        model = create(pretrained=pretrained, **kwargs)
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'architecture': f'sd_{name}'}
        rate = None if drop_path_schedule == 'timm' else drop_path_rate
        size = _input_size(model.pretrained_cfg, kwargs)
        convert(model, rate, drop_path_schedule, drop_path_mode, drop_path_sync, drop_path_ramp, size)
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = f'sd_{name}'
    entrypoint.__doc__ = f"timm's `{name}` with blocks that skip what they drop; see `register`."
    return entrypoint


def _input_size(config: dict[str, Any], kwargs: dict[str, Any]) -> tuple[int, int, int]:
    channels, *size = config['input_size']
    own = kwargs.get('img_size') or size
    height, width = (own, own) if isinstance(own, int) else own
    return kwargs.get('in_chans') or channels, height, width


for _name in NAMES:
    register(_name)
