"""To the Hub and back: what arrives computes what was trained, and what goes wrong is said in one line.

The real client talks to a Hub on 127.0.0.1 (`loopback.py`).
"""

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import save

pytest.importorskip('matplotlib', reason='publishing draws pictures with matplotlib')

from sd_resnet.analysis.runs import read_run
from sd_resnet.cli import main as cli
from sd_resnet.hub import __main__ as maintenance
from sd_resnet.hub import repository as publishing
from sd_resnet.hub.push import push as push_folder
from sd_resnet.hub.push import read_listing

from ..conftest import CLIENT_RESUMES, edit_args, fresh_python, go_offline, images, one_line, write_run

REPO = 'me/sd_resnet18.test'
PUBLISHED = ['README.md', 'args.yaml', 'config.json', 'model.safetensors', 'record.yaml', 'summary.csv']
PICTURES = ['survival.png', 'training.png']


def push(folder, *options):
    return cli.main(['push', str(folder), '--repo-id', REPO, *options])


LOAD = """
import hashlib, timm, torch
model = timm.create_model('hf-hub:{}', pretrained=True).eval()
digest = hashlib.sha256()
for name, tensor in sorted(model.state_dict().items()):
    digest.update(name.encode() + tensor.numpy().tobytes())
torch.set_num_threads(1)
x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    print(type(model).__name__, digest.hexdigest(), *model(x).flatten().tolist())
"""


def test_what_arrives_in_another_process_is_what_was_trained(server, run_folder, tmp_path, capsys):
    assert push(run_folder) == 0
    out = capsys.readouterr().out
    revision, line = re.search(r'revision +(\w{40})', out)[1], re.search(r'load it +(timm.*)', out)[1]
    assert server.repos[REPO].heads['main'] == revision
    assert line == f"timm.create_model('hf-hub:{REPO}', pretrained=True)"
    elsewhere = fresh_python(LOAD.format(f'{REPO}@{revision}'), HF_HOME=str(tmp_path / 'empty'))
    publishing.prepare(run_folder, tmp_path / 'dry', REPO)
    here = fresh_python(LOAD.format(REPO).replace('hf-hub:' + REPO, f'local-dir:{tmp_path / "dry"}'))
    assert elsewhere == here
    trained = read_run(run_folder).model()
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in trained.state_dict().items())


def test_a_dry_run_writes_exactly_what_would_be_sent(server, run_folder, tmp_path, capsys):
    assert push(run_folder, '--dry-run', str(tmp_path / 'dry')) == 0
    assert not server.requests
    assert push(run_folder) == 0
    sent = {path: content for path, content in server.files(REPO).items() if path != '.gitattributes'}
    assert sorted(sent) == sorted(PUBLISHED + PICTURES)
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / 'dry').iterdir()}
    assert push(run_folder, '--dry-run', str(tmp_path / 'dry')) == 1
    assert 'exists' in capsys.readouterr().err


def test_pushing_the_same_makes_no_commit_and_a_better_checkpoint_makes_one(server, run_folder, tmp_path, capsys):
    assert push(run_folder) == 0
    first, before = server.repos[REPO].heads['main'], server.files(REPO)
    assert push(run_folder) == 0
    assert server.repos[REPO].heads['main'] == first
    assert 'no change' in capsys.readouterr().out
    assert push(write_run(tmp_path / 'better', epochs=(41.5, 52.25, 63.125))) == 0
    after = server.files(REPO)
    assert len(server.repos[REPO].commits) == 3  # the empty repository's, and one for each checkpoint
    assert before['model.safetensors'] != after['model.safetensors']
    assert '63.125' in after['README.md'].decode()
    assert '52.25' not in after['README.md'].decode()


def test_other_weights_and_a_former_record_are_deleted_and_other_files_stay(server, run_folder):
    mine = {'notes.txt': b'mine', 'onnx/model.bin': b'mine', 'logs/features.npz': b'mine', 'a/README.md': b'mine'}
    server.put(REPO, {'pytorch_model.bin': b'old', 'other.safetensors': b'old', **mine})
    assert push(run_folder) == 0
    assert sorted(server.files(REPO)) == sorted([*PUBLISHED, *PICTURES, *mine])
    assert cli.main(['verify', REPO]) == 0
    (run_folder / 'summary.csv').unlink()
    assert push(run_folder) == 0  # the former metrics are not those of these weights
    assert 'summary.csv' not in server.files(REPO)
    assert 'training.png' not in server.files(REPO)
    assert server.files(REPO)['notes.txt'] == b'mine'


