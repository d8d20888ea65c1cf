"""What is known of a training run: arguments, metrics and weights, as timm's `train.py` leaves them in a folder."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import timm
import yaml
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model_in_modules, parse_model_name
from timm.utils.misc import natural_key
from torch import nn

from ..errors import one_line
from ..resnets.checkpoints import Checkpoint, architectures, build, read_checkpoint
from ..resnets.network import StochasticDepthNet

# From a run's arguments to the model's, where the names differ.
_MODEL_ARGS = {
    'drop': 'drop_rate',
    'drop_path': 'drop_path_rate',
    'drop_block': 'drop_block_rate',
    'gp': 'global_pool',
    'bn_momentum': 'bn_momentum',
    'bn_eps': 'bn_eps',
}


@dataclass
class Run:
    """A training run and the checkpoint that was chosen from it.

    Attributes:
        name: The model's, as timm was asked for it: an architecture, with a tag, or a source as `hf-hub:USER/NAME`.
        args: `args.yaml`, absolute paths cut down to their last part.
        epochs: `summary.csv`, one entry per epoch; empty where there is none.
        checkpoint: The weights.
        file: The checkpoint's file name.
        metrics: What `summary.csv` says of the checkpoint's epoch; empty where the weights are not the measured ones.
        label_names: The classes in order, if they are known.
    """

    name: str
    args: dict[str, Any]
    epochs: list[dict[str, float]]
    checkpoint: Checkpoint
    file: str
    metrics: dict[str, float]
    label_names: list[str] | None

    @property
    def model_args(self) -> dict[str, Any]:
        """What timm was given to build the model, but for input channels and classes, which the weights tell, and for a
        ramp of the drop path, which ends with the training."""
        given = {name: self.args[key] for key, name in _MODEL_ARGS.items() if self.args.get(key) is not None}
        args = {**(self.args.get('model_kwargs') or {}), **given}
        args.pop('drop_path_ramp', None)
        return args

    @property
    def base_model(self) -> str | None:
        """The repository of the Hub whose weights the training started from, if it is known."""
        if not self.args.get('pretrained') or self.args.get('pretrained_path'):
            return None
        source, name = parse_model_name(self.name)
        if source:
            return name.split('@')[0] if source == 'hf-hub' else None
        cfg = get_pretrained_cfg(name)
        return cfg.hf_hub_id if cfg else None

    @property
    def converted(self) -> bool:
        """Is it one of timm's models under a `sd_` name?"""
        return is_model_in_modules(self.name, ('converted_models',))

    def model(self) -> nn.Module:
        """The trained network, in evaluation mode, with the run's preprocessing as its configuration.

        Raises:
            ValueError: The checkpoint does not belong to the run's arguments, or the model is not of this package.
        """
        state_dict = {k: v for k, v in self.checkpoint.state_dict.items() if '.aux_bn.' not in k}  # of split-bn
        if self.converted:
            in_chans = self.args.get('in_chans') or (self.args.get('input_size') or [None])[0]
            given = {'num_classes': self.args.get('num_classes'), 'in_chans': in_chans, **self.model_args}
            model: Any = timm.create_model(self.name, **given)
        else:
            model = build(self.name, state_dict, self.model_args)
            if StochasticDepthNet not in type(model).mro():
                raise ValueError(f'{self.name} is a {type(model).__name__}, not a model of this package')
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            raise ValueError(
                f'{self.file} does not fit the model of args.yaml, {self.name}: {one_line(error)}'
            ) from error
        # Nothing else of the architecture's own configuration is true of these weights: neither its source nor licence.
        kept = ('architecture', 'first_conv', 'classifier', 'fixed_input_size')
        own = {key: model.pretrained_cfg[key] for key in kept if model.pretrained_cfg.get(key)}
        data = resolve_data_config(self.args, model=model)
        if not self.converted:  # height and width of the features, as timm's configurations state them
            reduction = model.feature_info[-1]['reduction']
            own['pool_size'] = tuple(math.ceil(side / reduction) for side in data['input_size'][1:])
        model.pretrained_cfg = {**own, **data, 'num_classes': model.num_classes}
        model.default_cfg = model.pretrained_cfg
        return model.eval()


