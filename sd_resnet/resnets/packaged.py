"""How the package's models come to timm, with the weights that it brings: a folder `<architecture>.<tag>` each.

It is laid out like a Hub repository: `timm.create_model('sd_resnet32_cifar.fmnist', pretrained=True)` reads it.
"""

import inspect
import json
from functools import partial
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg, adapt_input_conv, build_model_with_cfg, get_pretrained_cfg_value, register_model
from torch import Tensor, nn

from ..core.private_api import adapt_model_from_file
from .stages import StochasticFeatures

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'

# Later versions of timm spread a stem of any number of channels; earlier ones take every stem for one of three.
_TIMM_SPREADS = 'base_chans' in inspect.signature(adapt_input_conv).parameters


def weights_folder() -> Path | None:
    """In an installed package inside it, in a checkout beside it; an editable install's copy is not looked at."""
    package = Path(__file__).parents[1]
    for folder in (package / 'weights', package.parent / 'weights'):
        if folder.is_dir():
            return folder
    return None


def released_folders(folder: Path) -> dict[str, Path]:
    """Those of a folder of weights that are complete, by `<architecture>.<tag>`; one that is being written is not."""
    return {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.name.count('.') == 1 and (path / WEIGHTS).is_file() and (path / CONFIG).is_file()
    }


def released(*architectures: str) -> dict[str, PretrainedCfg]:
    """Pretrained configurations of these architectures, read from the folders, by `<architecture>.<tag>`."""
    folder = weights_folder()
    found = {}
    for name, path in released_folders(folder).items() if folder else ():
        if name.split('.')[0] in architectures:
            config = json.loads((path / CONFIG).read_text(encoding='utf-8'))['pretrained_cfg']
            own = {key: value for key, value in config.items() if key not in ('tag', 'hf_hub_filename')}
            found[name] = PretrainedCfg(**{**own, 'file': str(path / WEIGHTS)})
    return found


def entrypoint(module: str, model_cls: Any, name: str, text: str, **own: Any) -> Any:
    """Register model `name` with timm, under the module of that `__name__`, which holds its `default_cfgs`.

    `text` is the entrypoint's docstring; `own` are arguments of the network, which the entrypoint's may replace.
    """

    def create(pretrained: bool = False, **kwargs: Any) -> Any:
        return build(model_cls, name, pretrained, **{**own, **kwargs})

    create.__module__, create.__name__, create.__qualname__, create.__doc__ = module, name, name, text
    return register_model(create)


def build(model_cls: Any, variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's builder; where pretrained weights cannot be had, its error with one line on what to do."""
    features = dict(feature_cls=StochasticFeatures, out_indices=tuple(range(1 + len(model_cls.stage_names))))
    features.update(kwargs.pop('feature_cfg', None) or {})
    create = partial(_pruned, model_cls, variant) if kwargs.pop('pruned', False) else model_cls
    try:
        return build_model_with_cfg(
            create, variant, pretrained, feature_cfg=features, pretrained_filter_fn=spread_stem, **kwargs
        )
    except OSError as error:
        if pretrained:
            advice = (
                f'{variant}: the pretrained weights are not in the cache and could not be downloaded. Connect to the '
                'Hugging Face Hub once, or point HF_HOME to a filled cache, or name a local file with '
                "pretrained_cfg_overlay={'file': PATH}, or pass pretrained=False."
            )
            error.args = (f'{error}\n{advice}',) if len(error.args) < 2 else error.args
        raise


def _pruned(model_cls: Any, variant: str, **kwargs: Any) -> Any:
    """timm keeps the widths under its own name of the architecture, where its builder would not look."""
    model = model_cls(**kwargs)
    name = variant.removeprefix('sd_')
    model.pretrained_cfg = {'first_conv': get_pretrained_cfg_value(name, 'first_conv')}  # whose input stays as it is
    return adapt_model_from_file(model, name)


def spread_stem(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """For versions of timm that cannot: a stem of one channel for three, of which timm makes any other number.

    By the rule of those that can: repeated, and divided by three, so that a grey image gives what it gave.
    """
    config: Any = model.pretrained_cfg
    name: Any = (config or {}).get('first_conv')
    weight = state_dict.get(f'{name}.weight')
    if _TIMM_SPREADS or weight is None or weight.shape[1] != 1 or model.get_submodule(name).in_channels == 1:
        return state_dict
    return {**state_dict, f'{name}.weight': (weight.float() / 3).repeat(1, 3, 1, 1)}