def test_private_is_unreadable_without_the_token(server, run_folder, tmp_path, monkeypatch, capsys):
    assert push(run_folder) == 0
    assert not server.repos[REPO].private
    assert push(run_folder, '--private') == 0
    assert server.repos[REPO].private
    assert cli.main(['verify', REPO]) == 0
    monkeypatch.delenv('HF_TOKEN')
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'another'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'none'))
    capsys.readouterr()
    assert cli.main(['verify', REPO]) == 1
    assert 'hf auth login' in one_line(capsys)


def test_what_comes_back_different_is_noticed(server, run_folder, capsys):
    server.fail('flip', '/content/*', 5000)
    assert push(run_folder) == 1
    assert 'came back different' in one_line(capsys)


def test_a_branch_of_its_own_leaves_main_alone(server, run_folder):
    server.put(REPO, {'notes.txt': b'mine'})
    assert push(run_folder, '--revision', 'tried', '--message', 'A try') == 0
    assert list(server.files(REPO)) == ['notes.txt']
    assert 'model.safetensors' in server.files(REPO, 'tried')
    assert server.messages[-1] == 'A try'
    timm.create_model(f'hf-hub:{REPO}@tried', pretrained=True)


INTERRUPTIONS = [
    ('/upload/*', 'status', 400, 'answered 400'),
    ('*/commit/*', 'status', 400, 'answered 400'),
    ('*/objects/batch', 'status', 400, 'answered 400'),
    ('*/preupload/*', 'status', 400, 'answered 400'),
    ('/upload/*', 'drop', 5000, 'broke off'),
    ('*/commit/*', 'drop', 100, 'broke off'),
]


@pytest.mark.parametrize(('path', 'kind', 'value', 'said'), INTERRUPTIONS)
def test_an_interrupted_push_leaves_the_old_revision_and_can_be_repeated(
    server, run_folder, tmp_path, capsys, path, kind, value, said
):
    assert push(run_folder) == 0
    before = server.repos[REPO].heads['main']
    better = write_run(tmp_path / 'better', epochs=(41.5, 63.125), seed=1)
    server.fail(kind, path, value, method='POST PUT', times=99)
    capsys.readouterr()
    assert push(better) == 1
    assert said in one_line(capsys)
    assert server.repos[REPO].heads['main'] == before
    server.faults.clear()
    assert push(better) == 0
    assert server.repos[REPO].heads['main'] != before


def test_an_upload_that_breaks_off_once_is_sent_again_without_a_word(server, run_folder):
    server.fail('drop', '/upload/*', 5000, method='PUT')
    assert push(run_folder) == 0


def test_a_card_that_the_server_refuses_is_not_sent(server, run_folder, capsys):
    assert push(run_folder, '--license', 'my-own') == 1
    line = one_line(capsys)
    assert 'README.md is refused: "license" must be one of' in line
    assert '--license' in line
    assert not server.repos


def test_what_was_lost_on_the_way_to_the_folder_is_not_published(server, tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / 'run', act_layer='silu')  # the tensors are the same without it
    complete = publishing.save_for_hf

    def forgetful(model, folder, labels, model_args, **options):
        complete(model, folder, labels, model_args={**model_args, 'act_layer': 'relu'}, **options)

    monkeypatch.setattr(publishing, 'save_for_hf', forgetful)
    assert push(run) == 1
    assert 'computes something else than was trained' in one_line(capsys)
    assert not server.repos
    monkeypatch.setattr(publishing, 'save_for_hf', complete)
    assert push(run) == 0