def read_run(folder: Path, checkpoint: str | None = None, use_ema: bool = True) -> Run:
    """Read a run folder of timm's `train.py`, or of `sd-resnet quickstart`.

    Args:
        folder: Holds `args.yaml`, checkpoints and, for the metrics, `summary.csv`.
        checkpoint: File name in it (`last` and `checkpoint-9` will do for timm's), or any path; None takes
            `model_best.pth.tar`, else `last.pth.tar`.
        use_ema: Take the averaged weights where there are any.

    Raises:
        FileNotFoundError: The folder, its arguments or the checkpoint are missing.
        ValueError: A file is damaged, or the run trained a model that is not of this package.
    """
    if not (folder / 'args.yaml').is_file():
        raise FileNotFoundError(f"{folder} holds no args.yaml: a run folder is what timm's train.py writes")
    args = _read_args(folder / 'args.yaml')
    name = str(args.get('model'))
    ours = name.split('.')[0] in architectures() or is_model_in_modules(name, ('converted_models',))
    if not ours and ':' not in name:  # what a source holds is seen when it is built
        raise ValueError(
            f"{folder / 'args.yaml'}: model must be one of {', '.join(architectures())} or timm's under sd_ names, "
            f'got {name!r}'
        )
    path = _checkpoint_path(folder, checkpoint)
    read = read_checkpoint(path, use_ema)
    epochs = _read_epochs(folder / 'summary.csv')
    # With an average, timm's script measures the average (unless it is kept on the CPU), and not the raw weights.
    measures_average = bool(args.get('model_ema')) and not args.get('model_ema_force_cpu')
    measured = read.averaged == measures_average and read.epoch is not None
    metrics = next((epoch for epoch in epochs if measured and epoch['epoch'] == read.epoch), {})
    metrics = {key: value for key, value in metrics.items() if key.startswith('eval_')}
    labels = _label_names(args)
    return Run(name, _without_folders(args), epochs, read, path.name, metrics, labels)


def _read_args(path: Path) -> dict[str, Any]:
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not YAML: {one_line(error)}') from error
    if not isinstance(args, dict):
        raise ValueError(f'{path} must hold names and values, got {type(args).__name__}')
    return args


def _read_epochs(path: Path) -> list[dict[str, float]]:
    """Rows of numbers. A resumed run writes its own header, and repeats epochs: the last one counts."""
    if not path.is_file():
        return []
    header: list[str] = []
    epochs: dict[float, dict[str, float]] = {}
    with path.open(newline='', encoding='utf-8') as file:
        for line, row in enumerate(csv.reader(file), start=1):
            if 'epoch' in row or not header:
                header = row
                continue
            try:
                numbers = {name: float(value) for name, value in zip(header, row, strict=True)}
            except ValueError as error:
                raise ValueError(
                    f'{path}, line {line}: there must be a number for each of {header}, got {row}'
                ) from error
            if 'epoch' not in numbers:
                raise ValueError(f'{path} has no column "epoch"')
            epochs[numbers['epoch']] = numbers
    return [epochs[key] for key in sorted(epochs)]


def _checkpoint_path(folder: Path, name: str | None) -> Path:
    if name is not None:
        found = (path for path in (folder / name, folder / f'{name}.pth.tar') if path.is_file())
        return next(found, Path(name))
    for candidate in ('model_best.pth.tar', 'last.pth.tar'):
        if (folder / candidate).is_file():
            return folder / candidate
    raise FileNotFoundError(f'{folder} holds neither model_best.pth.tar nor last.pth.tar; name one with --checkpoint')


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
    return f'{value[: len(value) - len(path)]}{PureWindowsPath(path).name}' if absolute else value


def _label_names(args: dict[str, Any]) -> list[str] | None:
    """As the run recorded them, or as timm's folder reader orders the folders that it was trained on."""
    if args.get('label_names'):
        return [str(name) for name in args['label_names']]
    if args.get('dataset') or args.get('class_map') or not args.get('data_dir'):
        return None
    train = Path(args['data_dir']) / (args.get('train_split') or 'train')
    names = sorted((path.name for path in train.iterdir() if path.is_dir()), key=natural_key) if train.is_dir() else []
    return names or None
