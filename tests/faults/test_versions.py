"""Compilers, of every torch that is supported: a rate that moves must move in compiled code, and blocks must compile.

Faults 24 and 25 of the first edition, where these tests were seen red with torch 2.5.1 and 2.11 (commit 495752d); with
2.14 it passed them.
"""

import copy
import functools
import itertools
import math

import pytest
import torch

from ..conftest import images
from .observed import MODES, RATE, ROWS, P, check_step, converted, observe, own, put, tiny, vit

each_mode = pytest.mark.parametrize('mode', MODES)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Shallow, since every block is compiled
NETWORKS = {
    'own': functools.partial(own, layers=(2, 1, 1, 1)),
    'converted': functools.partial(converted, layers=(2, 2, 1, 1)),
    'vit': vit,
    'tiny': tiny,
}
each_network = pytest.mark.parametrize('kind', NETWORKS)
RAMPED = {
    'own': lambda mode, ramp: NETWORKS['own'](mode, drop_path_ramp=ramp),
    'vit': lambda mode, ramp: vit(mode, drop_path_ramp=ramp),
    'converted': lambda mode, ramp: NETWORKS['converted'](mode, ramp=ramp),
    'tiny': lambda mode, ramp: tiny(mode, ramp=ramp),
}


def changed_rows(case, out, x):
    """Share of the images whose output is not the undropped one's."""
    with torch.no_grad():
        return ((out - case.plain(x)).abs().amax(1) > 1e-9).double().mean().item()


@each_mode
@pytest.mark.parametrize('kind', RAMPED)
def test_a_ramp_moves_the_rate_in_compiled_code_or_is_refused(kind, mode):
    """Fault 24: a warm-up stayed at 0 for the whole of a compiled training; nothing dropped, and nothing said so."""
    steps = 3
    case = RAMPED[kind](mode, ('warmup', steps))
    compiled = torch.compile(case.model, backend='eager')
    x = images(ROWS, dtype=torch.float64)
    torch.manual_seed(0)
    for step in range(3 * steps):
        try:
            out = compiled(x)
        except Exception as error:
            if 'drop_path_ramp' not in str(error):
                raise
            return
        out.sum().backward()
        if step == 0:
            assert changed_rows(case, out.detach(), x) == 0
    shares = [changed_rows(case, compiled(x).detach(), x) for _ in range(8)]
    assert sum(shares) / len(shares) > 0.3
    assert min(1 - m.drop_prob for m in case.model.modules() if hasattr(m, 'drop_prob')) == pytest.approx(P)


@each_mode
@pytest.mark.parametrize(('kind', 'ramp'), [('own', 'late'), ('vit', 'early'), ('vit', 'late')])
def test_dropping_is_switched_in_compiled_code(kind, ramp, mode):
    """Fault 24, of the other ramps: early dropping that never ends, or late dropping that never begins."""
    case = RAMPED[kind](mode, (ramp, 4))
    compiled = torch.compile(case.model, backend='eager')
    x = images(ROWS, dtype=torch.float64)
    torch.manual_seed(0)
    shares = []
    for _ in range(10):
        try:
            shares.append(changed_rows(case, compiled(x).detach(), x))
        except Exception as error:
            if 'drop_path_ramp' not in str(error):
                raise
            return
    early, late = shares[:4], shares[4:]
    assert max(early if ramp == 'late' else late) == 0
    assert max(late if ramp == 'late' else early) > 0


@each_mode
@pytest.mark.parametrize('kind', ['own', 'vit', 'converted'])
def test_a_rate_that_is_set_between_steps_counts_in_compiled_code(kind, mode):
    """Fault 24, without a ramp: schedules of one's own assign `drop_prob`, or call `set_drop_path`."""
    case = NETWORKS[kind](mode)
    compiled = torch.compile(case.model, backend='eager')
    x = images(ROWS, dtype=torch.float64)
    torch.manual_seed(0)
    assert max(changed_rows(case, compiled(x).detach(), x) for _ in range(6)) > 0
    for rate in (0.0, RATE):
        if kind == 'own':
            case.model.set_drop_path(rate=rate)
        else:
            for module in case.model.modules():
                if hasattr(module, 'drop_prob'):
                    module.drop_prob = rate
        most = max(changed_rows(case, compiled(x).detach(), x) for _ in range(6))
        assert (most > 0) == (rate > 0)


