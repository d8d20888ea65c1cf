"""`sd-resnet verify`: is a repository, a cached copy of one, or a folder what it says it is?

The checks go from the bytes to the function: files, hashes, tensors, configuration, loading, folding.
"""

import glob
import hashlib
import inspect
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils.sha import git_hash
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import PretrainedCfg, build_model_with_cfg
from torch import Tensor

from ..errors import VerificationError, explain, explained, one_line
from ..resnets.checkpoints import fold
from ..resnets.network import StochasticDepthNet
from ..resnets.packaged import CONFIG, WEIGHTS

CARD, RECORD = 'README.md', 'record.yaml'
_WEIGHTS_ENDINGS = ('.bin', '.pth', '.pt', '.tar', '.ckpt', '.npz', '.h5', '.msgpack', '.safetensors')
_OTHER_CONTENTS = {b'<': 'holds a web page', b'version https://git-lfs': 'holds a pointer of Git LFS'}
_HASH = r'[0-9a-f]{40}|[0-9a-f]{64}'  # of git, or sha256
# Of a configuration's `pretrained_cfg`: what would take weights from elsewhere, or other code to read them.
_NOT_PUBLISHED = ('url', 'file', 'state_dict', 'custom_load')
# Of its `model_args`: what is addressed to timm's builders, and not to the network.
_BUILDER_ARGS = {'features_only', 'feature_cls', 'out_indices', *inspect.signature(timm.create_model).parameters}
_BUILDER_ARGS |= set(inspect.signature(build_model_with_cfg).parameters)

Report = Callable[[str], None]


def verify(target: str, fix: bool = False, report: Report = print) -> None:
    """Check a repository, `USER/NAME[@REVISION]`, or a folder laid out like one; `report` gets a line a check.

    A repository is downloaded into the cache where it is not there yet, and with `fix` where it is damaged; without a
    network, what the cache holds is checked against the hashes that the cache recorded. The first check that fails is a
    VerificationError.
    """
    name = re.sub(r'^(hf[-_]hub|local-dir):', '', target)
    folder, others = Path(name), list[str]()
    if folder.is_file():
        raise VerificationError(
            f'{name} is a file; give the folder that `sd-resnet push` wrote, or USER/NAME[@REVISION]'
        )
    if folder.is_dir() and not fix:
        _check_folder(folder, name, report)
    else:
        name, cache = _cached_repository(folder) if folder.is_dir() else (name, None)
        with explained(name):
            folder, name, others = _fetch(name, cache, fix, report)
    check_contents(folder, name, report, others)


def check_contents(folder: Path, name: str, report: Report = lambda line: None, others: Iterable[str] = ()) -> Any:
    """The network that a folder's weights and configuration give, if they belong together, load, and fold.

    `others` are files with weights that the repository has and the folder need not have; `name` is for messages.
    """
    tensors = read_tensors(folder / WEIGHTS, name)
    for key, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise VerificationError(f'{name}: {key} is not finite: the training diverged; take an earlier checkpoint')
    report(f'tensors      {len(tensors)} in {WEIGHTS}')
    with refusing(f'{name}: {CONFIG} is not JSON', 'publish it again', ValueError, OSError):
        config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    for fault in _faults(config, [*others, *other_weights(path.name for path in folder.iterdir())]):
        raise VerificationError(f'{name}: {CONFIG}: {fault}')
    with refusing(f'{name}: {CONFIG} builds no model', 'correct model_args', Exception):
        model: Any = timm.create_model(f'local-dir:{folder}')
    for key, built in model.state_dict().items():
        if key.endswith('.survival_prob') and not torch.equal(built, tensors.get(key, built)):
            reason = f'{name}: the survival probabilities of {CONFIG} are not those of {WEIGHTS}'
            raise VerificationError(f'{reason}; correct drop_path_rate and drop_path_schedule in model_args')
    with refusing(f'{name}: {WEIGHTS} does not fit {CONFIG}', 'publish both again', RuntimeError, AttributeError):
        model.load_state_dict(tensors)
    report(f'config       {config["architecture"]}, {model.num_classes} classes')
    with refusing(f'{name} does not load', 'publish it again', Exception):
        model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    if not equal(model.state_dict(), tensors):
        raise VerificationError(f'{name}: loading changes tensors; publish it again with a config.json of its own')
    report('loads        every tensor as in the file')
    if not isinstance(model, StochasticDepthNet):
        report(f'plain        {type(model).__name__} of timm, nothing to fold')
        return model
    folded = fold(model).eval()  # to plain timm, or for the CIFAR nets to rate 0
    check_function(model, folded, f'{name}: folding changes the outputs; publish the weights again')
    report(f'folds        outputs equal to 1e-5 of the largest ({type(folded).__name__})')
    return model