def test_a_network_that_was_fine_tuned_from_the_hub_is_published_whole(server, run_folder, tmp_path, capsys):
    base = write_run(tmp_path / 'base', drop_path_rate=0.3, drop_path_schedule='uniform', drop_path_mode='row')
    assert push(base) == 0
    edit_args(base, model=f'hf-hub:{REPO}', model_kwargs={}, drop_path=None, pretrained=True)
    pushed = cli.main(['push', str(base), '--repo-id', 'me/tuned'])
    if not hasattr(timm.create_model('test_resnet'), '_model_args'):  # timm does not keep what a network was built with
        assert pushed == 1
        assert 'model.safetensors does not fit config.json' in one_line(capsys)
        return
    assert pushed == 0
    model = timm.create_model('hf-hub:me/tuned', pretrained=True)
    assert (set(model.survival_probs), model.drop_path_mode, model.layer1[0].conv1.in_channels) == ({0.7}, 'row', 64)
    assert ModelCard(server.files('me/tuned')['README.md'].decode()).data.base_model == REPO


def test_a_finished_folder_goes_only_where_its_card_says(server, run_folder, tmp_path, capsys):
    ready = publishing.prepare(run_folder, tmp_path / 'ready', REPO)
    assert cli.main(['push', str(ready), '--repo-id', 'me/sd_resnet18.tes']) == 1
    assert 'another repository than me/sd_resnet18.tes' in one_line(capsys)
    again = tmp_path / 'again'
    assert cli.main(['push', str(ready), '--repo-id', 'me/other', '--dry-run', str(again)]) == 1
    assert not again.exists()
    assert push(ready) == 0
    (tmp_path / 'cardless').mkdir()
    for path in ready.iterdir():
        if path.name != 'README.md':
            shutil.copy(path, tmp_path / 'cardless')
    capsys.readouterr()
    assert push(tmp_path / 'cardless') == 1
    assert 'cardless holds no README.md of text' in one_line(capsys)
    nobody = publishing.write_repository(read_run(run_folder), tmp_path / 'nobody', REPO.split('/')[1])
    text = (nobody / 'README.md').read_text()
    assert "timm.create_model('local-dir:.', pretrained=True)" in text
    assert '`sd-resnet verify .`' in text
    assert '/sd_resnet18.test' not in text
    assert cli.main(['push', str(nobody), '--repo-id', 'me/sd_resnet18.tes']) == 1  # its card has another name
    assert push(nobody) == 0  # which names its repository from now on
    assert server.files(REPO)['README.md'] == (ready / 'README.md').read_bytes()
    weights = bytearray((ready / 'model.safetensors').read_bytes())
    weights[-5] ^= 255
    (ready / 'model.safetensors').write_bytes(weights)
    capsys.readouterr()
    assert push(ready) == 1
    assert 'is damaged' in one_line(capsys)


def test_a_clone_or_a_download_is_pushed_without_what_its_tools_left(server, run_folder, tmp_path):
    ready = publishing.prepare(run_folder, tmp_path / 'ready', REPO)
    for folder in ('.git', '.cache/huggingface'):
        (ready / folder).mkdir(parents=True)
        (ready / folder / 'HEAD').write_text(f'token {server.token}')
    assert push(ready) == 0
    assert sorted(server.files(REPO)) == sorted(['.gitattributes', *PUBLISHED, *PICTURES])


def test_a_folder_that_is_written_again_is_replaced(run_folder, tmp_path):
    for options, said in (({}, '**Needs the plugin**'), ({'plain': True}, '**Plain timm.**')):
        publishing.write_repository(read_run(run_folder), tmp_path / 'out', REPO, **options)
        assert said in (tmp_path / 'out' / 'README.md').read_text()
    assert os.listdir(tmp_path / 'out').count('model.safetensors') == 1
    assert not (tmp_path / 'out.part').exists()


def test_classes_are_in_the_order_that_timms_reader_gives_folders(run_folder, tmp_path):
    """10 comes after 9; by name it would come after 1, and every class from there on would be another's."""
    for name in map(str, range(1, 11)):
        (tmp_path / 'somebody' / 'images' / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'somebody' / 'images' / 'train' / name / 'a.png')
    order = timm.data.create_dataset('', str(tmp_path / 'somebody' / 'images'), 'train').reader.class_to_idx
    ready = publishing.prepare(run_folder, tmp_path / 'ready', REPO)
    assert json.loads((ready / 'config.json').read_text())['label_names'] == sorted(order, key=order.get)


