"""From a training run to a repository of the Hugging Face Hub: the folder, and the push."""

from __future__ import annotations

import glob
import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import HfApi, ModelCard, constants, get_token, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf

from ..analysis.costs import model_cost, plot_costs
from ..analysis.runs import Run, read_run
from ..errors import VerificationError, explain, one_line
from ..resnets.checkpoints import fold
from .card import OWNER, constant_depth, describe, model_card, skips_work
from .pictures import plot_training
from .verify import (
    CARD,
    CONFIG,
    RECORD,
    WEIGHTS,
    check_contents,
    check_function,
    file_hash,
    other_weights,
    read_tensors,
    verify,
)

_SECRET = re.compile(rb'\bhf_[A-Za-z0-9]{20,}')
# What this package writes: of these a new push leaves none behind that it does not write again.
_OWN = (CARD, CONFIG, RECORD, 'args.yaml', 'summary.csv', 'training.png', 'survival.png')


@dataclass(frozen=True)
class Published:
    """What a push left on the Hub.

    Attributes:
        url: The revision's page.
        revision: The commit.
        sha256: Of `model.safetensors`.
        line: Python that loads it.
        changed: False if the repository held exactly this before.
    """

    url: str
    revision: str
    sha256: str
    line: str
    changed: bool


def prepare(
    source: Path,
    out: Path,
    repo_id: str,
    *,
    checkpoint: str | None = None,
    no_ema: bool = False,
    plain: bool = False,
    license: str | None = None,
    dataset: str | None = None,
) -> Path:
    """Write exactly what is to be sent to a new folder.

    Args:
        source: A run folder, or a finished repository folder, which is taken as it is but for the owner `USER` in
            its card, and for `.git` and `.cache`.
        out: The new folder.
        repo_id: `USER/NAME`.
        checkpoint: File name in the run folder; see `read_run`.
        no_ema: Take the raw weights where averaged ones are there too.
        plain: See `write_repository`, as for the rest.
        license: The Hub's name of the weights' licence.
        dataset: The data set's name on the Hub.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: `source` does not exist, or is neither.
        ValueError: A finished folder was given together with what only a run folder can take, or a name is not one.
        VerificationError: The finished folder is damaged, its card is another repository's, or a file holds a token.
    """
    if out.exists():
        raise FileExistsError(f'{out} exists; remove it, or choose another folder')
    if not source.is_dir():
        raise FileNotFoundError(f'{source} is not a folder; give a run folder or a finished repository folder')
    _check_repo_id(repo_id)
    if not (source / WEIGHTS).is_file() or not (source / CONFIG).is_file():
        run = read_run(source, checkpoint, not no_ema)
        return write_repository(run, out, repo_id, license=license, dataset=dataset, plain=plain)
    given = {'checkpoint': checkpoint, 'no-ema': no_ema, 'plain': plain, 'license': license, 'dataset': dataset}
    if refused := [f'--{name}' for name, value in given.items() if value]:
        raise ValueError(f'{source} is a finished repository: {", ".join(refused)} must be given when it is written')
    verify(str(source), report=lambda line: None)
    card = _check_card(source, repo_id)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns('.git', '.cache'))  # of a clone or a download
    (out / CARD).write_text(card, encoding='utf-8')
    try:
        refuse_secrets(out)
    except VerificationError:
        shutil.rmtree(out)
        raise
    return out


def _check_repo_id(repo_id: str) -> None:
    """The client takes a bare NAME too, and makes a repository of it under the token's owner."""
    try:
        validate_repo_id(repo_id)
        known = repo_id.count('/') == 1
    except HFValidationError:
        known = False
    if not known:
        raise ValueError(f'repo-id must be USER/NAME, got {repo_id!r}')


def read_listing(listing: Path) -> list[tuple[Path, str, bool]]:
    """`hub/repos.yaml`: folder, repository and whether it is private, of everything that is published.

    Args:
        listing: A list of entries with `folder` (relative to the listing's parent folder), `repo_id`, `license` and
            `visibility` (`public` or `private`).

    Raises:
        ValueError: An entry is incomplete, or its licence is not its card's.
    """
    try:
        entries = yaml.safe_load(listing.read_text(encoding='utf-8')) or []
    except (yaml.YAMLError, OSError) as error:
        raise ValueError(f'{listing} cannot be read: {one_line(error)}') from error
    keys = {'folder', 'repo_id', 'license', 'visibility'}
    found = []
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != keys or entry['visibility'] not in ('public', 'private'):
            raise ValueError(
                f'{listing}: an entry must have {", ".join(sorted(keys))} (public or private), got {entry}'
            )
        folder = listing.absolute().parent.parent / entry['folder']
        if not (folder / CARD).is_file():
            raise ValueError(f'{listing}: {entry["folder"]} holds no {CARD}')
        if (license := ModelCard.load(folder / CARD).data.license) != entry['license']:
            raise ValueError(f'{listing}: license of {folder.name} is {entry["license"]!r}, its card says {license!r}')
        found.append((folder, entry['repo_id'], entry['visibility'] == 'private'))
    return found


