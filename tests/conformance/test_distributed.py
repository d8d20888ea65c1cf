"""Two gloo ranks: what breaks for whoever trains on many devices (hanging ranks, parameters that drift apart).

All scenarios run in one pair of processes, `ranks.py`. SyncBatchNorm refuses CPU tensors: a stand-in waits like it.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .ranks import SCENARIOS

WORKER = Path(__file__).with_name('ranks.py')
TRAINED = [name for name in SCENARIOS if not name.startswith('refusal')]


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """Rank 0's and rank 1's, by scenario."""
    folder = tmp_path_factory.mktemp('ranks')
    outs = [folder / f'{rank}.json' for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, WORKER, folder / 'store', str(rank), outs[rank]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=280)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], '\n'.join(outputs)[-5000:]
    first, second = (json.loads(out.read_text()) for out in outs)
    return {name: (first[name], second[name]) for name in SCENARIOS}


@pytest.mark.parametrize('scenario', TRAINED)
def test_ranks_stay_equal(results, scenario):
    first, second = results[scenario]
    assert 'error' not in first, first['error']
    assert 'error' not in second, second['error']
    assert first['parameters'] == second['parameters']
    assert first.get('ema') == second.get('ema')


@pytest.mark.parametrize('scenario', [name for name in TRAINED if 'row' not in name and 'subset' not in name])
def test_ranks_drop_the_same_blocks_in_batch_mode_unless_told_not_to(results, scenario):
    first, second = (result['decisions'] for result in results[scenario])
    assert len(first) >= 6
    assert any(not decision for step in first for decision in step)
    assert (first == second) == (scenario != 'unsynchronised')


def test_own_decisions_are_refused_with_sync_batchnorm_on_every_rank(results):
    for rank in results['refusal']:
        assert len(rank['messages']) == 4  # the network, its features, a stage and a block
        assert all('SyncBatchNorm needs decisions that all ranks share' in message for message in rank['messages'])
