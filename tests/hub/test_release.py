"""Whoever takes the released weights: they load by name without a network, and do what their card says."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
import yaml
from safetensors.torch import load as load_bytes
from safetensors.torch import load_file
from timm.models import adapt_input_conv, split_model_name_tag

from sd_resnet.analysis import datasets
from sd_resnet.analysis.evaluation import evaluate
from sd_resnet.hub import __main__ as maintenance
from sd_resnet.hub import repository as publishing
from sd_resnet.hub import verify as verification
from sd_resnet.hub.release import interval, release, stated_accuracy
from sd_resnet.resnets import packaged as weights

from ..conftest import edit_args, fresh_python, one_line, write_run

ROOT = Path(__file__).parents[2]
RELEASED = sorted(path.parent.name for path in (ROOT / 'weights').glob(f'*/{weights.WEIGHTS}'))


@pytest.fixture
def trained(tmp_path):
    """A run folder as timm's script leaves it after the padded Fashion-MNIST recipe."""
    folder = write_run(tmp_path / 'run', 'sd_resnet20_cifar', in_chans=1, drop_path_rate=0.2)
    data = dict(dataset=datasets.NAME, val_split='test', input_size=[1, 28, 28], img_size=None)
    edit_args(folder, **data, mean=[0.286], std=[0.353], scale=[0.605, 0.605], model_ema=False, drop_path=0.2)
    return folder


def test_a_release_does_what_its_card_says(trained, fashion, tmp_path):
    notes = 'images zero-padded by 4 pixels'
    folder, reached = release(trained, 'fmnist', fashion, tmp_path / 'weights', notes=notes)
    assert folder == tmp_path / 'weights' / 'sd_resnet20_cifar.fmnist'
    assert evaluate(f'local-dir:{folder}', fashion) == reached
    assert stated_accuracy(folder) == round(reached.top1, 2)
    tensors = load_file(folder / 'model.safetensors')
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    verification.verify(str(folder))  # hashes, tensors, loading
    card, record = (folder / 'README.md').read_text(), yaml.safe_load((folder / 'record.yaml').read_text())
    assert record['sha256'] == verification.file_hash(folder / 'model.safetensors')
    assert record['sha256'] in card
    assert record['metrics']['eval_top1'] == reached.top1
    assert "convert('L')" in card
    assert f'| notes | {notes}; the accuracy was measured again' in card
    assert "timm.create_model('sd_resnet20_cifar.fmnist', pretrained=True)" in card
    assert 'zalando-datasets/fashion_mnist' in card
    assert json.loads((folder / 'config.json').read_text())['label_names'] == list(datasets.LABELS)
    index = (tmp_path / 'weights' / 'README.md').read_text()
    assert f'{100 - reached.top1:.2f} %' in index
    assert record['sha256'] in index


def test_what_the_run_says_of_itself_stays_unless_told_otherwise(trained, fashion, tmp_path):
    edit_args(trained, hardware='two accelerators', baseline='6 %', notes='own images')
    common = ['release', str(trained), '--tag', 'fmnist', '--data', str(fashion), '--weights', str(tmp_path / 'w')]
    told = ['--hardware', 'CPU', '--notes', 'x']
    for options, hardware, notes in (([], 'two accelerators', 'own images'), (told, 'CPU', 'x')):
        assert maintenance.main([*common, *options]) == 0
        card = (tmp_path / 'w' / 'sd_resnet20_cifar.fmnist' / 'README.md').read_text()
        assert f'| hardware | {hardware} |' in card
        assert '| for comparison | 6 % |' in card
        assert f'| notes | {notes}' in card


def test_the_card_of_a_constant_depth_twin_does_not_speak_of_dropped_blocks(trained, fashion, tmp_path):
    edit_args(trained, drop_path=0.0)
    folder, _ = release(trained, 'fmnist_constant', fashion, tmp_path / 'weights')
    card = (folder / 'README.md').read_text()
    assert 'trained at constant depth' in card
    assert 'a\ndropped block runs neither' not in card
    assert 'each block' not in card
    assert 'survival' not in card
    assert not (folder / 'survival.png').exists()


