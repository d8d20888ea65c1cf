"""Each way in which a published network is damaged or out of reach is said in one line, with what to do about it."""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError

pytest.importorskip('matplotlib', reason='publishing draws pictures with matplotlib')

from sd_resnet.cli import main as cli
from sd_resnet.hub import repository as publishing
from sd_resnet.hub import verify as verification

from ..conftest import CLIENT_RESUMES, go_offline, one_line, write_run

REPO = 'me/sd_resnet20_cifar.test'
WEIGHTS = 'model.safetensors'


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A repository's files, by name."""
    folder = tmp_path_factory.mktemp('published')
    run = write_run(folder / 'run', 'sd_resnet20_cifar', drop_path_rescale='test')
    publishing.prepare(run, folder / 'ready', REPO)
    return {path.name: path.read_bytes() for path in (folder / 'ready').iterdir()}


@pytest.fixture
def repository(server, published):
    server.put(REPO, published)
    return server


def verify(*arguments):
    return cli.main(['verify', *arguments])


def cached_file(name=WEIGHTS):
    return Path(hf_hub_download(REPO, name)).resolve()


def flip(path, at=-5):
    content = bytearray(path.read_bytes())
    content[at] ^= 255
    path.write_bytes(content)


def with_config(published, change):
    config = json.loads(published['config.json'])
    change(config)
    return {'config.json': json.dumps(config).encode()}


def test_a_sound_repository_passes_every_check(repository, capsys):
    assert verify(REPO) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        'hashes',
        'tensors',
        'config',
        'loads',
        'folds',
    ]
    assert verify(f'hf-hub:{REPO}@main') == 0


def test_a_sound_folder_passes_too(published, tmp_path, capsys):
    for name, content in published.items():
        (tmp_path / name).write_bytes(content)
    assert verify(str(tmp_path)) == 0
    assert '1 files as recorded' in capsys.readouterr().out
    flip(tmp_path / WEIGHTS)
    assert verify(f'local-dir:{tmp_path}') == 1
    assert 'is damaged (sha256' in one_line(capsys)


