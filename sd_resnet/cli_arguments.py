"""What the command line's parts share."""

from __future__ import annotations

import argparse


class UsageError(Exception):
    """Wrong usage that argparse cannot see."""


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of at least 1, got {text!r}')
    return int(text)
