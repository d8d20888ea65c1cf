"""Files and folders are written whole, or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write a file or a folder to, which then takes its place; if anything fails, none does.

    Args:
        path: What is there is replaced, a file by a file, a folder by a folder.
    """
    part = path.with_name(f'{path.name}.part')
    _remove(part)
    try:
        yield part
        if part.is_dir():
            _remove(path)
        part.replace(path)
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
