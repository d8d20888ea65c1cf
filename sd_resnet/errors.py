"""What goes wrong in one line, cause and cure: on the command line, and between the Hub and a loaded network."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from urllib.parse import urlsplit

from huggingface_hub import constants, get_token
from huggingface_hub import errors as client


class UsageError(Exception):
    """Wrong usage that argparse cannot see."""


class VerificationError(ValueError):
    """What is wrong, and what to do about it, in one line."""


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Run a command line for its exit status: 0, 2 on wrong usage, else 1 after a one-line reason on standard error.

    The parser sets `run`, which takes the arguments, `command`, its name or '', and `debug`, to show the traceback.
    """
    args = parser.parse_args(argv)
    name = f'{parser.prog} {args.command}'.rstrip()
    try:
        args.run(args)
        return 0
    except UsageError as error:
        status, said = 2, f'{name}: error: {error}'
    except KeyboardInterrupt as error:
        status, said = 1, f'\n{name}: interrupted; {error}'.rstrip('; ')
    except Exception as error:
        if args.debug:
            raise
        status, said = 1, f'{name}: {one_line(error, length=None)}'
    print(said, file=sys.stderr)
    return status


@contextmanager
def explained(name: str) -> Iterator[None]:
    """What the Hub's client raises becomes a `VerificationError` about the repository `name`, without the token."""
    try:
        yield
    except VerificationError:
        raise
    except Exception as error:
        reason, token = explain(error, name), get_token()
        raise VerificationError(reason.replace(token, '***') if token else reason) from error


def explain(error: BaseException, name: str) -> str:
    """One line, cause and cure, for what the Hub's client raised about `USER/NAME` or `USER/NAME@REVISION`."""
    repo_id, _, revision = name.partition('@')
    hub = constants.ENDPOINT
    while error.__cause__ and (isinstance(error, client.LocalEntryNotFoundError) or not _is_of_the_network(error)):
        error = error.__cause__  # the client wraps what happened in advice of its own
    if isinstance(error, (client.OfflineModeIsEnabled, client.LocalEntryNotFoundError)):
        reason = 'HF_HUB_OFFLINE is set (unset it)' if constants.HF_HUB_OFFLINE else f'{hub} cannot be reached'
        return f'{reason} and {name} is not whole in the cache; load it once while online'
    if isinstance(error, client.HFValidationError):
        return f'{name} is neither a folder nor the name of a repository; give DIR, USER/NAME or USER/NAME@REVISION'
    if isinstance(error, client.RepositoryNotFoundError):  # or it is gated
        return f'{hub} has no {repo_id} for your token; check its name and conditions, or log in with: hf auth login'
    if isinstance(error, client.RevisionNotFoundError):
        return f'{repo_id} has no revision {revision or "main"!r}; see {hub}/{repo_id}/commits'
    if (response := getattr(error, 'response', None)) is not None:  # also of what the client's own client raised
        status, path = response.status_code, urlsplit(str(response.url)).path
        said = f'{path}: {one_line(getattr(error, "server_message", None) or "no reason given")}'
        if status in (401, 403):
            return f'{hub} refused ({status}) {said}; log in with a token that may do this: hf auth login'
        if status in (409, 412):
            return f'someone else changed {repo_id} meanwhile ({status}), nothing of yours is in it; push again'
        cure = 'correct that, or try again' if 400 <= status < 500 and status != 429 else 'try again later'
        return f'{hub} answered {status} to {said}; {cure}'
    if _is_of_the_network(error):
        return f'{hub} cannot be reached or broke off ({type(error).__name__}); check the connection, and try again'
    return f'{name}: {one_line(error)}; try again'


def _is_of_the_network(error: BaseException) -> bool:
    """Is it an answer of the Hub, or what kept it from answering?"""
    known = isinstance(error, (client.HfHubHTTPError, ConnectionError, TimeoutError))
    return known or type(error).__module__.startswith(('httpx', 'httpcore', 'requests', 'urllib3'))


def one_line(message: object, length: int | None = 200) -> str:
    """An error's message, or any text, shortened; its type where it is empty."""
    return ' '.join(str(message).split())[:length] or type(message).__name__