def test_a_checkpoint_that_would_run_code_is_refused(server, run_folder, tmp_path, monkeypatch, capsys):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / 'exploded'), 'w')

    torch.save({'state_dict': {}, 'optimizer': Bomb()}, run_folder / 'model_best.pth.tar')
    assert push(run_folder) == 1
    assert 'was refused' in one_line(capsys)
    assert not (tmp_path / 'exploded').exists()


@pytest.mark.parametrize('name', ['sd_resnet18.test', 'me/a/b', 'me//b'])
def test_a_repository_has_an_owner_and_a_name(server, run_folder, tmp_path, capsys, name):
    """The Hub's client takes a bare name too, and would make an empty public repository of it."""
    assert cli.main(['push', str(run_folder), '--repo-id', name]) == 1
    assert f'repo-id must be USER/NAME, got {name!r}' in one_line(capsys)
    ready = publishing.prepare(run_folder, tmp_path / 'ready', REPO)
    with pytest.raises(ValueError, match='repo-id must be USER/NAME'):
        push_folder(ready, name)
    assert not server.requests


def test_the_hubs_own_reason_is_told(server, run_folder, capsys):
    server.fail('status', '*/preupload/*', 400, method='POST', times=99)
    assert push(run_folder) == 1
    assert ': injected; correct that, or try again' in one_line(capsys)


def test_a_diverged_training_is_called_that(server, run_folder, capsys):
    checkpoint = torch.load(run_folder / 'last.pth.tar', weights_only=False)
    checkpoint['state_dict_ema']['layer1.0.conv1.weight'][0] = float('nan')
    torch.save(checkpoint, run_folder / 'last.pth.tar')
    assert push(run_folder, '--checkpoint', 'last') == 1
    assert 'layer1.0.conv1.weight is not finite: the training diverged' in one_line(capsys)


def test_of_two_pushes_at_once_one_wins_and_the_other_says_so(server, run_folder, capsys):
    server.put(REPO, {'notes.txt': b'mine'})
    server.before_commit = lambda: server.put(REPO, {'notes.txt': b'theirs'})
    assert push(run_folder) == 1
    assert 'meanwhile' in one_line(capsys)
    assert server.files(REPO) == {'notes.txt': b'theirs'}


def test_the_token_is_nowhere(server, run_folder, tmp_path, capsys, caplog):
    caplog.set_level('DEBUG')
    assert push(run_folder) == 0
    server.fail('status', '*', 403, method='GET POST PUT', times=99)
    assert push(run_folder) == 1
    said = capsys.readouterr()
    assert server.token not in said.out + said.err + caplog.text
    holding = [path for path in tmp_path.rglob('*') if path.is_file() and server.token.encode() in path.read_bytes()]
    assert not holding


def test_a_record_that_holds_a_token_is_not_sent(server, run_folder, tmp_path, monkeypatch, capsys):
    edit_args(run_folder, experiment='hf_' + 'a' * 34)
    for options in ([], ['--dry-run', str(tmp_path / 'dry')]):
        assert push(run_folder, *options) == 1
        said = one_line(capsys)
        assert 'args.yaml' in said
        assert 'hf_' not in said
    assert not (tmp_path / 'dry').exists()
    edit_args(run_folder, experiment='')
    ready = publishing.prepare(run_folder, tmp_path / 'ready', REPO)
    (ready / 'notes').write_text(f'my token is {server.token}')
    assert push(ready) == 1
    assert server.token not in one_line(capsys)
    (ready / 'notes').write_text('my token is of-another-shape')
    monkeypatch.setenv('HF_TOKEN', 'of-another-shape')
    assert push(ready) == 1
    assert 'notes holds a token' in one_line(capsys)
    assert not server.repos