def test_the_card_of_a_resumed_training_says_where_longer_schedules_began(trained, fashion, tmp_path):
    edit_args(trained, resume='last.pth.tar', warmup_epochs=1)
    header, *_, last = (trained / 'summary.csv').read_text().splitlines()
    once = ', the learning rate rising again at epoch 3'
    twice = ', the learning rate rising again at epoch 3 and 5'
    warm = [0.01, 0.1, 0.05]
    for rates, said in (([*warm, 0.07], once), ([*warm, 0.07, 0.02, 0.03], twice), ([*warm, 0.02], '')):
        rows = [','.join([str(epoch), *last.split(',')[1:-1], str(rate)]) for epoch, rate in enumerate(rates)]
        (trained / 'summary.csv').write_text('\n'.join([header, *rows]) + '\n')
        folder, _ = release(trained, 'fmnist', fashion, tmp_path / 'weights')
        card = (folder / 'README.md').read_text()
        assert f'went on from a checkpoint (--resume){said} |' in card


def test_a_release_needs_its_data_set_and_a_tag(trained, fashion, tmp_path, capsys):
    common = ['release', str(trained), '--data', str(fashion), '--weights', str(tmp_path / 'weights')]
    assert maintenance.main([*common, '--tag', 'a.b']) == 1
    assert "tag must be a name of letters, digits and underscores, got 'a.b'" in one_line(capsys)
    assert maintenance.main(common) == 2
    assert maintenance.main([common[0], *common[2:], '--tag', 'fmnist']) == 2
    assert 'give RUN' in capsys.readouterr().err
    edit_args(trained, dataset='torch/cifar10')
    capsys.readouterr()
    assert maintenance.main([*common, '--tag', 'fmnist']) == 1
    assert "was trained on 'torch/cifar10'" in one_line(capsys)
    assert not (tmp_path / 'weights').exists()


def test_a_release_overwrites_no_other_readme(trained, fashion, tmp_path, capsys):
    (tmp_path / 'README.md').write_text('# My project')
    for run in ([], [str(trained), '--tag', 'fmnist', '--data', str(fashion)]):
        assert maintenance.main(['release', *run, '--weights', str(tmp_path)]) == 1
        assert 'is not an index of released weights' in one_line(capsys)
    assert (tmp_path / 'README.md').read_text() == '# My project'
    assert not list(tmp_path.glob('sd_resnet*'))


LOAD = """
import json, sys
import timm, torch
import sd_resnet
from timm.models import create_model
made = {name: create_model(f'sd_resnet20_cifar.{name}', pretrained=True).eval() for name in ('fmnist', 'other')}
x = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
colour = create_model('sd_resnet20_cifar.fmnist', pretrained=True, in_chans=3).eval()
four = create_model('sd_resnet20_cifar.fmnist', pretrained=True, in_chans=4).eval()
plain = create_model('sd_resnet20_cifar')
five = create_model('sd_resnet20_cifar.fmnist', pretrained=True, num_classes=5).eval()
with torch.no_grad():
    expected = made['fmnist'](x)
    print(json.dumps({
        'folder': str(sd_resnet.resnets.packaged.weights_folder()),
        'tags': timm.list_models('sd_resnet20_cifar.*', pretrained=True),
        'logits': expected.tolist(),
        'other': (made['other'](x) - expected).abs().max().item(),
        'three': (colour(x.repeat(1, 3, 1, 1)) - expected).abs().max().item(),
        'four': (four(x.repeat(1, 4, 1, 1)) - expected).abs().max().item(),
        'features': (five.forward_features(x) - made['fmnist'].forward_features(x)).abs().max().item(),
        'five': list(five(x).shape),
        'plain': [plain.conv1.in_channels, plain.pretrained_cfg.get('tag')],
        'default': timm.get_pretrained_cfg('sd_resnet20_cifar').tag,
    }))
"""


def load(package_parent, extra_path=None):
    """The released weights, by name, in a Python of its own whose package lies there; no Hub can be reached."""
    paths = [str(package_parent), *([extra_path] if extra_path else [])]
    environment = {'PYTHONPATH': os.pathsep.join(paths), 'SD_RESNET_AUTOLOAD': '0', 'HF_HUB_OFFLINE': '1'}
    return json.loads(fresh_python(LOAD, cwd=package_parent, **environment))


