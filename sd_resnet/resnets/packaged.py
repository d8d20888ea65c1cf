"""The weights that come with the package: one folder `<architecture>.<tag>` each, laid out like a Hub repository.

A folder is a tag: `timm.create_model('sd_resnet32_cifar.fmnist', pretrained=True)` reads it, without a network.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from timm.models import PretrainedCfg
from timm.models import adapt_input_conv as timm_adapt_input_conv
from torch import Tensor, nn

WEIGHTS, CONFIG = 'model.safetensors', 'config.json'

# Later versions of timm spread a stem of any number of channels; earlier ones take every stem for one of three.
_TIMM_SPREADS = 'base_chans' in inspect.signature(timm_adapt_input_conv).parameters


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
    """Pretrained configurations, read from the folders, by `<architecture>.<tag>`.

    Args:
        architectures: Whose.
    """
    folder = weights_folder()
    found = {}
    for name, path in released_folders(folder).items() if folder else ():
        if name.split('.')[0] in architectures:
            config = json.loads((path / CONFIG).read_text(encoding='utf-8'))
            own = {
                key: value for key, value in config['pretrained_cfg'].items() if key not in ('tag', 'hf_hub_filename')
            }
            found[name] = PretrainedCfg(**{**own, 'file': str(path / WEIGHTS)})
    return found


def spread_stem(state_dict: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """For versions of timm that cannot: bring a stem of one channel to three, of which timm makes any other number.

    The same rule as theirs: the channels repeated, and divided by their number, so that a grey image in three channels
    gives what it gave in one.

    Args:
        state_dict: About to be loaded.
        model: That takes it.
    """
    config: Any = model.pretrained_cfg
    name: Any = (config or {}).get('first_conv')
    weight = state_dict.get(f'{name}.weight')
    if _TIMM_SPREADS or weight is None or weight.shape[1] != 1 or model.get_submodule(name).in_channels == 1:
        return state_dict
    return {**state_dict, f'{name}.weight': (weight.float() / 3).repeat(1, 3, 1, 1)}