def test_schedule_mode_and_rescaling_come_back_and_rate_0_keeps_the_outputs(server, tmp_path):
    options = dict(drop_path_rate=0.3, drop_path_schedule='uniform', drop_path_mode='subset', drop_path_rescale='test')
    run = write_run(tmp_path / 'run', **options)
    assert push(run) == 0
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True).eval()
    assert model.survival_probs == (0.7,) * 8
    assert (model.drop_path_schedule, model.drop_path_mode) == ('uniform', 'subset')
    x = images(2)
    other = timm.create_model(f'hf-hub:{REPO}', pretrained=True, drop_path_rate=0.0).eval()
    assert set(other.survival_probs) == {1.0}
    with torch.no_grad():
        expected = read_run(run).model()(x)
        assert torch.equal(model(x), expected)
        assert (other(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
    train = write_run(tmp_path / 'train', drop_path_rescale='train', drop_path_schedule=[1.0] * 7 + [0.5])
    assert push(train) == 0
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert (model.drop_path_rescale, model.survival_probs) == ('train', (1.0,) * 7 + (0.5,))


def test_new_classes_and_channels_and_features(server, run_folder):
    assert push(run_folder) == 0
    trained = read_run(run_folder).model().state_dict()
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True, num_classes=3, in_chans=1)
    assert (model.fc.out_features, model.conv1.in_channels) == (3, 1)
    assert torch.equal(model.layer4[1].conv2.weight, trained['layer4.1.conv2.weight'])
    features = timm.create_model(f'hf-hub:{REPO}', pretrained=True, features_only=True)
    assert torch.equal(features['layer1'][0].conv1.weight, trained['layer1.0.conv1.weight'])


def test_offline_with_a_filled_cache(server, run_folder, monkeypatch):
    assert push(run_folder) == 0
    timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    for running in server.servers:
        running.shutdown()
    go_offline(monkeypatch)
    asked = len(server.requests)
    timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert len(server.requests) == asked


@pytest.mark.parametrize('name', ['sd_resnet18', 'sd_resnet20_cifar'])
def test_plain_computes_the_same_and_says_what_it_needs(server, tmp_path, name, capsys):
    run = write_run(tmp_path / 'run', name, drop_path_rate=0.6)
    assert push(run, '--plain') == 0
    card = server.files(REPO)['README.md'].decode()
    with torch.no_grad():
        expected = read_run(run).model()(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    plugin = '0' if name == 'sd_resnet18' else '1'
    said = fresh_python(LOAD.format(REPO), HF_HOME=str(tmp_path / 'empty'), SD_RESNET_AUTOLOAD=plugin).split()
    found = torch.tensor([float(value) for value in said[2:]]).view_as(expected)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    if name == 'sd_resnet18':
        assert said[0] == 'ResNet'
        assert 'needs no plugin' in card
    else:
        assert '**Needs the plugin**' in card
        assert 'timm has no architecture for the CIFAR nets' in card


@pytest.mark.parametrize(('name', 'size'), [('sd_resnet18', 40), ('sd_resnet20_cifar', 30)])
def test_the_configuration_states_the_size_of_the_features(tmp_path, name, size):
    """timm's own tests and feature heads ask a pretrained configuration for it; odd sizes are rounded up."""
    run = write_run(tmp_path / 'run', name)
    edit_args(run, img_size=size)
    model = read_run(run).model()
    with torch.no_grad():
        features = model.forward_features(torch.zeros(1, 3, size, size))
    assert features.shape[2:] == model.pretrained_cfg['pool_size']


def test_raw_weights_and_averaged_files_have_no_measured_accuracy(run_folder, tmp_path):
    best = read_run(run_folder)
    assert best.metrics['eval_top1'] == 52.25
    assert best.checkpoint.averaged
    raw = read_run(run_folder, use_ema=False)
    assert raw.metrics == {}
    assert not torch.equal(raw.checkpoint.state_dict['fc.weight'], best.checkpoint.state_dict['fc.weight'])
    torch.save(raw.checkpoint.state_dict, run_folder / 'averaged.pth')
    averaged = read_run(run_folder, 'averaged.pth')
    assert averaged.metrics == {}
    assert torch.equal(averaged.checkpoint.state_dict['fc.weight'], raw.checkpoint.state_dict['fc.weight'])
    assert read_run(run_folder, 'checkpoint-0.pth.tar').metrics['eval_top1'] == 41.5


def test_a_resumed_runs_repeated_header_and_epochs_are_understood(run_folder):
    with (run_folder / 'summary.csv').open('a') as file:
        file.write('epoch,train_loss,eval_loss,eval_top1,eval_top5,lr\n1,1,1,77.5,90,0.05\n')
        file.write('epoch,train_loss,eval_top1\n2,1,88\n')  # its columns may be others
    run = read_run(run_folder)
    assert [epoch['eval_top1'] for epoch in run.epochs] == [41.5, 77.5, 88]
    assert run.epochs[-1] == {'epoch': 2, 'train_loss': 1, 'eval_top1': 88}


def test_an_average_that_timm_did_not_measure_has_no_accuracy(run_folder):
    args = yaml.safe_load((run_folder / 'args.yaml').read_text())
    (run_folder / 'args.yaml').write_text(yaml.safe_dump({**args, 'model_ema_force_cpu': True}))
    assert read_run(run_folder).metrics == {}
    assert read_run(run_folder, use_ema=False).metrics['eval_top1'] == 52.25


def test_a_checkpoint_is_named_as_timm_names_it(run_folder):
    assert read_run(run_folder, 'last').file == 'last.pth.tar'
    assert read_run(run_folder, 'checkpoint-0').metrics['eval_top1'] == 41.5


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (lambda run: (run / 'args.yaml').unlink(), 'holds no args.yaml'),
        (lambda run: (run / 'args.yaml').write_text('model: [unclosed'), 'is not YAML'),
        (lambda run: (run / 'args.yaml').write_text('model: resnet50'), 'model must be sd_resnet50'),
        (lambda run: (run / 'summary.csv').write_text('epoch,eval_top1\n0,high\n'), 'must be a number'),
        (lambda run: (run / 'summary.csv').write_text('epoch,eval_top1\n0,1,2\n'), 'must be a number'),
        (lambda run: (run / 'model_best.pth.tar').write_bytes(b'junk'), 'cannot be read'),
        (lambda run: (run / 'args.yaml').write_text('model: sd_resnet34'), 'does not fit the model of args.yaml'),
        (lambda run: [path.unlink() for path in run.glob('*.tar')], 'holds neither model_best'),
    ],
)
def test_a_run_folder_that_cannot_be_published_is_explained(server, run_folder, capsys, change, said):
    change(run_folder)
    assert push(run_folder) == 1
    assert said in one_line(capsys)
    assert not server.repos


