"""What several test files need: small networks with weights and statistics that a mistake would show in."""

import argparse
import hashlib
import os
import subprocess
import sys
import time
import types

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import constants, file_download, repocard
from huggingface_hub.utils import _http, get_session
from packaging.version import Version
from timm.utils import CheckpointSaver, ModelEmaV3

import sd_resnet  # noqa: F401
from sd_resnet.analysis import datasets
from sd_resnet.core.draws import Draw

from .loopback import PATIENCE, Hub

torch.set_num_threads(1)  # the networks are small, and other work may run beside

# By itself, where a connection broke; with earlier versions of the client whoever asked must ask again.
CLIENT_RESUMES = Version(huggingface_hub.__version__) >= Version('1.20')

IMAGENET = [
    'resnet18',
    'resnet34',
    'resnet50',
    'resnet101',
    'resnet152',
    'resnet50d',
    'resnet101d',
    'resnet152d',
    'wide_resnet50_2',
    'resnext50_32x4d',
]

# Of everything that timm's other ResNets have one, small
SMALL, WIDE = {'layers': (2, 1, 1, 2)}, {'layers': (2, 1, 1, 2), 'channels': (32, 64, 32, 64)}
KINDS = {
    'seresnet18': SMALL,
    'ecaresnet26t': SMALL,
    'resnetaa34d': SMALL,
    'resnetaa50': {**SMALL, 'output_stride': 16},
    'resnetblur18': SMALL,
    'resnet50_gn': WIDE,
    'resnet10t': {**SMALL, 'act_layer': 'silu'},
    'resnetrs50': SMALL,
    'resnet50s': SMALL,
    'seresnextaa101d_32x8d': SMALL,
    'senet154': WIDE,
    'test_resnet': {},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


NARROW = {'channels': (16, 24, 32, 48)}  # of the stages: the same blocks, quicker


def make(name, train=False, dtype=None, full=False, **kwargs):
    """A network whose branches do not start at zero, with BatchNorm statistics and weights of no special value.

    ImageNet's are narrow unless `full`.
    """
    narrow = {} if full or 'cifar' in name else NARROW
    model = timm.create_model(name, **{'num_classes': 10, 'zero_init_last': False, **narrow, **kwargs})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
            if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.GroupNorm)):
                module.weight.uniform_(0.3, 0.7)
                module.bias.normal_(0, 0.1)
    return model.to(dtype).train(train) if dtype else model.train(train)


def images(batch=4, size=32, dtype=None):
    return torch.randn(batch, 3, size, size, dtype=dtype)


def decide(model, active):
    """Let an own network drop these blocks and no others, in batch mode."""
    model.draw = lambda x, blocks=None: [Draw(p_l, b_l) for p_l, b_l in zip(model.survival_probs, active)]


def count_calls(blocks):
    """Record for each block the number of rows of every forward call of its branch, and of backward calls."""
    forward, backward = [[] for _ in blocks], [[] for _ in blocks]
    for index, block in enumerate(blocks):
        block.conv1.register_forward_hook(lambda m, i, o, index=index: forward[index].append(o.shape[0]))
        block.conv1.register_full_backward_hook(lambda m, i, o, index=index: backward[index].append(o[0].shape[0]))
    return forward, backward


