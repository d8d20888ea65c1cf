"""What is known of a training run: arguments, metrics and weights, as timm's `train.py` leaves them in a folder."""

import csv
import math
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import timm
import yaml
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model_in_modules, parse_model_name
from timm.utils.misc import natural_key
from torch import nn

from ..errors import one_line
from ..resnets.checkpoints import Checkpoint, build, read_checkpoint
from .networks import check_name, network_of

# The model's arguments beside `model_kwargs`, by the names that timm's script has for them.
_MODEL_ARGS = dict(drop='drop_rate', drop_path='drop_path_rate', drop_block='drop_block_rate', gp='global_pool')
_MODEL_ARGS |= dict(bn_momentum='bn_momentum', bn_eps='bn_eps')


@dataclass
class Run:
    """A training run and the checkpoint that was chosen from it."""

    name: str  # the model's, as timm was asked for it: an architecture, with a tag, or a source as `hf-hub:USER/NAME`
    args: dict[str, Any]  # `args.yaml`, absolute paths cut down to their last part
    epochs: list[dict[str, float]]  # `summary.csv`, one entry per epoch; empty where there is none
    checkpoint: Checkpoint  # the weights
    file: str  # the checkpoint's file name
    metrics: dict[str, float]  # of the checkpoint's epoch; empty where the weights are not the measured ones
    label_names: list[str] | None  # the classes in order, if they are known

    @property
    def model_args(self) -> dict[str, Any]:
        """What timm was given to build the model, but for channels and classes, which the weights tell, and a ramp of
        the drop path, which ends with the training."""
        given = {name: self.args[key] for key, name in _MODEL_ARGS.items() if self.args.get(key) is not None}
        args = {**(self.args.get('model_kwargs') or {}), **given}
        return {key: value for key, value in args.items() if key != 'drop_path_ramp'}

    @property
    def base_model(self) -> str | None:
        """The repository of the Hub whose weights the training started from, if it is known."""
        if not self.args.get('pretrained') or self.args.get('pretrained_path'):
            return None
        source, name = parse_model_name(self.name)
        if source == 'hf-hub':
            return name.split('@')[0]
        return None if source else getattr(get_pretrained_cfg(name), 'hf_hub_id', None)

    @property
    def converted(self) -> bool:
        """Is it one of timm's models under a `sd_` name?"""
        return is_model_in_modules(self.name, ('converted_models',))

    def model(self) -> nn.Module:
        """The trained network, in evaluation mode, with the run's preprocessing as its configuration.

        A TypeError where it is not of this package, a ValueError where weights and arguments do not belong together.
        """
        state_dict = {k: v for k, v in self.checkpoint.state_dict.items() if '.aux_bn.' not in k}  # of split-bn
        if self.converted:
            in_chans = self.args.get('in_chans') or (self.args.get('input_size') or [None])[0]
            given = {'num_classes': self.args.get('num_classes'), 'in_chans': in_chans, **self.model_args}
            model: Any = timm.create_model(self.name, **given)
        else:
            model = build(self.name, state_dict, self.model_args)
        network_of(model)
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            reason = one_line(error)
            raise ValueError(f'{self.file} does not fit the model of args.yaml, {self.name}: {reason}') from error
        # Nothing else of the architecture's own configuration is true of these weights: neither its source nor licence.
        kept = ('architecture', 'first_conv', 'classifier', 'fixed_input_size')
        own = {key: model.pretrained_cfg[key] for key in kept if model.pretrained_cfg.get(key)}
        data = resolve_data_config(self.args, model=model)
        if not self.converted:  # height and width of the features, as timm's configurations state them
            reduction = model.feature_info[-1]['reduction']
            own['pool_size'] = tuple(math.ceil(side / reduction) for side in data['input_size'][1:])
        model.pretrained_cfg = model.default_cfg = {**own, **data, 'num_classes': model.num_classes}
        return model.eval()