@pytest.mark.parametrize('layout', ['wheel', 'checkout, older timm'])
def test_a_folder_is_a_tag_from_a_wheel_and_from_a_checkout(trained, fashion, tmp_path, layout):
    older = os.environ.get('TIMM_REPO') if 'timm' in layout else None
    if 'timm' in layout and not older:
        pytest.skip("TIMM_REPO does not name a clone of timm's repository")
    shutil.copytree(ROOT / 'sd_resnet', tmp_path / 'site' / 'sd_resnet', ignore=shutil.ignore_patterns('weights'))
    shutil.copytree(ROOT / 'hub', tmp_path / 'site' / 'hub')
    folder = tmp_path / 'site' / ('sd_resnet/weights' if layout == 'wheel' else 'weights')
    release(trained, 'fmnist', fashion, folder)
    release(trained, 'other', fashion, folder, checkpoint='checkpoint-0.pth.tar')
    found = load(tmp_path / 'site', older)
    assert found['folder'] == str(folder)
    assert found['tags'] == ['sd_resnet20_cifar.fmnist', 'sd_resnet20_cifar.other']
    assert (found['plain'], found['default']) == ([3, None], None)  # the untagged name stays what it was
    x = torch.rand(8, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = verification.timm.create_model(f'local-dir:{folder / "sd_resnet20_cifar.fmnist"}', pretrained=True)
        expected = expected.eval()(x)
    largest = expected.abs().max().item()
    assert torch.tensor(found['logits']) == pytest.approx(expected, abs=1e-5 * largest)
    assert found['other'] > 1e-3 * largest  # each tag its own weights
    assert found['three'] < 1e-5 * largest
    assert found['four'] < 1e-5 * largest
    assert found['features'] < 1e-5 * largest
    assert found['five'] == [8, 5]


def test_without_a_folder_there_are_no_tags(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, '__file__', str(tmp_path / 'sd_resnet' / 'resnets' / 'packaged.py'))
    assert weights.weights_folder() is None
    assert weights.released('sd_resnet20_cifar') == {}
    (tmp_path / 'weights' / 'sd_resnet20_cifar.fmnist').mkdir(parents=True)  # without weights in it
    assert weights.weights_folder() == tmp_path / 'weights'
    assert weights.released('sd_resnet20_cifar') == {}
    (tmp_path / 'weights' / 'sd_resnet20_cifar.fmnist' / weights.WEIGHTS).touch()  # what a killed writer may leave
    assert weights.released('sd_resnet20_cifar') == {}
    written = write_run(tmp_path / 'run', 'sd_resnet20_cifar')
    publishing.prepare(written, tmp_path / 'weights' / 'sd_resnet20_cifar.other.new', 'me/net')
    assert weights.released('sd_resnet20_cifar') == {}
    (tmp_path / 'weights' / 'sd_resnet20_cifar.other.new').rename(tmp_path / 'weights' / 'sd_resnet20_cifar.other')
    assert list(weights.released('sd_resnet20_cifar')) == ['sd_resnet20_cifar.other']
    (tmp_path / 'sd_resnet' / 'weights').mkdir(parents=True)
    assert weights.weights_folder() == tmp_path / 'sd_resnet' / 'weights'


def test_older_versions_of_timm_get_a_stem_of_three_channels(monkeypatch):
    """They take every stem for one of three, and refuse to spread one of one channel; see `load` for the whole way."""
    monkeypatch.setattr(weights, '_TIMM_SPREADS', False)
    weight = torch.randn(16, 1, 3, 3)
    for wanted, channels in ((1, 1), (3, 3), (4, 3)):
        model = verification.timm.create_model('sd_resnet20_cifar', in_chans=wanted)
        found = weights.spread_stem({'conv1.weight': weight}, model)['conv1.weight']
        assert found.shape[1] == channels
        adapted = found if wanted == 3 else adapt_input_conv(wanted, found)
        assert torch.allclose(adapted.sum(1, keepdim=True), weight, atol=1e-6)
    model.pretrained_cfg = {}  # of a repository that says nothing of its stem
    assert weights.spread_stem({'conv1.weight': weight}, model)['conv1.weight'] is weight


def test_cards_and_index_are_what_the_command_writes(tmp_path):
    """Of today's template, from the records."""
    shutil.copytree(ROOT / 'weights', tmp_path / 'weights')
    assert maintenance.main(['release', '--weights', str(tmp_path / 'weights')]) == 0
    for path in sorted((ROOT / 'weights').glob('**/README.md')):
        again = tmp_path / path.relative_to(ROOT)
        assert again.read_text(encoding='utf-8') == path.read_text(encoding='utf-8'), path
    index = (ROOT / 'weights' / 'README.md').read_text(encoding='utf-8')
    assert sorted(re.findall(r'\[`(.*?)`\]', index)) == RELEASED


def test_the_interval_of_a_share_is_wilsons():
    stats = pytest.importorskip('scipy.stats', reason='scipy knows the interval, too')
    for wrong, images in ((504, 10_000), (3868, 10_000), (0, 10), (10, 10)):
        expected = stats.binomtest(wrong, images).proportion_ci(0.95, method='wilson')
        assert interval(wrong / images, images) == pytest.approx(tuple(expected), abs=1e-9)


@pytest.mark.parametrize('name', RELEASED)
def test_the_card_of_what_is_released_names_the_repository_that_it_is_published_to(name, tmp_path):
    """And none before: nobody's name is in the package."""
    card = (ROOT / 'weights' / name / 'README.md').read_text(encoding='utf-8')
    assert re.findall(r"create_model\('(.*?)'", card) == ['local-dir:.', name]
    ready = publishing.prepare(ROOT / 'weights' / name, tmp_path / 'ready', f'me/{name}')
    card = (ready / 'README.md').read_text(encoding='utf-8')
    assert re.findall(r"create_model\('(.*?)'", card) == [f'hf-hub:me/{name}', name]
    assert f'`sd-resnet verify me/{name}`' in card


@pytest.mark.parametrize('name', RELEASED)
def test_released_folders_are_whole_repositories(name):
    """Their files agree with each other: hashes, tensors, the settings of stochastic depth, what the card says."""
    verification.verify(str(ROOT / 'weights' / name))


@pytest.mark.parametrize('name', RELEASED)
def test_released_weights_reach_their_stated_accuracy(name, tmp_path):
    """On the real test images: 1,000 of them, or all where SD_RESNET_TEST_ALL=1 asks for it, then to the last digit."""
    if not datasets.DEBIAN.is_dir():
        pytest.skip('Fashion-MNIST is not here: the package dataset-fashion-mnist could not be installed')
    everything = os.environ.get('SD_RESNET_TEST_ALL') == '1'
    data = datasets.write_fashion_mnist(tmp_path / 'images')
    found = evaluate(name, data, None if everything else 1000)
    stated = stated_accuracy(ROOT / 'weights' / name)
    if everything:
        assert round(found.top1, 2) == stated
    else:  # five standard deviations of a share of 1,000
        assert found.top1 == pytest.approx(stated, abs=500 * (stated / 100 * (1 - stated / 100) / 1000) ** 0.5)
    assert split_model_name_tag(name)[1]


@pytest.mark.parametrize('name', RELEASED)
def test_the_first_editions_released_file_loads_as_what_is_released_now(name):
    """Whoever kept one, with p_l in its state dict, gets the same network; it is read from the project's history."""
    file = f'495752d575c7e0f1234c02245ef0ffa0d1f34dee:weights/{name}/{weights.WEIGHTS}'
    shown = subprocess.run(['git', 'show', file], cwd=ROOT, capture_output=True, check=False)
    if shown.returncode:
        pytest.skip('the history of the first edition is not here')
    first, now = load_bytes(shown.stdout), load_file(ROOT / 'weights' / name / weights.WEIGHTS)
    assert any(key.endswith('survival_prob') for key in first) != name.endswith('constant')
    model = timm.create_model(name.split('.')[0], in_chans=1)
    model.load_state_dict(first)
    assert now.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, now[key]) for key, tensor in model.state_dict().items())
