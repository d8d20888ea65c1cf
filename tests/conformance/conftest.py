"""One pair of ranks for all tests that need them."""

import pytest

from .pair import Pair


@pytest.fixture(scope='session')
def two_ranks(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp('ranks'))
    yield pair
    pair.stop()
