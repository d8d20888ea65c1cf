"""`sd-resnet verify`: is a repository, a cached copy of one, or a folder what it says it is?

Each check raises a `VerificationError` of one line, cause and cure. They go from the bytes to the function: files,
hashes, tensors, configuration, loading, folding.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import PretrainedCfg, build_model_with_cfg
from torch import Tensor, nn

from ..errors import VerificationError, damage, explain, one_line
from ..resnets.checkpoints import fold
from ..resnets.network import StochasticDepthNet
from ..resnets.packaged import CONFIG, WEIGHTS

CARD, RECORD = 'README.md', 'record.yaml'
OTHER_WEIGHTS = ('*.bin', '*.pth', '*.pt', '*.tar', '*.ckpt', '*.npz', '*.h5', '*.msgpack', '*.safetensors')
_HASH = r'[0-9a-f]{40}|[0-9a-f]{64}'  # of git, or sha256
# Of a configuration's `pretrained_cfg`: what would take weights from elsewhere, or other code to read them.
_NOT_PUBLISHED = ('url', 'file', 'state_dict', 'custom_load')
# Of its `model_args`: what is addressed to timm's builders, and not to the network.
_BUILDER_ARGS = {
    *inspect.signature(timm.create_model).parameters,
    *inspect.signature(build_model_with_cfg).parameters,
    *('features_only', 'feature_cls', 'out_indices'),
}

Report = Callable[[str], None]


def verify(target: str, fix: bool = False, report: Report = print) -> None:
    """Check a repository of the Hugging Face Hub, or a folder laid out like one.

    A repository is downloaded into the cache where it is not there yet; without a network, what the cache holds is
    checked against the hashes that the cache recorded.

    Args:
        target: `USER/NAME`, `USER/NAME@REVISION`, or a folder; timm's prefixes `hf-hub:` and `local-dir:` are allowed.
        fix: Download damaged files of the cache again.
        report: Is given one line for each check that passes.

    Raises:
        VerificationError: The first check that fails.
    """
    name = re.sub(r'^(hf[-_]hub|local-dir):', '', target)
    cache = None
    if Path(name).is_dir() and fix:
        name, cache = _cached_repository(Path(name))
    if Path(name).is_dir():
        folder = Path(name)
        recorded = _recorded_hashes(folder)
        _check_names({path.name for path in folder.iterdir() if path.is_file()}, _read_config_if_there(folder), name)
        _check_hashes(folder, recorded, name, report)
    else:
        try:
            folder, name = _fetch(name, fix, report, cache)
        except VerificationError:
            raise
        except Exception as error:
            raise VerificationError(explain(error, name)) from error
    check_contents(folder, name, report)


def check_contents(folder: Path, name: str, report: Report = lambda line: None) -> Any:
    """Check that a folder's weights and configuration belong together, load, and fold.

    Args:
        folder: Holds `model.safetensors` and `config.json`.
        name: For messages.
        report: Is given one line for each check that passes.

    Returns:
        The model, in evaluation mode.

    Raises:
        VerificationError: The first check that fails.
    """
    tensors = read_tensors(folder / WEIGHTS, name)
    wrong = next((k for k, v in tensors.items() if v.is_floating_point() and not v.isfinite().all()), None)
    if wrong is not None:
        raise VerificationError(f'{name}: {wrong} is not finite: the training diverged; take an earlier checkpoint')
    report(f'tensors      {len(tensors)} in {WEIGHTS}')
    config = check_config(folder, name)
    model = _check_fit(folder, tensors, name)
    report(f'config       {config["architecture"]}, {model.num_classes} classes')
    try:
        loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    except Exception as error:
        raise VerificationError(f'{name} does not load: {one_line(error)}; publish it again') from error
    if not _equal(loaded.state_dict(), tensors):
        raise VerificationError(f'{name}: loading changes tensors; publish it again with a config.json of its own')
    report('loads        every tensor as in the file')
    _check_folding(loaded, name, report)
    return loaded


@torch.no_grad()
def check_function(model: Any, other: Any, message: str) -> None:
    """Compare two networks' outputs in evaluation mode, to 1e-5 of the largest.

    Raises:
        VerificationError: They differ; with this message.
    """
    images = torch.rand(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    expected, found = model(images), other(images)
    if expected.shape != found.shape or not (expected - found).abs().max() <= 1e-5 * expected.abs().max():
        raise VerificationError(message)


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """A safetensors file's tensors.

    Raises:
        VerificationError: The file is not whole, or something else.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise VerificationError(f'{name}: {path.name} {damage(path) or one_line(error)}; publish it again') from error


