"""What goes wrong between the Hub and a loaded network, in one line: cause and cure."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)


class VerificationError(ValueError):
    """What is wrong, and what to do about it, in one line."""


def explain(error: BaseException, name: str) -> str:
    """One line, cause and cure, for what the Hub's client raised."""
    repo_id, _, revision = name.partition('@')
    hub = constants.ENDPOINT
    while error.__cause__ is not None and not _is_telling(error):
        error = error.__cause__  # the client wraps what happened in advice of its own
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        reason = 'HF_HUB_OFFLINE is set' if constants.HF_HUB_OFFLINE else f'{hub} cannot be reached'
        cure = 'unset it' if constants.HF_HUB_OFFLINE else 'restore the connection'
        return f'{reason} and {name} is not whole in the cache; {cure} and load it once'
    if isinstance(error, HFValidationError):
        return f'{name} is neither a folder nor the name of a repository; give DIR, USER/NAME or USER/NAME@REVISION'
    if isinstance(error, GatedRepoError):
        return f'{repo_id} is gated; accept its conditions on {hub}/{repo_id}, and log in with: hf auth login'
    if isinstance(error, RepositoryNotFoundError):
        return f'{hub} has no {repo_id} that your token may read; check the name, or log in with: hf auth login'
    if isinstance(error, RevisionNotFoundError):
        return f'{repo_id} has no revision {revision or "main"!r}; see {hub}/{repo_id}/commits'
    if isinstance(error, EntryNotFoundError):
        return f'{name} lacks a file ({one_line(error)}); publish it again'
    response: Any = getattr(error, 'response', None)  # some versions of the client pass on what their own client raised
    status = getattr(response, 'status_code', None)
    if isinstance(error, HfHubHTTPError) or status is not None:
        path = re.sub(r'^https?://[^/]*|\?.*$', '', str(getattr(response, 'url', '')))
        message = getattr(error, 'server_message', None)
        said = f': {" ".join(message.split())[:200]}' if message else ''
        if status in (401, 403):
            return f'{hub} refused ({status}) {path}{said}; log in with a token that may do this: hf auth login'
        if status in (409, 412):
            return f'someone else changed {repo_id} meanwhile ({status}), nothing of yours is in it; push again'
        cure = 'correct that, or try again' if status and 400 <= status < 500 and status != 429 else 'try again later'
        return f'{hub} answered {status} to {path}{said}; {cure}'
    if _is_of_the_network(error):
        return f'{hub} cannot be reached or broke off ({type(error).__name__}); check the connection, and try again'
    return f'{name}: {one_line(error)}; try again'


def _is_telling(error: BaseException) -> bool:
    # before huggingface_hub 1.0 a file that is not in the cache was an answer of the Hub, too
    answered = isinstance(error, HfHubHTTPError) and not isinstance(error, LocalEntryNotFoundError)
    return answered or _is_of_the_network(error)


def _is_of_the_network(error: BaseException) -> bool:
    clients = ('httpx', 'httpcore', 'requests', 'urllib3')
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.startswith(clients)


def damage(path: Path) -> str | None:
    """What a file is that should hold tensors."""
    size = path.stat().st_size
    with path.open('rb') as file:
        start = file.read(64)
        if not start:
            return 'is empty'
        if start.lstrip()[:1] == b'<':
            return 'holds a web page instead of tensors'
        if start.startswith(b'version https://git-lfs'):
            return 'holds a pointer of Git LFS instead of tensors'
        if size >= 8:
            (header,) = struct.unpack('<Q', start[:8])
            file.seek(8)
            try:
                offsets = [v['data_offsets'][1] for k, v in json.loads(file.read(header)).items() if k[:2] != '__']
            except (ValueError, KeyError, TypeError, MemoryError, OverflowError):
                return None if header <= size else f'is cut short: {size} bytes, and its header alone has {header}'
            if (whole := 8 + header + max(offsets, default=0)) > size:
                return f'is cut short: {size} of {whole} bytes'
    return None


def one_line(error: BaseException) -> str:
    """An error's message, shortened; its type where it has none."""
    return ' '.join(str(error).split())[:200] or type(error).__name__
