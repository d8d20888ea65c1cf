"""What the command line's parts share."""

from __future__ import annotations

import argparse
from pathlib import Path


class UsageError(Exception):
    """Wrong usage that argparse cannot see."""


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text!r}')
    return int(text)


def output_file(text: str) -> Path:
    """A file that is written after much work: that its folder is there is seen before."""
    path = Path(text)
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f'must be in a folder that exists, got {text!r}')
    return path
