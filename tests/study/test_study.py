"""Whoever reruns the study, or reads its tables: nothing finished is lost, the same seed and records give the same."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from torch import nn

from sd_resnet.analysis import datasets
from sd_resnet.analysis.evaluation import evaluate
from sd_resnet.core.drop_path import StochasticDepth
from sd_resnet.core.schedules import survival_probs
from sd_resnet.resnets.paper_rescaling import evaluation_factor
from sd_resnet.study import measuring
from sd_resnet.study.__main__ import main
from sd_resnet.study.cells import CELLS, Records, Scale, write_record
from sd_resnet.study.claims import CLAIMS
from sd_resnet.study.report import plot_study, write_report
from sd_resnet.study.running import run

from ..conftest import decide, images, make, one_line

ROOT = Path(__file__).parents[2]
REPO = os.environ.get('TIMM_REPO')
needs_clone = pytest.mark.skipif(not REPO, reason="TIMM_REPO does not name a clone of timm's repository")
P = survival_probs(15, 0.5)
SCALE = Scale('sd_resnet20_cifar', images=200, epochs=3, val_interval=2, networks=2, removals=1)


def made_up(cell, epochs=20):
    """A record with numbers that nobody measured, lower errors for stochastic depth."""
    constant = cell.method == 'constant'
    curve = [math.exp(-epoch / (4 if constant else 9)) for epoch in range(epochs)]
    error = (14 if constant else 13) - 3 * cell.augmented + 0.1 * (cell.seed % 3)
    analysis = None
    if cell.analysed:
        one = error + (30 if constant else 3)
        averages = {str(n): [error + (one - error) / n] * (32 // n) for n in (1, 2, 4, 8, 16, 32)}
        removed = {str(n): [error + n * (5 if constant else 1) + i / 10 for i in range(5)] for n in range(1, 11)}
        analysis = {'full': error, 'averages': averages, 'removed': removed}
    return {
        **dataclasses.asdict(cell),
        'survival_probs': [1.0] * 15 if constant else list(P),
        'scale': dataclasses.asdict(Scale()),
        'steps_per_epoch': 15,
        'epochs': {
            'lr': [0.1] * epochs,
            'train_loss': [2 * value + 0.001 + 0.0001 * (cell.seed % 3) for value in curve],
            'test_loss': [1.0 if epoch % 5 == 4 else None for epoch in range(epochs)],
            'test_error': [error + 8 * curve[epoch] if epoch % 5 == 4 else None for epoch in range(epochs)],
            'depth': [15.0 if constant else 11 + 0.05 * (-1) ** epoch for epoch in range(epochs)],
            'gradient': [0.01 * value + (1e-4 if constant else 1e-3) for value in curve],
            'cpu_seconds': [4.0 if constant else 3.1 for _ in range(epochs)],
        },
        'analysis': analysis,
    }


@pytest.fixture
def records(tmp_path):
    folder = tmp_path / 'records'
    folder.mkdir()
    for cell in CELLS:
        write_record(made_up(cell), folder / f'{cell.name}.json')
    return folder


def test_the_same_records_give_the_same_bytes(records, tmp_path):
    write_report(Records(records))
    first = (records / 'tables.md').read_bytes()
    (records / 'tables.md').unlink()
    write_report(Records(records))
    assert Records(records).missing == []
    assert (records / 'tables.md').read_bytes() == first
    assert b'no record yet' not in first
    assert b'Missing' not in first


def test_the_claims_follow_from_the_records(records):
    write_report(Records(records))
    claims = (records / 'tables.md').read_text().split('## Cells')[0]
    # errors: 14 + 8 exp(-19/4) and 13 + 8 exp(-19/9), and 0, 0.1 or 0.2 more by seed; depths 11.05 and 10.95
    assert 'constant 14.17 ± 0.09 (6 seeds), p_L = 0.5 14.07 ± 0.09 (6 seeds) %' in claims
    assert '| undecided: +0.10 points (-0.01 to +0.22)' in claims
    assert 'yes: 0.78 to 0.78; +0.039 from the share of FLOPs, standard error 0.000' in claims  # 3.1 of 4 s, 0.736
    assert '| loss yes; error undecided: +0.10 points (-0.01 to +0.22) |' in claims
    assert '11.000 in 1,800 steps; L = 15: 11.00' in claims
    assert '| undecided: +0.00 points, standard error 0.13, to the next |' in claims  # 0.09 times the root of 2
    assert '| yes: +3.00 points, standard error 0.52; one network |' in claims  # one: 16 %, the whole 13 %
    assert '4 removed: +20.2 and +4.2 points' in claims
    assert '| undecided, one network of each: less at 10 of 10 numbers |' in claims
    record = json.loads((records / 'linear-0.5-seed0.json').read_text())
    record['epochs']['depth'] = [9.0] * 20
    record['analysis']['removed']['2'] = [90.0] * 5
    write_record(record, records / 'linear-0.5-seed0.json')
    write_report(Records(records))
    claims = (records / 'tables.md').read_text()
    assert '| no: -0.333, standard error' in claims
    assert 'less at 9 of 10 numbers' in claims


def test_a_part_of_the_cells_is_reported_and_the_rest_named(records, tmp_path, capsys):
    pytest.importorskip('matplotlib', reason='the pictures are drawn with matplotlib')
    for name in ('constant-seed0', 'augmented-constant-seed0', 'augmented-constant-seed1', 'augmented-constant-seed2'):
        (records / f'{name}.json').unlink()
    assert main(['--report', '--out', str(records)]) == 0
    assert 'missing cells: constant-seed0, augmented-constant-seed0' in capsys.readouterr().out
    tables = (records / 'tables.md').read_text()
    assert 'Missing cells: constant-seed0, augmented-constant-seed0' in tables
    assert 'no record yet' in tables
    for path in records.glob('*.json'):
        path.unlink()
    assert main(['--report', '--out', str(records)]) == 1
    assert 'holds no record of a cell' in one_line(capsys)


def test_every_picture_is_drawn(records):
    pytest.importorskip('matplotlib', reason='the pictures are drawn with matplotlib')
    drawn = plot_study(Records(records))
    assert [path.stem for path in drawn] == ['curves', 'gradient', 'sweep', 'sub_networks']
    assert all(path.read_bytes().startswith(b'\x89PNG') for path in drawn)


def test_each_claim_names_cells_that_there_are(records):
    """In the last column, in the shell's braces: whoever runs these again, and no others, gets the claim's row."""
    write_report(Records(records))
    claims = (records / 'tables.md').read_text().split('## Cells')[0]
    patterns = re.findall(r'`([^` ]*seed[^` ]*)` \|$', claims, re.MULTILINE)
    assert len(patterns) == claims.count('\n| ') - 2
    for pattern, (measure, _, _) in zip(patterns, CLAIMS, strict=True):
        named = [cell for cell in CELLS if cell.name in expanded(pattern)]
        assert {cell.name for cell in named} == set(expanded(pattern)), pattern
        assert measure(Records(records, named, Scale())) == measure(Records(records)), pattern


def expanded(pattern):
    found = re.search(r'\{([^{}]*,[^{}]*)\}', pattern)  # the shell leaves braces without a comma alone
    if not found:
        return [pattern]
    return [
        name
        for part in found[1].split(',')
        for name in expanded(pattern[: found.start()] + part + pattern[found.end() :])
    ]


def test_seeds_without_a_counterpart_are_reported(records):
    for path in records.glob('*.json'):
        if path.stem not in ('constant-seed0', 'linear-0.5-seed1'):
            path.unlink()
    write_report(Records(records))
    assert len(Records(records).missing) == len(CELLS) - 2
    assert '| yes |' in (records / 'tables.md').read_text()  # of the gradients


def test_records_of_something_else_are_named(records, fashion, tmp_path, capsys):
    script = tmp_path / 'train.py'
    script.touch()
    path = records / 'constant-seed1.json'
    good = json.loads(path.read_text())
    common = ['--out', str(records)]
    for wrong in ({}, [], {**good, 'seed': 2}, {key: good[key] for key in good if key != 'epochs'}):
        path.write_text(json.dumps(wrong))
        assert main([*common, '--report']) == 1
        assert 'constant-seed1.json is not a record of constant-seed1' in one_line(capsys)
        assert main([*common, '--script', str(script), '--data', str(fashion)]) == 1  # nor is it a finished cell
        assert 'remove it to run that cell again' in one_line(capsys)
    path.write_text('{')
    assert main([*common, '--report']) == 1
    assert 'constant-seed1.json is damaged' in one_line(capsys)
    path.write_text(json.dumps({**good, 'scale': {**good['scale'], 'images': 200}}))
    assert main([*common, '--report']) == 1
    assert 'a record of another scale' in one_line(capsys)
    assert main([*common, '--script', str(script), '--data', str(fashion)]) == 1
    assert 'a record of another scale' in one_line(capsys)


def test_what_is_published_is_what_the_command_writes(tmp_path):
    """docs/study/tables.md, from the records beside it."""
    published = ROOT / 'docs' / 'study'
    if not list(published.glob('*.json')):
        pytest.skip('no cell is finished yet')
    folder = tmp_path / 'docs' / 'study'
    shutil.copytree(published, folder)
    write_report(Records(folder))
    assert (folder / 'tables.md').read_text() == (published / 'tables.md').read_text()


def test_a_record_is_written_whole_and_reads_back(tmp_path):
    record = made_up(CELLS[0])
    write_record(record, tmp_path / 'cell.json')
    assert json.loads((tmp_path / 'cell.json').read_text())['analysis']['averages'] == record['analysis']['averages']
    with pytest.raises(TypeError):
        write_record({'x': object()}, tmp_path / 'cell.json')
    assert json.loads((tmp_path / 'cell.json').read_text())['method'] == 'constant'


@pytest.fixture
def global_hooks(monkeypatch):
    """Removed after the test."""
    handles = []
    for name in ('register_module_forward_hook', 'register_optimizer_step_post_hook'):
        register = getattr(measuring, name)
        monkeypatch.setattr(measuring, name, lambda hook, register=register: handles.append(register(hook)))
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.usefixtures('global_hooks')
def test_what_the_recorder_sees():
    """Two steps, in one of which blocks are dropped, against the same numbers by hand."""
    model = make('sd_resnet20_cifar', train=True)
    recorder = measuring.Recorder(model, 2, os.getppid())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, gradients, counts = [], [], []
    for probability in (1.0, 1e-9):
        for block in model.blocks():
            block.drop_path.configure(probability, 'batch')
        optimizer.zero_grad()
        loss = nn.CrossEntropyLoss()(model(images(8)), torch.arange(8))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        gradients.append(model.conv1.weight.grad.abs().mean().item())
        counts.append(9 if probability == 1 else 0)
        model.eval()(images(8))  # a test in between is not counted
        nn.CrossEntropyLoss()(torch.randn(2, 2), torch.arange(2))
        model.train()
    (epoch,) = recorder.epochs
    assert epoch['train_loss'] == pytest.approx(sum(losses) / 2)
    assert epoch['gradient'] == pytest.approx(sum(gradients) / 2)
    assert (epoch['depth'], epoch['lr']) == (sum(counts) / 2, 0.1)
    assert epoch['cpu_seconds'] > 0
    assert recorder.block_runs == [1.0] * 9


@pytest.mark.usefixtures('global_hooks')
def test_subset_mode_is_counted_by_rows():
    model = make('sd_resnet20_cifar', train=True, drop_path_mode='subset', drop_path_schedule='uniform')
    recorder = measuring.Recorder(model, 2, os.getppid())
    model(images(8))
    assert recorder.block_runs == [0.5] * 9


def test_sub_networks_and_removed_blocks(fashion):
    """A factor of one for every block is the network itself; dropping in training runs the same sub-network."""
    model = make('sd_resnet20_cifar', in_chans=1, drop_path_rate=0.5, drop_path_rescale='test')
    cfg = {'input_size': (1, 28, 28), 'mean': (0.286,), 'std': (0.353,)}
    model.pretrained_cfg = {**model.pretrained_cfg, **cfg}
    x = images(8)[:, :1]
    tested = [evaluation_factor(block) for block in model.blocks()]
    with torch.no_grad():
        torch.testing.assert_close(measuring._logits(model, x, tested), model(x))
        kept = [True, False, True, False, False, True, False, True, True]
        found = measuring._logits(model, x, [float(b) for b in kept])
        for module in model.modules():  # training decisions, BatchNorm as in evaluation
            module.training = isinstance(module, StochasticDepth)
        decide(model, kept)
        assert torch.allclose(found, model(x), rtol=1e-5, atol=1e-5)
    del model.draw
    model.eval()
    scale = Scale(networks=4, removals=2)
    analysis = measuring.analyse(model, fashion, scale, seed=0)
    assert analysis == measuring.analyse(model, fashion, scale, seed=0)
    with torch.autocast('cpu', torch.bfloat16):
        assert analysis['full'] == pytest.approx(100 - evaluate(model, fashion).top1, abs=1e-3)
    assert {n: len(errors) for n, errors in analysis['averages'].items()} == {1: 4, 2: 2, 4: 1}
    assert {n: len(errors) for n, errors in analysis['removed'].items()} == {1: 9, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2}


def test_unknown_cells_and_a_missing_script_are_named(fashion, tmp_path, capsys):
    common = ['--data', str(fashion), '--work', str(tmp_path / 'work'), '--out', str(tmp_path / 'out')]
    assert main([*common, '--script', str(tmp_path / 'train.py')]) == 1
    assert 'give train.py of a clone' in one_line(capsys)
    (tmp_path / 'train.py').touch()
    assert main([*common, '--script', str(tmp_path / 'train.py'), '--cells', 'linear']) == 1
    assert 'cells must be among constant-seed0' in one_line(capsys)
    assert main(common) == 2
    assert main(['--report', '--cells', 'constant-seed0']) == 2
    assert main([*common, '--script', 'train.py', '--jobs', '0']) == 2


def test_two_studies_do_not_share_a_work_folder(fashion, tmp_path, capsys):
    (tmp_path / 'train.py').touch()
    (tmp_path / 'work').mkdir()
    common = ['--data', str(fashion), '--work', str(tmp_path / 'work'), '--out', str(tmp_path / 'out')]
    with FileLock(tmp_path / 'work' / 'lock'):
        assert main([*common, '--script', str(tmp_path / 'train.py')]) == 1
    assert 'another study runs in' in capsys.readouterr().err


def test_a_failing_cell_leaves_no_record_and_the_others_go_on(fashion, tmp_path, capsys):
    """A script that ends at once stands for timm's."""
    (tmp_path / 'train.py').write_text("import sys; sys.exit('out of memory')")
    common = ['--data', str(fashion), '--work', str(tmp_path / 'work'), '--out', str(tmp_path / 'out')]
    cells = ['--cells', *['constant-seed0'] * 2]
    assert main([*common, '--script', str(tmp_path / 'train.py'), *cells]) == 1
    captured = capsys.readouterr()
    assert 'failed: constant-seed0; the logs are in' in captured.err
    assert captured.out.count('constant-seed0: failed, see') == 1
    assert 'out of memory' in (tmp_path / 'work' / 'constant-seed0.log').read_text()
    assert list((tmp_path / 'out').iterdir()) == []


