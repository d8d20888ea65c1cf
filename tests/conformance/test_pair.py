"""The pair of ranks itself: a test that fails must not make the next one fail, and must say what each rank saw."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from .pair import LIMIT, Failed, Pair


def add():
    number = torch.tensor(dist.get_rank() + 1)
    dist.all_reduce(number)
    return int(number)


def raises_on_both():
    raise ValueError(f'not on rank {dist.get_rank()}')


def dies_on_one():
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return add()


def hangs_on_both():
    print('printed before')
    time.sleep(3600)


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    pair = Pair(tmp_path_factory.mktemp('own'), grace=LIMIT)
    yield pair
    pair.stop()


@pytest.mark.parametrize(
    ('scenario', 'limit', 'expected'),
    [
        (raises_on_both, LIMIT, ['ValueError: not on rank 0', 'ValueError: not on rank 1']),
        (dies_on_one, LIMIT, ['rank 1: died with exit code -9', 'Traceback']),  # the other sees a closed connection
        (hangs_on_both, 3, ['rank 0: hung', 'rank 1: hung', 'most recent call first']),
    ],
)
def test_a_failure_is_told_by_both_ranks_and_leaves_the_next_scenario_alone(
    pair, monkeypatch, scenario, limit, expected
):
    assert pair.run(add) == [3, 3]
    with monkeypatch.context() as patch:
        patch.setattr(pair, 'limit', limit)
        with pytest.raises(Failed) as failure:
            pair.run(scenario)
    assert all(text in str(failure.value) for text in expected), failure.value
    assert pair.run(add) == [3, 3]
