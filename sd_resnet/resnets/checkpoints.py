"""Reading checkpoint files, folding survival probabilities into the weights, and export to a plain timm ResNet."""

import argparse
import copy
import pickle
import struct
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models import clean_state_dict
from torch import Tensor, nn

from ..errors import one_line
from ..files import written_whole
from .network import StochasticDepthNet
from .resnet_imagenet import ARCHITECTURES, StochasticResNet
from .scripting import become_plain

NO_PLAIN_CIFAR = (
    'timm has no architecture for the CIFAR nets: folded, they are the same class at drop_path_rate=0, which needs '
    'the sd_resnet plugin'
)


_UNREADABLE = (
    *(SafetensorError, RuntimeError, EOFError, ValueError, LookupError, struct.error),
    *(zipfile.BadZipFile, zlib.error),
)


class Checkpoint(NamedTuple):
    """What a checkpoint file holds, as far as it states it."""

    state_dict: dict[str, Tensor]  # without the prefixes of DDP and `torch.compile`
    architecture: str | None
    model_args: dict[str, Any]  # the `--model-kwargs` of timm's `train.py`, and its `--gp`
    epoch: int | None  # that it was written after; the first is 0
    averaged: bool  # are these the averaged weights (EMA) of a file that holds both?


def read_checkpoint(path: str | Path, use_ema: bool = True) -> Checkpoint:
    """Read a safetensors file, or what timm's `train.py` or `torch.save` of a state dict wrote.

    Pickles are read with `weights_only=True`, and `argparse.Namespace` as the only further type. With `use_ema` the
    averaged weights are taken where there are any.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a checkpoint, is damaged, or needs types that are not allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not a file; a checkpoint is a .safetensors, .pth, .pt or .tar file')
    try:
        if path.suffix == '.safetensors':
            content: Any = load_file(path)
        else:
            _check_sums(path)
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        allowed = 'only tensors, plain Python values and argparse.Namespace are allowed in a checkpoint'
        raise ValueError(f'{path} was refused: it is damaged, or needs more than that: {allowed}') from error
    except _UNREADABLE as error:
        reason = str(error).strip().partition('\n')[0]
        raise ValueError(f'{path} cannot be read, it is damaged or not a checkpoint: {reason}') from error

    content = content if isinstance(content, Mapping) else {}
    keys = ('state_dict_ema', 'model_ema') if use_ema else ()
    wrapped = next((k for k in (*keys, 'state_dict', 'model') if isinstance(content.get(k), Mapping)), None)
    tensors = content if wrapped is None else content[wrapped]
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f'{path} holds no state dict')
    about = {} if wrapped is None else content
    args = about.get('args')
    pool = getattr(args, 'gp', None)
    return Checkpoint(
        clean_state_dict(dict(tensors)),
        architecture=getattr(args, 'model', None) or about.get('arch'),
        model_args={**(getattr(args, 'model_kwargs', None) or {}), **({'global_pool': pool} if pool else {})},
        epoch=about.get('epoch'),
        averaged=wrapped in ('state_dict_ema', 'model_ema'),
    )


def _check_sums(path: Path) -> None:
    """Of what is in the file, which `torch.load` does not look at; a ValueError where one is wrong.

    Where all are, it was written without any: see `torch.serialization.set_crc32_options`.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            damaged = [name for name in file.namelist() if not _is_whole(file, name)]
            if 0 < len(damaged) < len(file.namelist()):
                wrong = f'the checksum of {damaged[0]} in it is wrong'
                raise ValueError(f'{wrong}; take another copy, or an earlier checkpoint')


def _is_whole(file: zipfile.ZipFile, name: str) -> bool:
    try:
        with file.open(name) as entry:
            while entry.read(2**20):
                pass
    except zipfile.BadZipFile:
        return False
    return True


def to_resnet(model: nn.Module) -> nn.Module:
    """A copy that computes the same at test time, as a plain timm `ResNet`.

    What test-time rescaling (equation 5) multiplies by is folded into the weights. Of the CIFAR nets, which timm does
    not have, with a warning, the same class at `drop_path_rate=0`.

    Args:
        model: One of this package's ResNets, without a wrapper.

    Raises:
        TypeError: `model` is something else.
    """
    if not isinstance(model, StochasticDepthNet):
        raise TypeError(
            f'model must be a model of sd_resnet, got {type(model).__name__}; unwrap DDP (`.module`), EMA (`.module`), '
            'torch.compile (`._orig_mod`) and features_only (`.network`) first'
        )
    if not isinstance(model, StochasticResNet):
        warnings.warn(NO_PLAIN_CIFAR, stacklevel=2)
    return fold(model)


