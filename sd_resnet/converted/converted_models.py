"""timm's own models under `sd_` names, converted: for timm's scripts, with timm's pretrained tags.

`names.txt` lists those that have a drop path and convert; `python -m docs.coverage` writes it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from timm import models

from ..core.schedules import survival_probs
from ..resnets.resnet_imagenet import register_architecture
from .convert import convert, own_input_size
from .private_api import pretrained_cfgs
from .published_rates import published
from .trial import find_slots

NAMES = Path(__file__).with_name('names.txt')
_OPTIONS = ('schedule', 'mode', 'sync', 'ramp')

default_cfgs: dict[str, Any] = {}  # where timm looks for them


def register(name: str) -> str:
    """Register a model of timm as `sd_<name>`, with blocks that skip what they drop.

    All of its tags come with it. timm's `ResNet` gets this package's own blocks: see `StochasticResNet`. Of any other
    the entrypoint takes what timm's takes, with `drop_path_rate` (`--drop-path`), by default what the architecture was
    published with, else 0.1: see `published`. And `drop_path_schedule`, `drop_path_mode`, `drop_path_sync` and
    `drop_path_ramp`: see `convert`.

    Args:
        name: Of a model that is registered with timm, a third party's too, without tag.

    Returns:
        The new name.

    Raises:
        ValueError: timm has no such model, or this package has its own.
    """
    if not isinstance(name, str) or name.startswith('sd_') or '.' in name or not models.is_model(name):
        raise ValueError(f'name must be a model of timm, without tag, for example vit_tiny_patch16_224, got {name!r}')
    if not models.is_model(f'sd_{name}'):
        if not register_architecture(name):
            _register(name)
    elif not models.is_model_in_modules(f'sd_{name}', ('converted_models',)):
        raise ValueError(f'name must be one that sd_resnet has no network of its own for, got {name!r}: use sd_{name}')
    return f'sd_{name}'


def _register(name: str) -> None:
    default_cfgs[f'sd_{name}'] = pretrained_cfgs(name)
    models.register_model(_entrypoint(name))


def _entrypoint(name: str) -> Callable[..., Any]:
    def entrypoint(pretrained: bool = False, drop_path_rate: float | None = None, **kwargs: Any) -> Any:
        options = {each: kwargs.pop(f'drop_path_{each}') for each in _OPTIONS if f'drop_path_{each}' in kwargs}
        schedule = options.get('schedule', 'timm')
        if drop_path_rate is None and isinstance(schedule, str):
            drop_path_rate = published(name).rate
        if drop_path_rate is not None:
            survival_probs(1, drop_path_rate)  # checks it
            kwargs['drop_path_rate'] = drop_path_rate
        try:
            model = models.model_entrypoint(name)(pretrained=pretrained, **kwargs)
        except TypeError as error:
            if 'drop_path_rate' not in str(error):
                raise
            del kwargs['drop_path_rate']
            model = models.model_entrypoint(name)(pretrained=pretrained, **kwargs)
            if not any(find_slots(model)):  # else a network that has drop paths, and no argument for them
                raise
        if getattr(model, 'pretrained_cfg', None):  # a third party's may have none
            model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, 'architecture': f'sd_{name}'}
        # Its own rule has built the rates, but for some that earlier versions of timm forgot
        built = schedule == 'timm' and any(slot.rate for slot in find_slots(model))
        convert(model, None if built else drop_path_rate, input_size=own_input_size(model, kwargs), **options)
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = f'sd_{name}'
    entrypoint.__doc__ = "One of timm's models, with blocks that skip what they drop; see `register`."
    return entrypoint


for _name in NAMES.read_text(encoding='utf-8').split():
    if models.is_model(_name) and not models.is_model(f'sd_{_name}'):
        _register(_name)
