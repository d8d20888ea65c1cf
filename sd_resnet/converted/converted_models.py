"""timm's own models under `sd_` names, converted: for timm's scripts, with timm's pretrained tags."""

from collections.abc import Callable
from typing import Any

from timm import models

from ..core.schedules import survival_probs
from .convert import convert, own_input_size

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
    """Register timm's model `name`, without tag, as `sd_<name>`, the new name, with blocks that skip what they drop.

    All of its tags come with it. The entrypoint takes what timm's takes, with `drop_path_rate` (`--drop-path`), timm's
    own default, mostly 0, if not given; and `drop_path_schedule`, `drop_path_mode`, `drop_path_sync` and
    `drop_path_ramp`: see `convert`.

    Raises:
        ValueError: timm has no such model, or this package has its own.
    """
    if not isinstance(name, str) or name.startswith('sd_') or '.' in name or not models.is_model(name):
        raise ValueError(f'name must be a model of timm, without tag, for example vit_tiny_patch16_224, got {name!r}')
    if not models.is_model(f'sd_{name}'):
        cfgs = models.get_arch_pretrained_cfgs(name)  # they name timm's repositories in full
        first = models.get_pretrained_cfg_value(name, 'tag')
        tags = sorted(cfgs, key=lambda tag: tag != (f'{name}.{first}' if first else name))  # the default tag first
        default_cfgs.update(models.generate_default_cfgs({f'sd_{tag}': cfgs[tag] for tag in tags}))
        models.register_model(_entrypoint(name))
    elif not models.is_model_in_modules(f'sd_{name}', ('converted_models',)):
        raise ValueError(f'name must be one that sd_resnet has no network of its own for, got {name!r}: use sd_{name}')
    return f'sd_{name}'


def _entrypoint(name: str) -> Callable[..., Any]:
    create = models.model_entrypoint(name)

    def entrypoint(pretrained: bool = False, drop_path_rate: float | None = None, **kwargs: Any) -> Any:
        given = [option for option in ('schedule', 'mode', 'sync', 'ramp') if f'drop_path_{option}' in kwargs]
        options = {option: kwargs.pop(f'drop_path_{option}') for option in given}
        if drop_path_rate is not None:
            survival_probs(1, drop_path_rate)  # checks it
            kwargs['drop_path_rate'] = drop_path_rate
        model = create(pretrained=pretrained, **kwargs)
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'architecture': f'sd_{name}'}
        rate = None if options.get('schedule', 'timm') == 'timm' else drop_path_rate
        convert(model, rate, input_size=own_input_size(model, kwargs), **options)
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = f'sd_{name}'
    entrypoint.__doc__ = f"timm's `{name}` with blocks that skip what they drop; see `register`."
    return entrypoint


for _name in NAMES:
    register(_name)