def fold(model: StochasticDepthNet) -> nn.Module:
    """`to_resnet` without its warning."""
    plain: Any = copy.deepcopy(model)
    plain.drop_path_ramp = None
    plain.set_drop_path(rate=0)
    if not isinstance(model, StochasticResNet):
        return plain
    become_plain(plain, lambda drop_path: None)
    if hasattr(plain, '_model_args'):  # what timm's exports say that the network was built with
        plain._model_args = {k: v for k, v in plain._model_args.items() if not k.startswith('drop_path')}
    cfg = getattr(plain, 'pretrained_cfg', None)
    if cfg is not None:
        plain.pretrained_cfg = plain.default_cfg = {**cfg, 'architecture': cfg['architecture'].removeprefix('sd_')}
    return plain


def export(
    path: str | Path, out: str | Path, architecture: str | None = None, use_ema: bool = True
) -> tuple[str, dict[str, Any]]:
    """Write a checkpoint's weights as a plain timm ResNet's safetensors file, survival probabilities folded in.

    `out` is a new file; the `architecture` must be told where the file does not state it and its tensors do not tell.
    Returns the name of the architecture that the file is for, and what `timm.create_model` must be given beside it.

    Raises:
        ValueError: The file is damaged, or of an architecture that this package does not have.
        OSError: `out` exists, or cannot be written; nothing is left behind then.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f'{out} exists; remove it, or choose another name')
    checkpoint = read_checkpoint(path, use_ema)
    state_dict = {k: v for k, v in checkpoint.state_dict.items() if '.aux_bn.' not in k}  # training-only, of split-bn
    recorded = architecture or checkpoint.architecture
    args = {key: value for key, value in checkpoint.model_args.items() if not key.startswith('drop_path')}
    known = recorded is not None and (bool(architecture) or ':' not in recorded)  # else from the Hub, or a folder
    names = [_own_name(str(recorded))] if known else _names_by_depth(state_dict, args)
    fitting = {}
    for name in names:
        try:
            with torch.device('meta'):  # at rate 0, where loading folds the survival probabilities in
                model = build(name, state_dict, {**args, 'drop_path_rate': 0.0})
            model.load_state_dict(state_dict, assign=True)
            fitting[name] = model
        except (RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
            if known:
                raise ValueError(f'{path} is not a checkpoint of {name}: {one_line(error)}') from error
    if not fitting:
        raise ValueError(f"{path} fits none of this package's architectures, which timm.list_models('sd_*') lists")
    if len(fitting) > 1:
        which = ', '.join(fitting)
        raise ValueError(f'architecture (--model) must be given: {path} fits {which}, which differ without weights')
    ((name, model),) = fitting.items()
    save_tensors(model.state_dict(), out)
    if isinstance(model, StochasticResNet):
        name = name.removeprefix('sd_')
    else:
        args['drop_path_rate'] = 0.0
    usual: Any = timm.get_pretrained_cfg(name)
    given = {'num_classes': (model.num_classes, usual.num_classes), 'in_chans': (model.in_chans, usual.input_size[0])}
    return name, {**args, **{key: own for key, (own, theirs) in given.items() if own != theirs}}


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file whole, or not at all."""
    try:
        with written_whole(path) as part:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, metadata={'format': 'pt'})
    except SafetensorError as error:  # an OSError in other clothes
        raise OSError(f'{path} could not be written: {error}') from error


def architectures() -> list[str]:
    """The names of this package's models."""
    return [name for module in ('resnet_cifar', 'resnet_imagenet') for name in timm.list_models(module=module)]


def build(name: str, state_dict: Mapping[str, Tensor], model_args: Mapping[str, Any]) -> Any:
    """A new network, `name` of `architectures()`, with as many input channels and classes as the state dict has."""
    stem = state_dict.get('conv1.weight', state_dict.get('conv1.0.weight'))
    if stem is None:
        raise ValueError('the weights hold no conv1: they are not those of a ResNet')
    classes = state_dict['fc.weight'].shape[0] if 'fc.weight' in state_dict else 0
    return timm.create_model(name, **{**model_args, 'in_chans': stem.shape[1], 'num_classes': classes})


def _names_by_depth(state_dict: Mapping[str, Tensor], model_args: Mapping[str, Any]) -> list[str]:
    """Of the models with as many blocks in each stage; of all CIFAR nets where there is no fourth stage."""
    if 'layer4.0.conv1.weight' not in state_dict:
        return timm.list_models(module='resnet_cifar')
    blocks = {tuple(key.split('.')[:2]) for key in state_dict if key.startswith('layer')}
    layers = [sum(stage == name for stage, _ in blocks) for name in StochasticResNet.stage_names]
    return [f'sd_{name}' for name, own in ARCHITECTURES.items() if [*{**own, **model_args}['layers']] == layers]


def _own_name(architecture: str) -> str:
    name, own = architecture.split('.')[0], architectures()
    for candidate in (name, f'sd_{name}'):
        if candidate in own:
            return candidate
    near = get_close_matches(f'sd_{name.removeprefix("sd_")}', own, cutoff=0)
    raise ValueError(f'architecture must be a ResNet of sd_resnet, for example {", ".join(near)}, got {architecture!r}')