CONTENTS = {
    'the plugin of another architecture is missing': (
        lambda p: with_config(p, lambda c: c.update(architecture='resnet_of_tomorrow')),
        ['unknown architecture', 'install the plugin'],
    ),
    'the upload was cut short': (lambda p: {WEIGHTS: p[WEIGHTS][:5000]}, [WEIGHTS, 'is cut short', 'publish it again']),
    'the upload was cut in the header': (lambda p: {WEIGHTS: p[WEIGHTS][:500]}, [WEIGHTS, 'is cut short']),
    'a web page instead of the weights': (lambda p: {WEIGHTS: b'<!DOCTYPE html><html></html>'}, ['web page']),
    'a pointer instead of the weights': (
        lambda p: {WEIGHTS: b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n'},
        ['pointer of Git LFS'],
    ),
    'an empty file': (lambda p: {WEIGHTS: b''}, [WEIGHTS, 'is empty', 'publish it again']),
    'a configuration that is not JSON': (lambda p: {'config.json': b'{"architecture": '}, ['config.json is not JSON']),
    'no architecture': (lambda p: with_config(p, lambda c: c.pop('architecture')), ['names no architecture']),
    'a key that timm does not know': (
        lambda p: with_config(p, lambda c: c['pretrained_cfg'].update(colour='red')),
        ['does not know colour', 'remove it'],
    ),
    'no configuration': (lambda p: {'config.json': None}, ['holds no config.json']),
    'no weights': (lambda p: {WEIGHTS: None}, ['holds no model.safetensors', 'sd-resnet push']),
    'weights as a pickle only': (
        lambda p: {WEIGHTS: None, 'pytorch_model.bin': b'x'},
        ['holds no model.safetensors but pytorch_model.bin'],
    ),
    'weights of a file that is not there': (
        lambda p: with_config(p, lambda c: c['pretrained_cfg'].update(file='/nowhere/weights.pth')),
        ['/nowhere/weights.pth', 'remove it'],
    ),
    'two formats, and nothing says which': (
        lambda p: {
            **with_config(p, lambda c: c['pretrained_cfg'].pop('hf_hub_filename')),
            'pytorch_model.bin': b'other weights',
        },
        ['also holds pytorch_model.bin', 'in silence', 'delete it'],
    ),
    'another rate than the weights were trained at': (
        lambda p: with_config(p, lambda c: c['model_args'].update(drop_path_rate=0.2)),
        ['survival probabilities', 'drop_path_rate'],
    ),
    'another number of classes': (
        lambda p: with_config(p, lambda c: (c.update(num_classes=7), c['model_args'].update(num_classes=7))),
        ['does not fit config.json'],
    ),
    'an argument that no model has': (
        lambda p: with_config(p, lambda c: c['model_args'].update(drop_path_mood='good')),
        ['builds no model', 'drop_path_mood'],
    ),
}


@pytest.mark.parametrize('case', CONTENTS)
def test_what_was_published_wrongly_is_named_with_its_cure(repository, published, capsys, case):
    change, said = CONTENTS[case]
    repository.put(REPO, change(published))
    assert verify(REPO) == 1
    line = one_line(capsys)
    assert REPO in line
    assert [part for part in said if part not in line] == []


HOSTILE = {
    'a file of this machine is to be read': {'model_args': {'checkpoint_path': 'bomb.pth'}},
    'other weights are to be read': {'model_args': {'pretrained_cfg_overlay': {'file': 'bomb.pth'}}},
    'something is to be written elsewhere': {'model_args': {'cache_dir': 'elsewhere'}},
    'missing weights are not to be noticed': {'model_args': {'pretrained_strict': False}},
    'a callable is to be called': {'model_args': {'pretrained_filter_fn': 'os.system'}},
    'a module is to be imported': {'architecture': 'os.system'},
    'a path is to be followed': {'architecture': '../../bomb.pth'},
    'another repository is to be loaded': {'architecture': 'hf-hub:me/other'},
    'a layer is to be imported': {'model_args': {'act_layer': 'os.system'}},
    'a block is to be called': {'model_args': {'block': 'os.system'}},
}


class Bomb:
    def __reduce__(self):
        return open, ('exploded', 'w')


@pytest.mark.parametrize('case', HOSTILE)
def test_a_hostile_configuration_is_refused_and_does_nothing(
    repository, published, tmp_path, monkeypatch, capsys, case
):
    def change(config):
        config['architecture'] = HOSTILE[case].get('architecture', config['architecture'])
        config['model_args'].update(HOSTILE[case].get('model_args', {}))

    repository.put(REPO, with_config(published, change))
    work = tmp_path / 'work'
    work.mkdir()
    monkeypatch.chdir(work)
    torch.save(Bomb(), 'bomb.pth')
    assert verify(REPO) == 1
    assert 'config.json' in one_line(capsys)
    with contextlib.suppress(Exception):  # timm alone may load it or refuse it, and do nothing else
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert os.listdir(work) == ['bomb.pth']
    assert not [path for _, path in repository.requests if 'other' in path]


TRANSFERS = {
    'the Hub cannot be reached': ('gone', None, None, ['cannot be reached', 'check the connection']),
    'the Hub is down': ('status', '*', 503, ['answered 503', 'try again later']),
    'the weights are out of order': ('status', '*/model.safetensors', 503, ['answered 503', 'model.safetensors']),
    'their content is out of order': ('status', '/content/*', 500, ['answered 500']),
    'a request is forbidden': ('status', '*/model.safetensors', 403, ['refused (403)', 'hf auth login']),
    'fewer bytes than announced': ('truncate', '/content/*', 5000, ['try again']),
    'a page instead of the weights': ('body', '/content/*', b'<html>Log in first</html>', ['try again']),
    'the wrong hash is announced': ('etag', '*/model.safetensors', 'f' * 64, ['announced', 'try another connection']),
}


@pytest.mark.parametrize('case', TRANSFERS)
def test_what_goes_wrong_on_the_way_is_named_with_its_cure(repository, monkeypatch, capsys, case):
    kind, path, value, said = TRANSFERS[case]
    if kind == 'gone':
        for running in repository.servers:
            running.shutdown()
            running.server_close()
    else:
        repository.fail(kind, path, value, method='GET HEAD', times=99)
    assert verify(REPO) == 1
    line = one_line(capsys)
    assert [part for part in said if part not in line] == []


def test_a_connection_that_breaks_once_is_resumed_without_a_word(repository, capsys):
    repository.fail('drop', '/content/*', 5000)
    if not CLIENT_RESUMES:
        assert verify(REPO) == 1
        assert 'broke off' in one_line(capsys)
    assert verify(REPO) == 0


@pytest.mark.parametrize(
    ('target', 'said'),
    [
        ('me/nothing', ['has no me/nothing', 'hf auth login']),
        (f'{REPO}@nowhere', ['no revision', 'nowhere']),
        (__file__, ['is a file; give the folder', 'USER/NAME']),
        ('not a/repository/name', ['neither a folder nor the name of a repository']),
    ],
)
def test_what_does_not_exist_is_named(repository, capsys, target, said):
    assert verify(target) == 1
    line = one_line(capsys)
    assert [part for part in said if part not in line] == []


def test_a_flipped_byte_of_equal_size_is_found_and_mended(repository, published, capsys):
    repository.fail('flip', '/content/*', len(published[WEIGHTS]) - 5)
    timm.create_model(f'hf-hub:{REPO}', pretrained=True)  # the client notices nothing: only sizes are compared
    assert verify(REPO) == 1
    line = one_line(capsys)
    assert WEIGHTS in line
    assert '--fix' in line
    assert verify(REPO, '--fix') == 0
    assert 'downloaded again' in capsys.readouterr().out
    assert cached_file().read_bytes() == published[WEIGHTS]
    assert verify(REPO) == 0


def test_a_hub_that_sends_other_bytes_than_it_recorded_is_not_mended_by_asking_again(repository, published, capsys):
    content = f'/content/{hashlib.sha256(published[WEIGHTS]).hexdigest()}'
    repository.fail('flip', content, len(published[WEIGHTS]) - 5, times=9)
    assert verify(REPO, '--fix') == 1
    assert 'sends other bytes than it recorded' in one_line(capsys)


def test_a_file_damaged_in_the_cache_is_mended(repository, published, capsys):
    path = cached_file()
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(SafetensorError):
        timm.create_model(f'hf-hub:{REPO}', pretrained=True)
    assert verify(REPO) == 1
    assert '--fix' in one_line(capsys)
    assert verify(REPO, '--fix') == 0
    timm.create_model(f'hf-hub:{REPO}', pretrained=True)


def test_offline_the_cache_is_checked_against_its_own_record(repository, monkeypatch, capsys):
    assert verify(REPO) == 0
    go_offline(monkeypatch)
    capsys.readouterr()
    assert verify(REPO) == 0
    assert capsys.readouterr().out.startswith('offline ')
    flip(cached_file())
    assert verify(REPO) == 1
    assert 'is damaged' in one_line(capsys)


def test_offline_with_an_empty_cache_says_so(repository, monkeypatch, capsys):
    go_offline(monkeypatch)
    assert verify(REPO) == 1
    line = one_line(capsys)
    assert 'HF_HUB_OFFLINE is set' in line
    assert 'unset it' in line


def test_a_folder_of_the_cache_is_checked_by_its_names(repository, capsys):
    assert verify(REPO) == 0
    path = Path(hf_hub_download(REPO, WEIGHTS))
    flip(path.resolve())
    assert verify(str(path.parent)) == 1
    assert 'is damaged' in one_line(capsys)


def test_what_was_lost_from_the_cache_is_named(repository, capsys):
    assert verify(REPO) == 0
    folder = Path(hf_hub_download(REPO, WEIGHTS)).parent
    (folder / 'summary.csv').resolve().unlink()
    assert verify(str(folder)) == 1
    assert 'summary.csv is lost from the cache; load it again while online' in one_line(capsys)


def test_a_record_without_a_hash_is_damaged(published, tmp_path, capsys):
    for name, content in published.items():
        (tmp_path / name).write_bytes(content)
    for wrong in ('sha256: null', 'sha256: 5', 'sha256: abc', '[]'):
        (tmp_path / 'record.yaml').write_text(wrong)
        assert verify(str(tmp_path)) == 1
        assert 'record.yaml is damaged' in one_line(capsys)


def test_a_push_in_between_is_not_taken_for_damage(repository, published, tmp_path, monkeypatch, capsys):
    """The list of hashes is one revision's, and the files that are fetched after it another's."""
    publishing.prepare(write_run(tmp_path / 'run', 'sd_resnet20_cifar', seed=5), tmp_path / 'ready', REPO)
    other = {path.name: path.read_bytes() for path in (tmp_path / 'ready').iterdir()}
    download = verification.snapshot_download

    def after_a_push(*args, **kwargs):
        if other:
            repository.put(REPO, other)
            other.clear()
        return download(*args, **kwargs)

    monkeypatch.setattr(verification, 'snapshot_download', after_a_push)
    assert verify(REPO) == 1
    assert f'{REPO} was changed meanwhile; verify it again' in one_line(capsys)
    assert verify(REPO) == 0


def test_a_snapshot_in_the_cache_is_mended_where_it_lies(repository, published, tmp_path, capsys):
    elsewhere = tmp_path / 'elsewhere'
    path = Path(hf_hub_download(REPO, WEIGHTS, cache_dir=elsewhere))
    hf_hub_download(REPO, 'config.json', cache_dir=elsewhere)
    flip(path.resolve())
    assert verify(str(path.parent)) == 1
    assert verify(str(path.parent), '--fix') == 0
    assert path.read_bytes() == published[WEIGHTS]
    capsys.readouterr()
    assert verify(str(tmp_path), '--fix') == 1
    assert 'not in the cache of the Hub' in one_line(capsys)


def test_weights_that_compute_something_else_after_folding_are_refused(published, tmp_path, monkeypatch, capsys):
    for name, content in published.items():
        (tmp_path / name).write_bytes(content)
    from sd_resnet.resnets.resnet_cifar import StochasticCifarResNet

    def forgetful(self, rate=None, **_):
        self._set_drop_path(rate, 'linear', 'batch', 'test', keep_function=False)

    monkeypatch.setattr(StochasticCifarResNet, 'set_drop_path', forgetful)
    assert verify(str(tmp_path)) == 1
    assert 'folding changes the outputs' in one_line(capsys)


def test_a_plain_network_of_timm_has_nothing_to_fold(server, tmp_path, capsys):
    from timm.models import save_for_hf

    model = timm.create_model('resnet18', num_classes=3, channels=(8, 8, 8, 8))
    save_for_hf(model, str(tmp_path / 'plain'), model_args={'channels': (8, 8, 8, 8)}, safe_serialization=True)
    assert verify(str(tmp_path / 'plain')) == 0
    assert 'nothing to fold' in capsys.readouterr().out
    torch.save(model.state_dict(), tmp_path / 'plain' / 'pytorch_model.bin')
    assert verify(str(tmp_path / 'plain')) == 1