def check_config(folder: Path, name: str) -> dict[str, Any]:
    """`config.json`, if timm can use it and it takes nothing from elsewhere.

    Raises:
        VerificationError: It is not, or names what a published configuration must not.
    """
    where = f'{name}: {CONFIG}'
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    except (ValueError, OSError) as error:
        raise VerificationError(f'{where} is not JSON ({one_line(error)}); publish it again') from error
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        raise VerificationError(f'{where} names no architecture; add "architecture", or publish it again')
    architecture, cfg = config['architecture'], config.get('pretrained_cfg', {})
    if not timm.is_model(architecture.split('.')[0]):
        raise VerificationError(
            f'{where} names the unknown architecture {architecture!r}; install the plugin that has it, or a newer timm'
        )
    if not isinstance(cfg, dict) or not isinstance(config.get('model_args', {}), dict):
        raise VerificationError(f'{where}: pretrained_cfg and model_args must hold names and values; publish it again')
    unknown = sorted(set(cfg) - {field.name for field in fields(PretrainedCfg)})
    if unknown and 'pretrained_cfg' in config:
        raise VerificationError(
            f'{where}: timm {timm.__version__} does not know {", ".join(unknown)} in pretrained_cfg; remove it, or '
            'install a newer timm'
        )
    elsewhere = [key for key in _NOT_PUBLISHED if cfg.get(key)]
    if elsewhere:
        raise VerificationError(
            f'{where}: {elsewhere[0]}={cfg[elsewhere[0]]!r} in pretrained_cfg takes weights from elsewhere; remove it'
        )
    if builders := sorted(_BUILDER_ARGS & set(config.get('model_args', {}))):
        raise VerificationError(f'{where}: {builders[0]} in model_args is no argument of a network; remove it')
    if cfg.get('hf_hub_filename', WEIGHTS) != WEIGHTS:
        raise VerificationError(
            f'{where}: hf_hub_filename must be {WEIGHTS!r}, got {cfg["hf_hub_filename"]!r}; publish it again'
        )
    return config


def file_hash(path: Path, length: int = 64) -> str:
    """The hash that the Hub records of a file: sha256 of a large one (64 digits), git's of a small one (40)."""
    if length == 64:
        digest = hashlib.sha256()
    else:
        digest = hashlib.sha1(usedforsecurity=False)
        digest.update(f'blob {path.stat().st_size}\0'.encode())
    with path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _cached_repository(folder: Path) -> tuple[str, Path]:
    """The name of the repository whose snapshot in the Hub's cache a folder is, and the cache."""
    snapshots = folder.absolute().parent
    match = re.fullmatch(r'models--(.+?)--(.+)', snapshots.parent.name)
    if snapshots.name != 'snapshots' or match is None:
        raise VerificationError(f'{folder} is not in the cache of the Hub: --fix cannot know where to download it from')
    return f'{match[1]}/{match[2]}@{folder.name}', snapshots.parent.parent


def _fetch(name: str, fix: bool, report: Report, cache: Path | None = None) -> tuple[Path, str]:
    """The repository's folder in the cache, each file checked against the Hub's record, and its full name."""
    repo_id, _, revision = name.partition('@')
    try:
        info = HfApi().model_info(repo_id, revision=revision or None, files_metadata=True)
    except Exception as error:
        if isinstance(error, HfHubHTTPError) and getattr(error.response, 'status_code', 500) < 500:
            raise
        if isinstance(error, HFValidationError):
            raise
        try:
            folder = Path(
                hf_hub_download(repo_id, CONFIG, revision=revision or None, cache_dir=cache, local_files_only=True)
            ).parent
        except LocalEntryNotFoundError:
            raise error from None
        report(f'offline      {explain(error, name)}: only the copy in the cache is checked')
        _check_names({path.name for path in folder.iterdir()}, _read_config_if_there(folder), name)
        _check_hashes(folder, _recorded_hashes(folder), name, report)
        return folder, name
    full = f'{repo_id}@{info.sha}'
    hashes = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in info.siblings or []}
    recorded = {file: digest for file, digest in hashes.items() if digest and not other_weights(file)}

    def fetch(file: str, force: bool = False) -> Path:
        return Path(hf_hub_download(repo_id, file, revision=revision or None, cache_dir=cache, force_download=force))

    config = fetch(CONFIG).parent if CONFIG in recorded else None
    _check_names(set(hashes), _read_config_if_there(config), full)
    for file, digest in recorded.items():
        path = fetch(file)
        if file_hash(path, len(digest)) != digest and fix:
            path = fetch(file, force=True)
            report(f'fixed        {file} was damaged in the cache, and is downloaded again')
        found = file_hash(path, len(digest))
        if found != digest:
            if HfApi().model_info(repo_id, revision=revision or None).sha != info.sha:
                raise VerificationError(f'{repo_id} was changed meanwhile; verify it again')
            cure = f'the Hub sends other bytes than it recorded: publish {file} again' if fix else 'run with --fix'
            raise VerificationError(f'{full}: {file} is damaged ({_mismatch(digest, found)}); {cure}')
        blob = path.resolve().name
        if len(blob) == len(digest) and blob != digest:
            raise VerificationError(
                f'{full}: the Hub announced {file} as {blob[:12]}… and recorded it as {digest[:12]}…; something '
                'between changes its answers: try another connection'
            )
    report(f'hashes       {len(recorded)} files as the Hub recorded them, revision {info.sha}')
    return fetch(CONFIG).parent, full


