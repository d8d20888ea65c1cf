"""What is known of a training run: arguments, metrics and weights, as timm's `train.py` leaves them in a folder."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from timm.data import resolve_data_config
from timm.utils.misc import natural_key
from torch import nn

from .checkpoints import Checkpoint, architectures, build, read_checkpoint

# From a run's arguments to the model's, where the names differ.
_MODEL_ARGS = {'drop': 'drop_rate', 'drop_path': 'drop_path_rate', 'gp': 'global_pool'}


@dataclass
class Run:
    """A training run and the checkpoint that was chosen from it.

    Attributes:
        args: `args.yaml`, absolute paths cut down to their last part.
        epochs: `summary.csv`, one entry per epoch; empty where there is none.
        checkpoint: The weights.
        file: The checkpoint's file name.
        metrics: What `summary.csv` says of the checkpoint's epoch; empty where the weights are not the measured ones.
        label_names: The classes in order, if they are known.
    """

    args: dict[str, Any]
    epochs: list[dict[str, float]]
    checkpoint: Checkpoint
    file: str
    metrics: dict[str, float]
    label_names: list[str] | None

    def model(self) -> nn.Module:
        """The trained network, in evaluation mode, with the run's preprocessing as its configuration.

        Raises:
            ValueError: The checkpoint does not belong to the run's arguments.
        """
        args = dict(self.args.get('model_kwargs') or {})
        args.pop('drop_path_ramp', None)  # training is over
        args.update({name: self.args[key] for key, name in _MODEL_ARGS.items() if self.args.get(key) is not None})
        state_dict = {k: v for k, v in self.checkpoint.state_dict.items() if '.aux_bn.' not in k}  # of split-bn
        model = build(self.args['model'], state_dict, args)
        try:
            model.load_state_dict(state_dict)
        except RuntimeError as error:
            reason = ' '.join(str(error).split())[:200]
            raise ValueError(
                f'{self.file} does not fit the model of args.yaml, {self.args["model"]}: {reason}'
            ) from error
        # Nothing else of the architecture's own configuration is true of these weights: neither its source nor licence.
        own = {key: model.pretrained_cfg[key] for key in ('architecture', 'first_conv', 'classifier')}
        model.pretrained_cfg = {**own, **resolve_data_config(self.args, model=model), 'num_classes': model.num_classes}
        model.default_cfg = model.pretrained_cfg
        return model.eval()


def read_run(folder: Path, checkpoint: str | None = None, use_ema: bool = True) -> Run:
    """Read a run folder of timm's `train.py`, or of `sd-resnet quickstart`.

    Args:
        folder: Holds `args.yaml`, checkpoints and, for the metrics, `summary.csv`.
        checkpoint: File name in it, or any path; None takes `model_best.pth.tar`, else `last.pth.tar`.
        use_ema: Take the averaged weights where there are any.

    Raises:
        FileNotFoundError: The folder, its arguments or the checkpoint are missing.
        ValueError: A file is damaged, or the run trained a model that is not of this package.
    """
    if not (folder / 'args.yaml').is_file():
        raise FileNotFoundError(f"{folder} holds no args.yaml: a run folder is what timm's train.py writes")
    args = _read_args(folder / 'args.yaml')
    if args.get('model') not in architectures():
        allowed = ', '.join(architectures())
        raise ValueError(f'{folder / "args.yaml"}: model must be one of {allowed}, got {args.get("model")!r}')
    path = _checkpoint_path(folder, checkpoint)
    read = read_checkpoint(path, use_ema)
    epochs = _read_epochs(folder / 'summary.csv')
    # With an average, timm's script measures the average: the raw weights' accuracy is not known then.
    measured = read.averaged == bool(args.get('model_ema')) and read.epoch is not None
    metrics = next((epoch for epoch in epochs if measured and epoch['epoch'] == read.epoch), {})
    metrics = {key: value for key, value in metrics.items() if key.startswith('eval_')}
    labels = _label_names(args)
    return Run({key: _without_folders(value) for key, value in args.items()}, epochs, read, path.name, metrics, labels)


def _read_args(path: Path) -> dict[str, Any]:
    try:
        args = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f'{path} is not YAML: {" ".join(str(error).split())[:150]}') from error
    if not isinstance(args, dict):
        raise ValueError(f'{path} must hold names and values, got {type(args).__name__}')
    return args


def _read_epochs(path: Path) -> list[dict[str, float]]:
    """Rows of numbers. A resumed run repeats the header, and epochs: the last one counts."""
    if not path.is_file():
        return []
    epochs: dict[float, dict[str, float]] = {}
    with path.open(newline='', encoding='utf-8') as file:
        for line, row in enumerate(csv.DictReader(file), start=2):
            if row.get('epoch') == 'epoch':
                continue
            try:
                numbers = {key: float(value) for key, value in row.items()}
            except (TypeError, ValueError) as error:
                raise ValueError(f'{path}, line {line}: every value must be a number, got {dict(row)}') from error
            if 'epoch' not in numbers:
                raise ValueError(f'{path} has no column "epoch"')
            epochs[numbers['epoch']] = numbers
    return [epochs[key] for key in sorted(epochs)]


def _checkpoint_path(folder: Path, name: str | None) -> Path:
    if name is not None:
        inside = folder / name
        return inside if inside.is_file() else Path(name)
    for candidate in ('model_best.pth.tar', 'last.pth.tar'):
        if (folder / candidate).is_file():
            return folder / candidate
    raise FileNotFoundError(f'{folder} holds neither model_best.pth.tar nor last.pth.tar; name one with --checkpoint')


def _without_folders(value: Any) -> Any:
    """A record is published: where things lay on this machine is nobody's business."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else value


def _label_names(args: dict[str, Any]) -> list[str] | None:
    """As the run recorded them, or as timm's folder reader orders the folders that it was trained on."""
    if args.get('label_names'):
        return [str(name) for name in args['label_names']]
    if args.get('dataset') or args.get('class_map') or not args.get('data_dir'):
        return None
    train = Path(args['data_dir']) / (args.get('train_split') or 'train')
    names = sorted((path.name for path in train.iterdir() if path.is_dir()), key=natural_key) if train.is_dir() else []
    return names or None