def write_repository(
    run: Run,
    out: Path,
    repo_id: str,
    *,
    license: str | None = None,
    dataset: str | None = None,
    plain: bool = False,
) -> Path:
    """Write a folder laid out like a repository of the Hub: weights, configuration, card, pictures, record.

    Args:
        run: The training run and its checkpoint.
        out: The folder; one that is there is replaced when the new one is complete.
        repo_id: `USER/NAME`, for the card.
        license: The Hub's name of the weights' licence.
        dataset: The data set's name on the Hub.
        plain: Fold the survival probabilities in: for ImageNet's nets an ordinary timm ResNet.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: The run's files do not belong together, or its network is timm's, converted.
        VerificationError: What was written does not load, or holds a token of the Hub; it is not left behind.
    """
    if run.converted:
        raise ValueError(
            f"{run.name} is timm's network, and this publishes the package's own; publish it with timm's "
            'push_to_hf_hub(sd_resnet.pruning.load(RUN), REPO)'
        )
    trained: Any = run.model()
    model: Any = fold(trained) if plain else trained
    part = out.with_name(f'{out.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write_weights(run, model, part, license)
        cost = model_cost(trained, trained.pretrained_cfg['input_size'][-1])
        record = describe(run, trained, model, cost, file_hash(part / WEIGHTS), license, dataset)
        (part / RECORD).write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding='utf-8')
        (part / 'args.yaml').write_text(yaml.safe_dump(run.args), encoding='utf-8')
        if run.epochs:
            columns = list(run.epochs[-1])
            rows = [columns, *([f'{epoch.get(c, float("nan")):.10g}' for c in columns] for epoch in run.epochs)]
            (part / 'summary.csv').write_text(''.join(f'{",".join(row)}\n' for row in rows), encoding='utf-8')
            plot_training(run.epochs, part / 'training.png', constant_depth(record))
        if skips_work(record):
            plot_costs(cost, part / 'survival.png')
        model_card(record, run, repo_id).save(part / CARD)
        refuse_secrets(part)
        loaded = check_contents(part, str(out))
        check_function(trained, loaded, f'{out} computes something else than was trained; this is a bug of sd_resnet')
        if out.exists():
            shutil.rmtree(out)
        return part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> Published:
    """Bring a branch of a repository in line with this folder, in one commit, and check what arrived.

    The same commit deletes other weights beside these, and what an earlier push wrote and this one does not; other
    files, and folders, stay.

    Args:
        folder: As `write_repository` leaves it.
        repo_id: `USER/NAME`; created if it does not exist.
        private: Readable with a token of its owner only; None leaves an existing repository as it is.
        revision: Branch, created if it does not exist; None is `main`.
        message: Of the commit.

    Raises:
        ValueError: `repo_id` is no such name.
        VerificationError: Something is wrong with the folder, the Hub, or what came back, in one line. Until the
            commit, which is atomic, the branch is as it was.
    """
    _check_repo_id(repo_id)
    check_contents(folder, str(folder))
    _check_card(folder, repo_id)
    refuse_secrets(folder)
    try:
        return _push(folder, repo_id, private, revision, message)
    except VerificationError:
        raise
    except Exception as error:
        reason, token = explain(error, repo_id), get_token()
        raise VerificationError(reason.replace(token, '***') if token else reason) from error


def _push(folder: Path, repo_id: str, private: bool | None, revision: str | None, message: str | None) -> Published:
    api = HfApi(library_name='sd-resnet')
    try:
        ModelCard.load(folder / CARD).validate()
    except ValueError as error:
        raise VerificationError(f'{CARD} is refused: {_objections(error)}; correct it (licence: --license)') from error
    try:
        info = api.model_info(repo_id)
        if private is not None and private != bool(info.private):
            api.update_repo_settings(repo_id, private=private)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=bool(private))
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    there = api.model_info(repo_id, revision=revision)
    names = [file.rfilename for file in there.siblings or []]
    former = [name for name in names if other_weights(name) or name in _OWN]
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        parent_commit=there.sha,  # another push in between makes this one fail
        commit_message=message or f'Publish {folder.name}',
        delete_patterns=[glob.escape(file) for file in former],  # but for what is in the folder
    )
    sha256 = _compare_published(folder, repo_id, commit.oid)
    at = f'@{revision}' if revision else ''
    return Published(
        f'{constants.ENDPOINT}/{repo_id}/tree/{commit.oid}',
        commit.oid,
        sha256,
        f"timm.create_model('hf-hub:{repo_id}{at}', pretrained=True)",
        commit.oid != there.sha,
    )