KILLED = """
import json, sys
from pathlib import Path
from sd_resnet.analysis import datasets
from sd_resnet.study.cells import CELLS, Scale
from sd_resnet.study.running import run
hashes, script, data, work, out, names, scale = json.loads(sys.argv[1])
datasets.SHA256 = hashes
cells = [cell for cell in CELLS if cell.name in names]
run(cells, Scale(**scale), Path(script), Path(data), Path(work), Path(out))
"""


@needs_clone
def test_a_killed_study_keeps_finished_cells_and_a_seed_gives_the_same_numbers(fashion, tmp_path, capsys):
    """timm's own script on 200 images; the augmented cell draws in every way that a cell can."""
    names = ['constant-seed0', 'augmented-linear-0.5-seed1']
    work, out, script = tmp_path / 'work', tmp_path / 'out', Path(str(REPO)) / 'train.py'
    settings = [datasets.SHA256, *map(str, (script, fashion, work, out)), names, dataclasses.asdict(SCALE)]
    code = [sys.executable, '-c', KILLED, json.dumps(settings)]
    log = tmp_path / 'log'
    with log.open('w') as file:
        running = subprocess.Popen(code, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}, stdout=file)
    try:
        while 'augmented-linear-0.5-seed1: started' not in log.read_text():
            assert running.poll() is None, log.read_text()
            time.sleep(0.2)
    finally:
        running.send_signal(signal.SIGKILL)
        running.wait()
    assert [path.name for path in out.iterdir()] == ['constant-seed0.json']
    finished = (out / 'constant-seed0.json').stat()

    cells = [cell for cell in CELLS if cell.name in names]
    run(cells, SCALE, script, fashion, work, out)
    assert '1 cells are finished, 1 to run' in capsys.readouterr().out
    assert (out / 'constant-seed0.json').stat() == finished
    run(cells[1:], SCALE, script, fashion, tmp_path / 'work2', tmp_path / 'out2')
    once, again = (json.loads((folder / f'{names[1]}.json').read_text()) for folder in (out, tmp_path / 'out2'))
    for record in (once, again):
        seconds = record['epochs'].pop('cpu_seconds')
        assert all(second > 0 for second in seconds)
        assert len(seconds) == SCALE.epochs
    assert once == again
    assert once['epochs']['test_error'][-1] is not None
    assert 0 < sum(once['block_runs']) < 9 * SCALE.epochs
    constant = json.loads((out / 'constant-seed0.json').read_text())
    assert constant['block_runs'] == [SCALE.epochs] * 9
    assert constant['analysis']['full'] == pytest.approx(constant['epochs']['test_error'][-1], abs=1e-4)