@pytest.mark.parametrize(
    ('main', 'argv'),
    [
        *((cli.main, argv) for argv in (['push'], ['push', 'x'], ['push', 'x', '--all'])),
        *((maintenance.main, argv) for argv in ([], ['push-all', '--plain'], ['push-all', 'x'], ['release', '--tag'])),
    ],
)
def test_wrong_usage_exits_with_2(main, argv, capsys):
    try:
        status = main(argv)
    except SystemExit as stop:  # of argparse
        status = stop.code
    assert status == 2
    assert 'error:' in one_line(capsys)


def test_all_brings_the_hub_in_line_with_the_listing(server, run_folder, tmp_path, capsys):
    publishing.prepare(run_folder, tmp_path / 'weights' / 'one', REPO, license='mit')
    listing = tmp_path / 'hub' / 'repos.yaml'
    listing.parent.mkdir()
    entry = {'folder': 'weights/one', 'repo_id': REPO, 'license': 'mit', 'visibility': 'private'}
    listing.write_text(yaml.safe_dump([entry]))
    assert maintenance.main(['push-all', '--repos', str(listing)]) == 0
    assert server.repos[REPO].private
    head = server.repos[REPO].heads['main']
    assert maintenance.main(['push-all', '--repos', str(listing)]) == 0
    assert server.repos[REPO].heads['main'] == head
    dry = tmp_path / 'dry'
    assert maintenance.main(['push-all', '--repos', str(listing), '--dry-run', str(dry)]) == 0
    assert sorted(path.name for path in (dry / REPO.split('/')[1]).iterdir()) == sorted(PUBLISHED + PICTURES)
    listing.write_text(yaml.safe_dump([{**entry, 'visibility': 'public'}]))
    assert maintenance.main(['push-all', '--repos', str(listing)]) == 0
    assert not server.repos[REPO].private
    assert cli.main(['push', str(tmp_path / 'weights' / 'one'), '--repo-id', REPO, '--private']) == 0
    assert cli.main(['push', str(tmp_path / 'weights' / 'one'), '--repo-id', REPO]) == 0
    assert server.repos[REPO].private  # nobody asked for anything else
    for wrong, said in (
        ({**entry, 'license': 'apache-2.0'}, 'its card says'),
        ({**entry, 'visibility': 'secret'}, 'must have'),
        ({**entry, 'folder': 'weights/two'}, 'holds no README.md'),
    ):
        listing.write_text(yaml.safe_dump([wrong]))
        capsys.readouterr()
        assert maintenance.main(['push-all', '--repos', str(listing)]) == 1
        assert said in one_line(capsys)
    assert cli.main(['push', str(tmp_path / 'weights' / 'one'), '--repo-id', REPO, '--license', 'mit']) == 1