@each_mode
def test_the_share_of_surviving_rows_follows_a_ramp_step_by_step(mode):
    """Fault 24: half-way up a warm-up half of the rate is in force, in compiled code as in eager code."""
    steps = 160
    case = tiny(mode, ramp=('warmup', steps))
    compiled = torch.compile(case.model, backend='eager')
    x = images(ROWS, dtype=torch.float64)
    probs = [1 - RATE * step / steps for step in range(steps)]
    torch.manual_seed(0)
    survived = [_survivors(case, x, compiled(x).detach(), 1 / p) for p in probs]
    quarter = steps // 4
    for begin in range(0, steps, quarter):
        p = sum(probs[begin : begin + quarter]) / quarter
        share = sum(survived[begin : begin + quarter]) / (quarter * ROWS * len(case.blocks))
        error = math.sqrt(p * (1 - p) / (quarter * len(case.blocks)))  # rows of a batch may drop together
        assert abs(share - p) <= 4 * error


def _survivors(case, x, out, kept):
    """Number of branches of rows that survived, from the output alone."""
    plain = copy.deepcopy(case.plain).requires_grad_(False)
    outs, counts = [], []
    for choice in itertools.product((0.0, kept), repeat=len(case.blocks)):
        for name, factor in zip(case.blocks, choice):
            put(plain.get_submodule(name), case.slots, [factor])
        outs.append(plain(x))
        counts.append(sum(factor > 0 for factor in choice))
    best = (torch.stack(outs) - out).abs().amax(2).min(0)
    assert best.values.max() < 1e-8
    return sum(counts[index] for index in best.indices.tolist())


@each_mode
@pytest.mark.parametrize(('kind', 'backend'), [*((kind, 'eager') for kind in NETWORKS), ('vit', 'aot_eager')])
def test_networks_compile_as_a_whole(kind, backend, mode):
    """Fault 25: with torch 2.5.1 no converted network compiled."""
    case = NETWORKS[kind](mode)
    compiled = torch.compile(case.model, backend=backend)
    dropped, _ = _steps(case, compiled)
    assert dropped
    x = images(3, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(case.model.eval(), backend=backend)(x), case.plain(x))


@pytest.mark.parametrize('mode', ['subset', 'row'])
@each_network
def test_modes_that_draw_in_the_graph_compile_to_one(kind, mode):
    """Fault 25: with torch 2.5.1 the way to a block's forward pass broke the graph of every converted network."""
    case = NETWORKS[kind](mode)
    x = images(ROWS, dtype=torch.float64)
    compiled = torch.compile(case.model, backend='eager', fullgraph=True)
    torch.manual_seed(0)
    shares = [changed_rows(case, compiled(x).detach(), x) for _ in range(4)]
    assert max(shares) > 0
    case.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), case.plain(x))


@each_mode
@each_network
def test_blocks_compile_one_by_one(kind, mode):
    """Fault 25: with torch 2.11 a list times a symbolic truth value was too much for Dynamo."""
    case = NETWORKS[kind](mode)
    for name in case.blocks:
        case.model.get_submodule(name).compile(backend='eager')
    dropped = 0
    for rows in (ROWS, 10):  # sizes become symbols
        dropped += check_step(case, images(rows, dtype=torch.float64), seeds=range(1))[0]
    assert dropped


@each_mode
def test_stages_compile_one_by_one(mode):
    """Fault 25, a stage at a time, as large networks are compiled."""
    case = NETWORKS['own'](mode)
    for stage in (case.model.layer1, case.model.layer2):
        stage.compile(backend='eager')
    dropped = 0
    for rows in (ROWS, 10):
        dropped += check_step(case, images(rows, dtype=torch.float64), seeds=range(1))[0]
    assert dropped


@each_mode
@pytest.mark.parametrize('kind', ['own', 'vit'])
def test_batches_of_changing_size_compile(kind, mode):
    """Fault 25, as a whole: the last batch of an epoch is smaller."""
    case = NETWORKS[kind](mode)
    compiled = torch.compile(case.model, backend='eager')
    dropped = 0
    for rows in (10, 5, 10, 15):
        dropped += _steps(case, compiled, rows, seeds=1)[0]
    assert dropped


def _steps(case, compiled, rows=ROWS, seeds=2):
    """What survived is found in the compiled network's blocks themselves."""
    return check_step(case, images(rows, dtype=torch.float64), seeds=range(seeds), model=compiled)


def test_hooks_do_not_keep_a_network_from_compiling():
    """The tests above look through hooks: without any, compiled and eager steps of one seed agree."""
    for kind in NETWORKS:
        case = NETWORKS[kind]('row')
        x = images(ROWS, dtype=torch.float64)
        torch.manual_seed(3)
        eager = case.model(x)
        torch._dynamo.reset()
        torch.manual_seed(3)
        torch.testing.assert_close(torch.compile(case.model, backend='eager')(x), eager)
        torch.manual_seed(3)
        assert observe(case, x).dropped