def read_run(folder: Path, checkpoint: str | None = None, use_ema: bool = True) -> Run:
    """Read a run folder of timm's `train.py`, or of `sd-resnet quickstart`: `args.yaml`, `summary.csv`, checkpoints.

    `checkpoint` is a file name in it (`last` and `checkpoint-9` will do for timm's), or any path; None takes
    `model_best.pth.tar`, else `last.pth.tar`, and `use_ema` the averaged weights where there are any.

    Raises:
        FileNotFoundError: The arguments or the checkpoint are missing.
        ValueError: A file is damaged, or the run trained a model that is not of this package.
    """
    file = folder / 'args.yaml'
    if not file.is_file():
        raise FileNotFoundError(f"{folder} holds no args.yaml: a run folder is what timm's train.py writes")
    try:
        args: Any = yaml.safe_load(file.read_text(encoding='utf-8'))
        if not isinstance(args, dict):
            raise ValueError(f'it must hold names and values, got {type(args).__name__}')
        name = str(args.get('model'))
        check_name(name)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{file} is not YAML: {one_line(error)}') from error
    except ValueError as error:
        raise ValueError(f'{file}: {error}') from error
    path = _checkpoint_path(folder, checkpoint)
    read, epochs = read_checkpoint(path, use_ema), _read_epochs(folder / 'summary.csv')
    # With an average, timm's script measures the average (unless it is kept on the CPU), and not the raw weights.
    measures_average = bool(args.get('model_ema')) and not args.get('model_ema_force_cpu')
    measured = [epoch for epoch in epochs if read.averaged == measures_average and epoch['epoch'] == read.epoch]
    metrics = {key: value for epoch in measured for key, value in epoch.items() if key.startswith('eval_')}
    return Run(name, _without_folders(args), epochs, read, path.name, metrics, _label_names(args))


def _read_epochs(path: Path) -> list[dict[str, float]]:
    """Rows of numbers. A resumed run writes its own header, and repeats epochs: the last one counts."""
    header: list[str] = []
    epochs: dict[float, dict[str, float]] = {}
    lines = path.read_text(encoding='utf-8').splitlines() if path.is_file() else []
    for line, row in enumerate(csv.reader(lines), start=1):
        if 'epoch' in row:
            header = row
            continue
        try:
            numbers = {name: float(value) for name, value in zip(header, row, strict=True)}
            epochs[numbers['epoch']] = numbers
        except (KeyError, ValueError) as error:
            columns = header or 'a column "epoch"'
            raise ValueError(f'{path}, line {line}: there must be a number for each of {columns}, got {row}') from error
    return sorted(epochs.values(), key=itemgetter('epoch'))


def _checkpoint_path(folder: Path, name: str | None) -> Path:
    names = ('model_best.pth.tar', 'last.pth.tar') if name is None else (name, f'{name}.pth.tar')
    if found := next((folder / each for each in names if (folder / each).is_file()), None):
        return found
    if name is None:
        raise FileNotFoundError(f'{folder} holds neither {" nor ".join(names)}; name one with --checkpoint')
    return Path(name)


def _without_folders(value: Any) -> Any:
    """A record is published: where things lay on this machine is nobody's business; what lies below stays named."""
    if isinstance(value, dict):
        return {key: _without_folders(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_folders(each) for each in value]
    if not isinstance(value, str):
        return value
    path = value.removeprefix('local-dir:')
    absolute = PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute() or path.startswith(('~', '.'))
    return value.removesuffix(path) + PureWindowsPath(path).name if absolute else value


def _label_names(args: dict[str, Any]) -> list[str] | None:
    """As the run recorded them, or as timm's folder reader orders the folders that it was trained on."""
    if args.get('label_names'):
        return [str(name) for name in args['label_names']]
    if args.get('dataset') or args.get('class_map') or not args.get('data_dir'):
        return None
    train = Path(args['data_dir']) / (args.get('train_split') or 'train')
    return sorted((path.name for path in train.glob('*') if path.is_dir()), key=natural_key) or None