class Redirected:
    """Early versions of the client ask the public Hub about a card's header, whatever the endpoint is."""

    def __init__(self, url):
        self.url = url

    def post(self, url, *args, **kwargs):
        return get_session().post(url.replace('https://huggingface.co', self.url), *args, **kwargs)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A Hub on 127.0.0.1, an empty cache, and a token; the client reads its environment only when it is imported."""
    with Hub(tmp_path / 'server') as running:
        monkeypatch.setattr(constants, 'ENDPOINT', running.url)
        template = running.url + '/{repo_id}/resolve/{revision}/{filename}'
        for module in (constants, file_download):  # early versions of the client hold a copy of it
            monkeypatch.setattr(module, 'HUGGINGFACE_CO_URL_TEMPLATE', template, raising=module is constants)
        monkeypatch.setattr(repocard, 'get_session', lambda: Redirected(running.url))
        monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
        monkeypatch.setattr(constants, 'HF_HUB_DISABLE_XET', True, raising=False)
        monkeypatch.setattr(constants, 'HF_HUB_ETAG_TIMEOUT', PATIENCE, raising=False)
        monkeypatch.setattr(constants, 'HF_HUB_DOWNLOAD_TIMEOUT', PATIENCE, raising=False)
        impatient = types.SimpleNamespace(**{**vars(time), 'sleep': lambda seconds: time.sleep(min(seconds, 0.01))})
        monkeypatch.setattr(_http, 'time', impatient)  # the client tries as often, and waits less in between
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running
    forget_sessions()


forget_sessions = getattr(_http, 'reset_sessions', lambda: None)  # early versions keep what they knew at the first one


def go_offline(monkeypatch):
    """As with HF_HUB_OFFLINE in the environment, from now on."""
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    forget_sessions()


@pytest.fixture
def run_folder(tmp_path):
    return write_run(tmp_path / 'run')


def write_run(folder, name='sd_resnet18', epochs=(41.5, 52.25), seed=0, **kwargs):
    """What timm's `train.py` leaves: args.yaml, summary.csv, and the last and best checkpoint with an average."""
    folder.mkdir()
    torch.manual_seed(seed)
    narrow = {} if 'cifar' in name else NARROW
    model = make(name, **kwargs)
    args = argparse.Namespace(
        model=name,
        model_kwargs={'zero_init_last': False, **narrow, **{k: v for k, v in kwargs.items() if k != 'drop_path_rate'}},
        drop_path=kwargs.get('drop_path_rate'),
        num_classes=10,
        img_size=32,
        mean=[0.4, 0.5, 0.6],
        crop_pct=0.9,
        data_dir=str(folder.parent / 'somebody' / 'images'),
        lr=0.05,
        opt='sgd',
        model_ema=True,
        model_ema_decay=0.9,
        seed=42,
        val_split='validation',
    )
    (folder / 'args.yaml').write_text(yaml.safe_dump(vars(args)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    average = ModelEmaV3(model, decay=0.5)
    saver = CheckpointSaver(model, optimizer, args, average, checkpoint_dir=str(folder), max_history=2)
    lines = ['epoch,train_loss,eval_loss,eval_top1,eval_top5,lr']
    for epoch, accuracy in enumerate(epochs):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.003)
        average.update(model)
        saver.save_checkpoint(epoch, accuracy)
        lines.append(f'{epoch},{2 - epoch / 8},{2.125 - epoch / 8},{accuracy},{accuracy + 30},0.05')
    (folder / 'summary.csv').write_text('\n'.join(lines) + '\n')
    return folder


def fresh_python(code, *args, cwd=None, **environment):
    """What a new Python prints: nothing of this process's patches or registrations is in it."""
    command = [sys.executable, '-c', code, *map(str, args)]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', **environment}
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def edit_args(run, **changes):
    """Change a run's arguments."""
    args = yaml.safe_load((run / 'args.yaml').read_text())
    (run / 'args.yaml').write_text(yaml.safe_dump({**args, **changes}))


@pytest.fixture
def fashion(tmp_path, monkeypatch):
    """Files like Fashion-MNIST's, of 400 and 100 images of noise, taken for the published ones; their folder."""
    folder = tmp_path / 'fashion'
    (folder / datasets.RAW).mkdir(parents=True)
    random = np.random.default_rng(0)
    hashes = {}
    for split, count in (('train', 400), ('t10k', 100)):
        labels = random.permutation(np.arange(count) % 10).astype(np.uint8)
        pixels = random.integers(0, 256, (count, 28, 28), np.uint8)
        for name, values in ((f'{split}-images-idx3-ubyte', pixels), (f'{split}-labels-idx1-ubyte', labels)):
            content = datasets._to_idx(values)
            (folder / datasets.RAW / name).write_bytes(content)
            hashes[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(datasets, 'SHA256', hashes)
    return folder


def one_line(capsys):
    """What was said on stderr: one line, and never a traceback."""
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith(('sd-resnet ', 'python -m sd_resnet.'))]
    assert len(lines) == 1, said
    assert 'Traceback' not in said
    return lines[0]