def _objections(error: ValueError) -> str:
    """To a card: the client's, or the server's, which are JSON."""
    try:
        found = ', '.join(each['message'] for each in json.loads(str(error))['errors'])
    except (ValueError, LookupError, TypeError):
        found = str(error)
    return ' '.join(found.split())[:300]


def refuse_secrets(folder: Path) -> None:
    """Raise where a file holds a token of the Hub, without repeating it.

    Raises:
        VerificationError: With the file's name.
    """
    token = (get_token() or '').encode()
    for path in sorted(path for path in folder.rglob('*') if path.is_file() and path.name != WEIGHTS):
        content = path.read_bytes()
        if _SECRET.search(content) or (token and token in content):
            name = path.relative_to(folder)
            raise VerificationError(f'{name} holds a token of the Hub, nothing was sent; remove it, and revoke it')


def _check_card(folder: Path, repo_id: str) -> str:
    """A card must be of these weights, and say how to load them from where they go; it is returned with its owner."""
    try:
        card = (folder / CARD).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise VerificationError(f'{folder} holds no {CARD} of text; publish the run folder instead') from error
    card = card.replace(f'{OWNER}/{repo_id.split("/")[-1]}', repo_id)
    if not re.search(rf'hf-hub:{re.escape(repo_id)}(?![\w./-])', card):
        raise VerificationError(
            f'{folder}/{CARD} tells how to load another repository than {repo_id}; publish under its name, or publish '
            'the run folder'
        )
    if file_hash(folder / WEIGHTS) not in card:
        raise VerificationError(f'{folder}/{CARD} does not name the sha256 of {WEIGHTS}; publish the run folder')
    return card


def _write_weights(run: Run, model: Any, folder: Path, license: str | None) -> None:
    # timm adds what else the network was built with, as the arguments that came with weights from the Hub.
    args = {key: value for key, value in run.model_args.items() if not key.startswith('drop_path')}
    if hasattr(model, 'drop_path_rate'):
        args |= {key: getattr(model, key) for key in ('drop_path_schedule', 'drop_path_mode', 'drop_path_rescale')}
        if not model.drop_path_sync:
            args['drop_path_sync'] = False
        if isinstance(model.drop_path_schedule, str) or model.drop_path_rate is not None:
            rate = model.drop_path_rate
            args['drop_path_rate'] = 1 - model.survival_probs[-1] if rate is None else rate
    stem = model.conv1[0] if isinstance(model.conv1, torch.nn.Sequential) else model.conv1
    args |= {'in_chans': stem.in_channels, 'num_classes': model.num_classes}
    labels = {'label_names': run.label_names} if len(run.label_names or ()) == model.num_classes else {}
    save_for_hf(model, str(folder), labels, model_args=args, safe_serialization=True)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    del config['model_args']['num_classes']  # it is beside them, and transformers' wrapper takes it from there only
    config['pretrained_cfg']['hf_hub_filename'] = WEIGHTS  # else a failing request falls back to another file
    if license:
        config['pretrained_cfg']['license'] = license
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _compare_published(folder: Path, repo_id: str, revision: str) -> str:
    """Download a revision into an empty cache, and compare every file and every tensor; sha256 of the weights."""
    with tempfile.TemporaryDirectory() as cache:
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
        arrived = Path(snapshot_download(repo_id, revision=revision, cache_dir=cache, allow_patterns=files))
        for file in files:
            if not (arrived / file).is_file() or file_hash(folder / file) != file_hash(arrived / file):
                raise VerificationError(f'{repo_id}@{revision}: {file} came back different; push again')
        sent = read_tensors(folder / WEIGHTS, str(folder))
        model = timm.create_model(f'hf-hub:{repo_id}@{revision}', pretrained=True, cache_dir=cache)
        loaded = model.state_dict()
        if sent.keys() != loaded.keys() or not all(torch.equal(tensor, loaded[key]) for key, tensor in sent.items()):
            raise VerificationError(f'{repo_id}@{revision} loads other tensors than were sent; push again')
        return file_hash(arrived / WEIGHTS)
