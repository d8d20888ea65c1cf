"""The first command a user runs: nothing may be lost, overwritten or different after loading."""

import errno
import hashlib
import json
import os
import re
import sys

import pytest
import timm
import torch

pytest.importorskip('sklearn', reason='the quickstart needs scikit-learn')
pytest.importorskip('matplotlib', reason='the quickstart draws with matplotlib')

from sd_resnet import quickstart
from sd_resnet.cli import main as cli

from .conftest import fresh_python


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Two epochs, unbroken, with the constant-depth network beside it."""
    out = tmp_path_factory.mktemp('whole') / 'out'
    quickstart.run(out, epochs=2, compare=True, progress=False)
    return out


def _weights(out, run='run'):
    content = quickstart.read_checkpoint(out / run / 'last.pth.tar').state_dict
    raw = quickstart.read_checkpoint(out / run / 'last.pth.tar', use_ema=False).state_dict
    return {**{f'ema {k}': v for k, v in content.items()}, **raw}


def test_the_images_are_the_digits_and_no_test_image_is_trained_on(finished):
    train = sorted((finished / 'data' / 'train').glob('*/*.png'))
    test = sorted((finished / 'data' / 'validation').glob('*/*.png'))
    assert len(train) + len(test) == 1797
    assert 340 < len(test) < 370
    assert not {p.relative_to(finished / 'data' / 'train') for p in train} & {
        p.relative_to(finished / 'data' / 'validation') for p in test
    }
    assert {p.parent.name for p in test} == {str(d) for d in range(10)}


def test_the_folder_is_a_hub_repository_that_loads_with_its_settings(finished):
    assert {'README.md', 'config.json', 'model.safetensors', 'summary.csv'} < set(os.listdir(finished / 'hub'))
    config = json.loads((finished / 'hub' / 'config.json').read_text())
    assert config['architecture'] == 'sd_resnet20_cifar'
    assert config['pretrained_cfg']['hf_hub_filename'] == 'model.safetensors'
    model = timm.create_model(f'local-dir:{finished / "hub"}', pretrained=True)
    assert model.survival_probs[-1] == 0.5
    assert tuple(model.default_cfg['input_size']) == (3, 16, 16)
    averaged = quickstart.read_checkpoint(finished / 'run' / 'last.pth.tar').state_dict
    assert all(torch.equal(value, averaged[key]) for key, value in model.state_dict().items())


def test_the_picture_is_a_picture(finished):
    assert (finished / 'quickstart.png').read_bytes().startswith(b'\x89PNG')


def test_the_record_holds_every_epoch_and_what_ran(finished):
    lines = (finished / 'run' / 'summary.csv').read_text().splitlines()
    assert lines[0].startswith('epoch,train_loss,eval_loss,eval_top1')
    assert len(lines) == 3
    with torch.serialization.safe_globals([quickstart.argparse.Namespace]):
        history = torch.load(finished / 'run' / 'last.pth.tar', weights_only=True)['args'].history
        constant = torch.load(finished / 'run_constant' / 'last.pth.tar', weights_only=True)['args'].history
    steps = history[0]['steps']
    assert all(0 < runs <= steps for epoch in history for runs in epoch['executions'])
    assert any(runs < steps for epoch in history for runs in epoch['executions'])
    assert all(runs == steps for epoch in constant for runs in epoch['executions'])


def test_the_accuracy_is_printed_before_and_after_reloading_and_what_to_run_next(tmp_path, capsys):
    assert cli.main(['quickstart', '--out', str(tmp_path / 'out'), '--epochs', '1']) == 0
    lines = capsys.readouterr().out.splitlines()
    (before,) = [line for line in lines if re.fullmatch(r'test accuracy \d+\.\d\d %', line)]
    (after,) = [line for line in lines if re.fullmatch(r'after reloading \d+\.\d\d %', line)]
    assert before.split()[-2] == after.split()[-2]
    assert lines[-1].startswith('python train.py --data-dir ')


@pytest.mark.parametrize('epochs_before', [0, 1])
def test_ctrl_c_keeps_the_finished_epochs_and_resuming_continues_exactly(
    finished, tmp_path, monkeypatch, capsys, epochs_before
):
    """Ctrl-C in the middle of the first or the second epoch; then the same command with --resume."""
    update, calls = quickstart.ModelEmaV3.update, []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 45 * epochs_before + 10:
            raise KeyboardInterrupt
        return update(self, *args)

    out = tmp_path / 'out'
    arguments = ['quickstart', '--out', str(out), '--epochs', '2']
    with monkeypatch.context() as patch:
        patch.setattr(quickstart.ModelEmaV3, 'update', interrupted)
        assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert f'sd-resnet quickstart --out {out} --epochs 2 --seed 0 --resume' in error
    model = timm.create_model('sd_resnet20_cifar', checkpoint_path=str(out / 'run' / 'last.pth.tar'))
    assert model.survival_probs[-1] == 0.5

    assert cli.main([*arguments, '--resume']) == 0
    expected, resumed = _weights(finished), _weights(out)
    assert expected.keys() == resumed.keys()
    different = [key for key, value in expected.items() if not torch.equal(value, resumed[key])]
    assert different == []


def test_an_existing_folder_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / 'mine').write_text('x')
    assert cli.main(['quickstart', '--out', str(tmp_path)]) == 1
    assert 'exists: go on there with --resume, or choose another folder with --out' in capsys.readouterr().err
    assert os.listdir(tmp_path) == ['mine']


def test_what_would_fail_after_the_training_fails_before_it(tmp_path, monkeypatch, capsys):
    assert cli.main(['quickstart', '--out', str(tmp_path / 'out'), '--seed', '-1']) == 1
    assert 'seed must be between 0 and 2**32 - 1, got -1' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert cli.main(['quickstart', '--out', str(tmp_path / 'out')]) == 1
    assert 'matplotlib is needed to draw' in capsys.readouterr().err
    assert not (tmp_path / 'out').exists()


def test_nothing_to_resume_is_said(tmp_path, capsys):
    assert cli.main(['quickstart', '--out', str(tmp_path / 'none'), '--resume']) == 1
    assert 'nothing to resume' in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_resuming_with_other_settings_is_refused(finished, capsys):
    before = _weights(finished)
    assert cli.main(['quickstart', '--out', str(finished), '--epochs', '2', '--seed', '5', '--resume']) == 1
    assert 'was begun with seed=0, got 5' in capsys.readouterr().err
    assert all(torch.equal(value, before[key]) for key, value in _weights(finished).items())


def test_a_damaged_data_folder_is_named(tmp_path, capsys):
    (tmp_path / 'data' / 'train' / '0').mkdir(parents=True)
    assert cli.main(['quickstart', '--out', str(tmp_path), '--resume']) == 1
    assert 'data holds 0 images instead of 1797' in capsys.readouterr().err


def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(tmp_path, monkeypatch, capsys):
    save, calls = torch.save, []

    def full(content, path, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:  # after the first epoch
            with open(path, 'wb') as file:
                file.write(b'half')
            raise OSError(errno.ENOSPC, 'No space left on device', path)
        save(content, path, *args, **kwargs)

    monkeypatch.setattr(torch, 'save', full)
    out = tmp_path / 'out'
    assert cli.main(['quickstart', '--out', str(out), '--epochs', '1']) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert 'No space left on device' in error
    assert sorted(os.listdir(out / 'run')) == ['args.yaml', 'checkpoint-0.pth.tar', 'last.pth.tar', 'summary.csv']
    quickstart.read_checkpoint(out / 'run' / 'last.pth.tar')


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write everywhere')
def test_a_folder_without_write_permission_is_named(tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert cli.main(['quickstart', '--out', str(tmp_path / 'out')]) == 1
    assert 'Permission denied' in capsys.readouterr().err


EVALUATE = """
import hashlib, sys, timm, torch
from pathlib import Path
from sd_resnet import quickstart
torch.set_num_threads(1)
model = timm.create_model('hf-hub:me/digits', pretrained=True)
logits, labels = quickstart.predict(model, quickstart._loader(Path(sys.argv[1]), train=False))
print(hashlib.sha256(logits.numpy().tobytes()).hexdigest(), quickstart._percent(logits, labels))
"""


def test_the_run_goes_to_the_hub_and_has_the_same_accuracy_in_another_process(finished, server, tmp_path, capsys):
    assert cli.main(['push', str(finished / 'run'), '--repo-id', 'me/digits', '--license', 'apache-2.0']) == 0
    elsewhere = fresh_python(EVALUATE, finished / 'data', HF_HOME=str(tmp_path / 'empty'))
    model = timm.create_model(f'local-dir:{finished / "hub"}', pretrained=True)
    logits, labels = quickstart.predict(model, quickstart._loader(finished / 'data', train=False))
    digest = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
    assert elsewhere.split() == [digest, str(quickstart._percent(logits, labels))]
    card = server.files('me/digits')['README.md'].decode()
    assert f'{quickstart._percent(logits, labels):.5g}' in card