def _recorded_hashes(folder: Path) -> dict[str, str]:
    """By the cache, whose files are named after their hash, and by the record that is published with the weights."""
    recorded = {}
    for path in folder.iterdir():
        blob = path.resolve()
        if not blob.exists():
            raise VerificationError(f'{folder}: {path.name} is lost from the cache; load it again while online')
        if path.is_symlink() and re.fullmatch(_HASH, blob.name):
            recorded[path.name] = blob.name
    if (folder / RECORD).is_file():
        try:
            sha256 = yaml.safe_load((folder / RECORD).read_text(encoding='utf-8'))['sha256']
            recorded.setdefault(WEIGHTS, re.fullmatch(_HASH, sha256)[0])  # type: ignore[index]
        except (yaml.YAMLError, KeyError, TypeError, ValueError):
            raise VerificationError(f'{folder}: {RECORD} is damaged; publish it again') from None
    return recorded


def _check_hashes(folder: Path, recorded: Mapping[str, str], name: str, report: Report) -> None:
    for file, digest in recorded.items():
        if not other_weights(file) and (found := file_hash(folder / file, len(digest))) != digest:
            cure = 'run with --fix while online' if (folder / file).is_symlink() else 'copy or publish it again'
            raise VerificationError(f'{name}: {file} is damaged ({_mismatch(digest, found)}); {cure}')
    report(f'hashes       {len(recorded)} files as recorded' if recorded else 'hashes       none are recorded')


def _check_names(names: set[str], config: Mapping[str, Any], name: str) -> None:
    others = sorted(file for file in names if other_weights(file))
    if WEIGHTS not in names:
        found = f' but {", ".join(others)}' if others else ''
        raise VerificationError(f'{name} holds no {WEIGHTS}{found}; publish the weights with: sd-resnet push')
    if CONFIG not in names:
        raise VerificationError(f'{name} holds no {CONFIG}; publish it again with: sd-resnet push')
    cfg = config.get('pretrained_cfg')
    if others and not (isinstance(cfg, dict) and cfg.get('hf_hub_filename') == WEIGHTS):
        raise VerificationError(
            f'{name} also holds {others[0]}, which timm loads in silence when {WEIGHTS} fails; delete it, or set '
            f'hf_hub_filename to {WEIGHTS!r} in pretrained_cfg of {CONFIG}'
        )


def _read_config_if_there(folder: Path | None) -> dict[str, Any]:
    """For the check of names, which comes first; what is wrong with the configuration is said later."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8')) if folder else {}
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _check_fit(folder: Path, tensors: Mapping[str, Tensor], name: str) -> Any:
    try:
        model: Any = timm.create_model(f'local-dir:{folder}')
    except Exception as error:
        raise VerificationError(f'{name}: {CONFIG} builds no model: {one_line(error)}; correct model_args') from error
    built = {key: value.clone() for key, value in model.state_dict().items() if key.endswith('.survival_prob')}
    stored = {key: value for key, value in tensors.items() if key.endswith('.survival_prob')}
    if isinstance(model, StochasticDepthNet) and not _equal(built, stored):
        raise VerificationError(
            f'{name}: the survival probabilities of {CONFIG} are not those of {WEIGHTS}; correct drop_path_rate and '
            'drop_path_schedule in model_args'
        )
    try:
        model.load_state_dict(dict(tensors))
    except (RuntimeError, AttributeError) as error:
        raise VerificationError(
            f'{name}: {WEIGHTS} does not fit {CONFIG}: {one_line(error)}; publish both again'
        ) from error
    return model


def _check_folding(model: nn.Module, name: str, report: Report) -> None:
    """Folding must keep the test-time function: to plain timm, or for the CIFAR nets to rate 0."""
    if not isinstance(model, StochasticDepthNet):
        report(f'plain        {type(model).__name__} of timm, nothing to fold')
        return
    folded = fold(model).eval()
    check_function(model, folded, f'{name}: folding changes the outputs; publish the weights again')
    report(f'folds        outputs equal to 1e-5 of the largest ({type(folded).__name__})')


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def other_weights(file: str) -> bool:
    """Is it a file that timm may load in the place of `model.safetensors`? Of folders it looks into none."""
    return '/' not in file and file != WEIGHTS and any(Path(file).match(pattern) for pattern in OTHER_WEIGHTS)


def _mismatch(expected: str, found: str) -> str:
    return f'{"sha256" if len(expected) == 64 else "git hash"} {found[:12]}… instead of {expected[:12]}…'