def test_the_projects_own_listing_is_readable_and_nothing_is_published_yet():
    assert read_listing(Path(__file__).parents[2] / 'hub' / 'repos.yaml') == []


def test_a_large_model_is_resumed_where_the_connection_dropped(server, tmp_path):
    run = write_run(tmp_path / 'run', channels=(64, 128, 256, 512))  # 45 MB: several of the client's blocks of 10 MB
    assert push(run) == 0
    server.ranges.clear()
    server.fail('drop', '/content/*', 25_000_000)
    if not CLIENT_RESUMES:
        with pytest.raises(Exception, match=r'[Cc]onnection'):
            timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    model = timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    (resumed,) = server.ranges
    assert 10_000_000 < int(re.match(r'bytes=(\d+)-', resumed)[1]) <= 25_000_000
    trained = read_run(run).model().state_dict()
    assert all(torch.equal(tensor, trained[key]) for key, tensor in model.state_dict().items())


def test_the_packages_own_tags_come_from_the_hub_and_never_from_a_pickle(server):
    plain = timm.create_model('resnet18').state_dict()
    server.put('timm/resnet18.a1_in1k', {'model.safetensors': save(plain), 'pytorch_model.bin': b'other weights'})
    model = timm.create_model('sd_resnet18.a1_in1k', pretrained=True, drop_path_rate=0)
    assert all(torch.equal(tensor, plain[key]) for key, tensor in model.state_dict().items())
    server.put('timm/resnet18.a2_in1k', {'model.safetensors': save(plain), 'pytorch_model.bin': b'other weights'})
    server.fail('status', '*/model.safetensors', 503, method='GET HEAD', times=99)
    with pytest.raises(OSError, match=r'503|cache'):
        timm.create_model('sd_resnet18.a2_in1k', pretrained=True)
    assert not [path for _, path in server.requests if path.endswith('.bin')]


def test_a_failing_request_for_the_weights_never_leads_to_others(server, run_folder):
    assert push(run_folder) == 0
    server.put(REPO, {'pytorch_model.bin': b'other weights'})
    server.fail('status', '*/model.safetensors', 503, method='GET HEAD', times=99)
    with pytest.raises(OSError, match=r'503|locate'):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert not [path for _, path in server.requests if path.endswith('.bin')]


HOSTILE = [
    {'file': '/etc/passwd'},
    {'url': 'http://127.0.0.1:9/weights.pth'},
    {'custom_load': True},
    {'hf_hub_filename': '../../../../escaped.safetensors'},
]


@pytest.mark.parametrize('cfg', HOSTILE)
def test_a_configuration_cannot_reach_outside_its_repository(server, run_folder, tmp_path, capsys, cfg):
    assert push(run_folder) == 0
    config = json.loads(server.files(REPO)['config.json'])
    config['pretrained_cfg'].update(cfg)
    server.put(REPO, {'config.json': json.dumps(config).encode(), 'escaped.safetensors': b'x'})
    outside = set(tmp_path.iterdir())
    with contextlib.suppress(Exception):  # it may load or refuse, and do nothing else
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert set(tmp_path.iterdir()) - outside <= {tmp_path / 'cache'}
    assert not list(tmp_path.parent.glob('escaped*'))
    capsys.readouterr()
    assert cli.main(['verify', REPO]) == 1
    assert next(iter(cfg)) in one_line(capsys)