@torch.no_grad()
def check_function(model: Any, other: Any, message: str) -> None:
    """Compare two networks' outputs in evaluation mode, to 1e-5 of the largest; `message` says that they differ."""
    images = torch.rand(2, *model.pretrained_cfg['input_size'], generator=torch.Generator().manual_seed(0))
    expected, found = model(images), other(images)
    if expected.shape != found.shape or not (expected - found).abs().max() <= 1e-5 * expected.abs().max():
        raise VerificationError(message)


@contextmanager
def refusing(reason: str, cure: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds become a `VerificationError` of one line."""
    try:
        yield
    except kinds as error:
        raise VerificationError(f'{reason}: {one_line(error)}; {cure}') from error


def read_tensors(path: Path, name: str) -> dict[str, Tensor]:
    """A safetensors file's tensors, if it is whole."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        start = path.read_bytes()[:64].lstrip()
        otherwise = f'is cut short or damaged ({one_line(error)})' if start else 'is empty'
        found = next((said for begin, said in _OTHER_CONTENTS.items() if start.startswith(begin)), otherwise)
        raise VerificationError(f'{name}: {path.name} {found}; publish it again') from error


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Do two state dicts hold the same?"""
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def file_hash(path: Path, length: int = 64) -> str:
    """The hash that the Hub records of a file: sha256 of a large one (64 digits), git's of a small one (40)."""
    content = path.read_bytes()
    return git_hash(content) if length == 40 else hashlib.sha256(content).hexdigest()


def other_weights(files: Iterable[str]) -> list[str]:
    """Those that timm may load in the place of `model.safetensors`; of folders it looks into none."""
    return sorted(f for f in files if '/' not in f and f != WEIGHTS and f.endswith(_WEIGHTS_ENDINGS))


def _faults(config: Any, others: list[str]) -> Iterator[str]:
    """What a published configuration must not be, with the cure; after the first nothing is sure."""
    if not isinstance(config, dict) or not isinstance(config.get('architecture'), str):
        yield 'names no architecture; add "architecture", or publish it again'
    name, cfg, args = config['architecture'], config.get('pretrained_cfg', {}), config.get('model_args', {})
    if not timm.is_model(name.split('.')[0]):
        yield f'names the unknown architecture {name!r}; install the plugin that has it, or a newer timm'
    if not isinstance(cfg, dict) or not isinstance(args, dict):
        yield 'pretrained_cfg and model_args must hold names and values; publish it again'
    if unknown := ', '.join(sorted(set(cfg) - {field.name for field in fields(PretrainedCfg)})):
        yield f'timm {timm.__version__} does not know {unknown} in pretrained_cfg; remove it, or install a newer timm'
    for key in filter(cfg.get, _NOT_PUBLISHED):
        yield f'{key}={cfg[key]!r} in pretrained_cfg takes weights from elsewhere; remove it'
    for key in sorted(_BUILDER_ARGS & set(args)):
        yield f'{key} in model_args is no argument of a network; remove it'
    if (filename := cfg.get('hf_hub_filename')) not in (None, WEIGHTS):
        yield f'hf_hub_filename must be {WEIGHTS!r}, got {filename!r}; publish it again'
    if others and filename is None:
        also = f'the repository also holds {others[0]}, which timm loads in silence when {WEIGHTS} fails'
        yield f'{also}; delete it, or set hf_hub_filename to {WEIGHTS!r} in pretrained_cfg'


def _cached_repository(folder: Path) -> tuple[str, Path]:
    """The name of the repository whose snapshot in the Hub's cache a folder is, and the cache."""
    snapshots = folder.absolute().parent
    match = re.fullmatch(r'models--(.+?)--(.+)', snapshots.parent.name)
    if snapshots.name != 'snapshots' or match is None:
        raise VerificationError(f'{folder} is not in the cache of the Hub: --fix cannot know where to download it from')
    return f'{match[1]}/{match[2]}@{folder.name}', snapshots.parent.parent


def _fetch(name: str, cache: Path | None, fix: bool, report: Report) -> tuple[Path, str, list[str]]:
    """A repository's folder in the cache, checked against the Hub's record; its full name, and its other weights."""
    repo_id, _, revision = name.partition('@')
    source: Any = {'repo_id': repo_id, 'revision': revision or None, 'cache_dir': cache}
    try:
        info = HfApi().model_info(repo_id, revision=revision or None, files_metadata=True)
    except Exception as error:
        answered = getattr(getattr(error, 'response', None), 'status_code', 500) < 500
        if answered or not isinstance(config := try_to_load_from_cache(**source, filename=CONFIG), str):
            raise
        report(f'offline      {explain(error, name)}: only the copy in the cache is checked')
        _check_folder(Path(config).parent, name, report)
        return Path(config).parent, name, []
    name = f'{repo_id}@{info.sha}'
    hashes = {s.rfilename: s.lfs.sha256 if s.lfs else s.blob_id for s in info.siblings or []}
    _check_names(hashes, name)
    others = other_weights(hashes)
    recorded = {file: digest for file, digest in hashes.items() if digest and file not in others}
    folder = Path(snapshot_download(**source, allow_patterns=[glob.escape(file) for file in recorded]))
    if folder.name != info.sha:
        raise VerificationError(f'{repo_id} was changed meanwhile; verify it again')
    for file, digest in recorded.items():
        blob = (folder / file).resolve().name
        if len(blob) == len(digest) and blob != digest:
            announced = f'{file} was announced as {blob[:12]}… and recorded as {digest[:12]}…'
            raise VerificationError(f'{name}: {announced}; something changes the answers: try another connection')
        if fix and file_hash(folder / file, len(digest)) != digest:
            hf_hub_download(**source, filename=file, force_download=True)
            report(f'fixed        {file} was damaged in the cache, and is downloaded again')
    cure = 'the Hub sends other bytes than it recorded: publish it again' if fix else 'run with --fix'
    _check_hashes(folder, recorded, name, cure)
    report(f'hashes       {len(recorded)} files as the Hub recorded them, revision {info.sha}')
    return folder, name, others


def _check_folder(folder: Path, name: str, report: Report) -> None:
    """By the cache, whose files are named after their hash, and by the record that is published with the weights."""
    recorded = {}
    for path in folder.iterdir():
        blob = path.resolve()
        if not blob.exists():
            raise VerificationError(f'{folder}: {path.name} is lost from the cache; load it again while online')
        if path.is_symlink() and re.fullmatch(_HASH, blob.name) and not other_weights([path.name]):
            recorded[path.name] = blob.name
    cure = 'run with --fix while online' if recorded else 'copy or publish it again'
    if (folder / RECORD).is_file():
        with refusing(f'{folder}: {RECORD} is damaged', 'publish it again', Exception):
            sha256 = yaml.safe_load((folder / RECORD).read_text(encoding='utf-8'))['sha256']
            recorded.setdefault(WEIGHTS, re.fullmatch(_HASH, sha256)[0])  # type: ignore[index]
    _check_names([path.name for path in folder.iterdir() if path.is_file()], name)
    _check_hashes(folder, recorded, name, cure)
    report(f'hashes       {len(recorded)} files as recorded' if recorded else 'hashes       none are recorded')


def _check_names(names: Iterable[str], name: str) -> None:
    others = ', '.join(other_weights(names))
    for file, found in ((WEIGHTS, f' but {others}' if others else ''), (CONFIG, '')):
        if file not in names:
            raise VerificationError(f'{name} holds no {file}{found}; publish it again with: sd-resnet push')


def _check_hashes(folder: Path, recorded: Mapping[str, str], name: str, cure: str) -> None:
    for file, digest in recorded.items():
        if (found := file_hash(folder / file, len(digest))) != digest:
            difference = f'{"sha256" if len(digest) == 64 else "git hash"} {found[:12]}… instead of {digest[:12]}…'
            raise VerificationError(f'{name}: {file} is damaged ({difference}); {cure}')
