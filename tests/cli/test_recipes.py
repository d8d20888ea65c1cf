"""Whoever trains with a recipe: it is installed, timm's parser takes every line of it, and it says what was run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sd_resnet.cli import main as cli
from sd_resnet.recipes import recipes

from ..conftest import one_line

REPO = os.environ.get('TIMM_REPO')

# What the Fashion-MNIST weights were trained with, but for model, drop path, folders and log interval.
FMNIST = (
    '--dataset torch/fashion_mnist --val-split test --num-classes 10 --in-chans 1 --input-size 1 28 28 --mean 0.286 '
    '--std 0.353 --train-crop-mode rrc --scale 0.605 0.605 --ratio 1 1 --hflip 0.5 --color-jitter 0 --crop-pct 1.0 '
    '--interpolation bilinear --train-interpolation bilinear -b 128 --opt sgd --lr 0.1 --momentum 0.9 '
    '--weight-decay 5e-4 --sched cosine --warmup-epochs 1 --warmup-lr 0.01 --epochs 40 --amp --amp-dtype bfloat16 '
    '--channels-last --device cpu --no-prefetcher --workers 1 --seed 42 --checkpoint-hist 1 --log-interval 100'
)

# In a clone: every recipe read by the script's own function, and the same values given as flags.
PARSE = """
import importlib, json, sys
import yaml, train
paths, flags = json.loads(sys.argv[1]), sys.argv[2].split()

def parse(*argv):
    importlib.reload(train)  # a recipe changes the parser's defaults
    sys.argv = ['train.py', *argv]
    return vars(train._parse_args()[0])

def as_flags(recipe):
    actions = {action.dest: action for action in train.parser._actions}
    for key, value in recipe.items():
        yield actions[key].option_strings[-1]
        if actions[key].nargs != 0:
            yield from map(str, value) if isinstance(value, list) else [str(value)]
        else:
            assert value is True, key

result = {name: parse('--config', path) for name, path in paths.items()}
given = {name: parse(*as_flags(yaml.safe_load(open(path)))) for name, path in paths.items()}
print(json.dumps({'config': result, 'flags': given, 'fmnist': parse(*flags)}))
"""


def test_the_command_lists_them_and_prints_a_path(capsys):
    assert cli.main(['recipe']) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(recipes())
    assert {'cifar_paper', 'fmnist', 'imagenet_paper_90', 'imagenet_paper_120', 'rsb_a2', 'rsb_a3'} <= set(recipes())
    assert cli.main(['recipe', 'fmnist']) == 0
    assert yaml.safe_load(Path(capsys.readouterr().out.strip()).read_text())['dataset'] == 'torch/fashion_mnist'
    assert cli.main(['recipe', 'nothing']) == 1
    assert 'recipe must be one of cifar_paper, fmnist, imagenet_paper_120, imagenet_paper_90' in one_line(capsys)


@pytest.mark.parametrize('name', recipes())
def test_the_header_says_what_was_run(name):
    path, first = recipes()[name]
    header = [line for line in path.read_text().splitlines() if line.startswith('#')]
    assert first
    assert any('run' in line.lower() for line in header)
    assert max(map(len, path.read_text().splitlines())) <= 120


@pytest.mark.skipif(not REPO, reason="TIMM_REPO does not name a clone of timm's repository")
def test_timms_parser_takes_every_line():
    paths = {name: str(path) for name, (path, _) in recipes().items()}
    result = subprocess.run(
        [sys.executable, '-c', PARSE, json.dumps(paths), FMNIST],
        cwd=REPO,
        env={**os.environ, 'SD_RESNET_AUTOLOAD': '0'},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    parsed = json.loads(result.stdout)
    for name in paths:
        config, flags = parsed['config'][name], parsed['flags'][name]
        assert config == flags, name  # the same types and values as on a command line
    assert parsed['config']['fmnist'] == parsed['fmnist']
