"""Two gloo ranks: what breaks for whoever trains on many devices (hanging ranks, parameters that drift apart).

Each scenario runs in the pair of processes of `pair.py`, under its own time-out. SyncBatchNorm refuses CPU tensors: a
stand-in waits like it.
"""

import pytest
import torch

from . import ranks
from .ranks import RATE, STEPS

OWN, CIFAR, CONVERTED = 'sd_resnet18', 'sd_resnet20_cifar', 'sd_vit_tiny_patch16_224'
MODES = ('batch', 'row', 'subset')


def _trainings():
    """Arguments of `ranks.train`, by a name."""
    flags = ('', 'accumulate', 'amp', 'checkpointing', 'compiled', 'features_only')
    rows = [(name, mode, flag) for name in (OWN, CIFAR) for mode in MODES for flag in flags]
    rows += [(CONVERTED, mode, flag) for mode in ('batch', 'subset') for flag in ('', 'checkpointing')]
    rows += [(OWN, mode, 'stand_in') for mode in ('batch', 'subset')]
    for name, mode, flag in rows:
        yield f'{name} {mode} {flag}', dict(name=name, drop_path_mode=mode, **({flag: True} if flag else {}))
    yield 'stand_in accumulate', dict(name=OWN, stand_in=True, accumulate=True)


def _assert_equal(first, second):
    assert first['parameters'] == second['parameters']
    assert first.get('ema') == second.get('ema')


def _assert_same_blocks(first, second):
    assert first['ran'] == second['ran']
    assert len(first['ran']) == STEPS
    assert any(len(set(step)) < first['blocks'] for step in first['ran'])
    assert any(first['ran'])


@pytest.mark.parametrize('kwargs', [pytest.param(kwargs, id=name.strip()) for name, kwargs in _trainings()])
def test_ranks_stay_equal_and_in_batch_mode_drop_the_same_blocks(two_ranks, kwargs):
    first, second = two_ranks.run(ranks.train, **kwargs)
    _assert_equal(first, second)
    if kwargs.get('drop_path_mode', 'batch') == 'batch':
        _assert_same_blocks(first, second)


@pytest.mark.parametrize('name', [OWN, CIFAR, CONVERTED])
def test_ranks_drop_different_blocks_if_they_are_told_to(two_ranks, name):
    first, second = two_ranks.run(ranks.train, name, drop_path_mode='batch', drop_path_sync=False)
    _assert_equal(first, second)
    assert first['ran'] != second['ran']


@pytest.mark.parametrize('ramp', [None, ('warmup', 4)], ids=['', 'ramp'])
@pytest.mark.parametrize(('name', 'kwargs'), [(OWN, {'drop_path_rescale': 'train'}), (CONVERTED, {})])
def test_one_more_forward_pass_on_one_rank_does_not_part_the_draws(two_ranks, name, kwargs, ramp):
    """Rank 0 alone looks at its training loss, or counts FLOPs: SyncBatchNorm would wait for ever after it."""
    kwargs = dict(drop_path_mode='batch', drop_path_ramp=ramp, **kwargs)
    first, second = two_ranks.run(ranks.train, name, extra=True, **kwargs)
    _assert_same_blocks(first, second)
    assert first['p_l'] == second['p_l']


@pytest.mark.parametrize('mode', ['batch', 'subset'])
@pytest.mark.parametrize('name', [OWN, CONVERTED])
def test_a_ramp_moves_in_step_on_every_rank(two_ranks, name, mode):
    rescale = {} if name == CONVERTED else {'drop_path_rescale': 'train'}
    first, second = two_ranks.run(ranks.train, name, drop_path_mode=mode, drop_path_ramp=('warmup', 4), **rescale)
    _assert_equal(first, second)
    assert first['p_l'] == second['p_l'] == pytest.approx([1 - RATE * min(1, step / 4) for step in range(STEPS)])
    if mode == 'batch':
        _assert_same_blocks(first, second)
        assert len(set(first['ran'][0])) == first['blocks']  # nothing is dropped in the first step


@pytest.mark.parametrize('name', [OWN, CONVERTED])
def test_a_rank_that_joins_later_drops_what_the_others_drop(two_ranks, tmp_path, name):
    before, after = zip(*two_ranks.run(ranks.train_with_a_newcomer, name, tmp_path / 'store', drop_path_mode='batch'))
    for first, second in (before, after):
        _assert_equal(first, second)
        _assert_same_blocks(first, second)


def test_own_decisions_are_refused_with_sync_batchnorm_on_every_rank(two_ranks):
    for messages in two_ranks.run(ranks.refusals, OWN):
        assert len(messages) == 7  # network, features, stage, block; where ranks share, blind network, stage, block
        assert all('SyncBatchNorm needs decisions that all ranks share' in message for message in messages)


@pytest.mark.skipif(not ranks.SHARDS, reason="this torch's fully_shard does not run on a CPU")
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('blocks', [True, False], ids=['blocks', 'whole'])
@pytest.mark.parametrize('name', [OWN, CONVERTED])
def test_sharded_networks_train(two_ranks, name, blocks, mode):
    first, second = two_ranks.run(ranks.train_sharded, name, blocks, drop_path_mode=mode)
    _assert_equal(first, second)
    if mode == 'batch':
        _assert_same_blocks(first, second)


def _on(count, two_ranks, function, *args, **kwargs):
    """What one process or two ranks give, which must be the same on both."""
    results = set(two_ranks.run(function, *args, **kwargs) if count == 2 else [function(*args, **kwargs)])
    assert len(results) == 1
    return results.pop()


@pytest.mark.filterwarnings('ignore:torch.distributed is')  # in the one process
@pytest.mark.parametrize('loading', [1, 2])
@pytest.mark.parametrize('saving', [1, 2])
@pytest.mark.parametrize(('name', 'kwargs'), [(OWN, {'drop_path_rescale': 'train'}), (CONVERTED, {})])
def test_a_distributed_checkpoint_computes_the_same_at_another_rate(two_ranks, tmp_path, name, kwargs, saving, loading):
    """`dcp.load` writes into the tensors and calls nothing of the network."""
    folder = str(tmp_path / 'checkpoint')
    saved = _on(saving, two_ranks, ranks.save_distributed, folder, name, **kwargs)
    loaded = _on(loading, two_ranks, ranks.load_distributed, folder, name, drop_path_rate=0.2, **kwargs)
    assert loaded == saved


@pytest.mark.parametrize(('count', 'broadcast'), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(('name', 'kwargs'), [(OWN, {'drop_path_rescale': 'train'}), (CONVERTED, {})])
def test_a_plain_networks_state_dict_computes_the_same_in_shards(two_ranks, tmp_path, name, kwargs, count, broadcast):
    plain = ranks.create(name.removeprefix('sd_'))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.rand_like(parameter), alpha=0.1)
    torch.save(plain.state_dict(), tmp_path / 'plain.pth')
    loaded = _on(count, two_ranks, ranks.load_whole, tmp_path / 'plain.pth', name, broadcast, **kwargs)
    assert loaded == ranks.logits(plain)
