"""From a folder to a repository of the Hugging Face Hub: one commit, and a look at what arrived."""

import filecmp
import glob
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import yaml
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from huggingface_hub.errors import RepositoryNotFoundError

from ..errors import VerificationError, explained, one_line
from .repository import OWN_FILES, prepare
from .verify import CARD, WEIGHTS, equal, file_hash, other_weights, read_tensors, refusing


def push(
    source: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    **options: Any,
) -> None:
    """Bring a branch of a repository in line with a folder, in one commit, and check what arrived.

    The same commit deletes other weights beside these, and what an earlier push wrote and this one does not. Repository
    and branch `revision` are created if they do not exist; for `source` and `options` see `prepare`.

    Raises:
        VerificationError: The folder, the Hub, or what came back is not right. Until the commit, which is atomic, the
            branch is as it was.
    """
    name = repo_id.split('/')[-1]
    with tempfile.TemporaryDirectory() as work:
        folder = prepare(source, Path(work) / name, repo_id, **options)
        with explained(repo_id):
            former, commit = _commit(folder, repo_id, private, revision, message or f'Publish {name}')
            _compare_published(folder, repo_id, commit)
        sha256 = file_hash(folder / WEIGHTS)
    at = f'@{revision}' if revision else ''
    print(f'{"no change" if commit == former else "url":<9}  {constants.ENDPOINT}/{repo_id}/tree/{commit}')
    print(f'revision   {commit}\nsha256     {sha256}  {WEIGHTS}')
    print(f"load it    timm.create_model('hf-hub:{repo_id}{at}', pretrained=True)")


def read_listing(listing: Path) -> list[tuple[Path, str, bool]]:
    """The folder, repository and privacy of all that is published, as `hub/repos.yaml` lists them; a fault is named."""
    with refusing(f'{listing} cannot be read', 'correct it', yaml.YAMLError, OSError):
        entries = yaml.safe_load(listing.read_text(encoding='utf-8')) or []
    found = []
    keys = ['folder', 'license', 'repo_id', 'visibility']
    for entry in entries:
        if not isinstance(entry, dict) or sorted(entry) != keys or entry['visibility'] not in ('public', 'private'):
            raise ValueError(f'{listing}: an entry must have {", ".join(keys)} (public or private), got {entry}')
        folder = listing.absolute().parent.parent / entry['folder']
        if not (folder / CARD).is_file():
            raise ValueError(f'{listing}: {entry["folder"]} holds no {CARD}')
        if (license := ModelCard.load(folder / CARD).data.license) != entry['license']:
            raise ValueError(f'{listing}: license of {folder.name} is {entry["license"]!r}, its card says {license!r}')
        found.append((folder, entry['repo_id'], entry['visibility'] == 'private'))
    return found


def _commit(folder: Path, repo_id: str, private: bool | None, revision: str | None, message: str) -> tuple[str, str]:
    """The commit that was there, and the one that is there now."""
    try:
        ModelCard.load(folder / CARD).validate()
    except ValueError as error:  # the client's own objections, or the Hub's, which are JSON
        objections = one_line(error)
        with suppress(ValueError, LookupError, TypeError):
            objections = ', '.join(each['message'] for each in json.loads(str(error))['errors'])
        raise VerificationError(f'{CARD} is refused: {objections}; correct it (licence: --license)') from error
    api = HfApi(library_name='sd-resnet')
    try:
        info = api.model_info(repo_id)
        if private is not None and private != bool(info.private):
            api.update_repo_settings(repo_id, private=private)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=bool(private))
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    branch: Any = {'repo_id': repo_id, 'revision': revision}
    there: Any = api.model_info(**branch)
    former = [*other_weights(file.rfilename for file in there.siblings or []), *OWN_FILES]
    outdated = [glob.escape(file) for file in former]  # but for what is in the folder
    branch['parent_commit'] = there.sha  # another push in between makes this one fail
    commit = api.upload_folder(**branch, folder_path=folder, commit_message=message, delete_patterns=outdated)
    return there.sha, commit.oid


def _compare_published(folder: Path, repo_id: str, revision: str) -> None:
    """Download a revision into an empty cache, and compare every file and every tensor."""
    name = f'{repo_id}@{revision}'
    with tempfile.TemporaryDirectory() as cache:
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
        arrived = Path(snapshot_download(repo_id, revision=revision, cache_dir=cache, allow_patterns=files))
        _, different, missing = filecmp.cmpfiles(folder, arrived, files, shallow=False)
        if different or missing:
            raise VerificationError(f'{name}: {(different + missing)[0]} came back different; push again')
        model = timm.create_model(f'hf-hub:{name}', pretrained=True, cache_dir=cache)
        if not equal(model.state_dict(), read_tensors(folder / WEIGHTS, str(folder))):
            raise VerificationError(f'{name} loads other tensors than were sent; push again')
