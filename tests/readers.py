"""One who does all that a page says, from top to bottom, as far as it takes seconds and no network."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import traceback
import types
from argparse import ArgumentParser
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
import yaml
from packaging.requirements import Requirement
from timm.data import resolve_data_config
from timm.utils import ParseKwargs

from sd_resnet.cli import main as cli

from .conftest import forget_sessions, go_offline
from .imports import ROOT
from .pages import command_lines, commands, read_blocks
from .test_dependencies import PROJECT

REPO = os.environ.get('TIMM_REPO')
# What is appended to a command line that has all of these words; of several the first
SMALL = {
    'sd-resnet quickstart': '--epochs 1',
    'sd-resnet bench': '--batch 2 --size 32 --steps 2 --saved-steps 0 --seeds 1',
    'sd-resnet prune': '--images 10 --share 0.9',
    'train.py --resume': '--epochs 3 --batch-size 5 --workers 1 --device cpu --no-prefetcher',  # it has made two
    'train.py': '--epochs 1 --batch-size 5 --workers 1 --device cpu --no-prefetcher',
    'validate.py': '--batch-size 5 --workers 1 --device cpu --no-prefetcher',
}
# What is read by its own parser and not run, because
READ = {
    'sd-resnet bench --compile': 'each contestant is compiled, for minutes',
    'sd-resnet bench --growth': 'its networks are many and large, for minutes',
    'sd-resnet bench --peers': 'what breaks is tried out, for minutes',
    'sd-resnet bench --device': 'it wants a GPU',
    'python -m sd_resnet.study': 'it trains for hours, or writes committed pages',
    'python -m sd_resnet.hub': 'it writes committed weights, or publishes all of them',
    'python -m docs.*': 'it writes committed records and pages',
    'python -m tests.loopback': 'it serves until it is interrupted',
}


class Read(Exception):
    """A program has read its arguments."""


def follow(page, monkeypatch):
    """Do what the page says: a line for each thing that went wrong, and for each that needs a package that is not here.

    After what went wrong it goes on. Python blocks share one namespace, and all blocks the current folder.
    """
    module, failed, absent = types.ModuleType('page'), [], []
    monkeypatch.setitem(sys.modules, 'page', module)  # where pickle looks
    lines = page.read_text(encoding='utf-8').splitlines()
    for block in read_blocks(page):
        if missing := [need for need in block.needs if not is_installed(need)]:
            absent.append(f'{page.name}:{block.line} needs {", ".join(missing)}')
            continue
        for start, step in steps(block, page, module, monkeypatch):
            begun = time.monotonic()
            try:
                step()
            except (Exception, SystemExit, pytest.fail.Exception) as error:
                frames = traceback.extract_tb(error.__traceback__)
                line = [start, *(frame.lineno for frame in frames if frame.filename == str(page))][-1]
                failed.append(f'{page.name}:{line}: {type(error).__name__}: {error}\n    {lines[line - 1].strip()}')
            print(f'{page.name}:{start}: {time.monotonic() - begun:.1f} s')
    return failed, absent


def is_installed(need):
    """Is a package here, in a version that will do? As pip is told: `onnx`, `torch>=2.6`."""
    requirement = Requirement(need)
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def steps(block, page, module, monkeypatch):
    """(line, what is to be done) of a block."""
    if block.language == 'python':
        return [(block.line, partial(follow_code, block, page, module))]
    if block.language == 'sh':
        return [(line, partial(follow_line, text, monkeypatch)) for line, text in command_lines(block)]
    if block.language == 'text':
        return []
    return [(block.line, partial(pytest.fail, f'a block must be python, sh or text, not {block.language!r}'))]


def follow_code(block, page, module):
    """Python, with the page's own name and line numbers."""
    code = compile('\n' * (block.line - 1) + block.text, str(page), 'exec', dont_inherit=True)
    exec(code, vars(module))


def follow_line(line, monkeypatch):
    """Each command of a line, with the variables that stand before it."""
    for words in commands(line):
        with monkeypatch.context() as patched:
            while re.match(r'[A-Z_]+=', words[0]):
                name, _, value = words.pop(0).partition('=')
                patched.setenv(name, value)
                if name == 'HF_HUB_OFFLINE':
                    go_offline(patched)
            for flag, out in pairwise(words):
                if flag in ('--out', '--dry-run') and Path(out).exists():  # another example of the page wrote it
                    shutil.rmtree(out) if Path(out).is_dir() else Path(out).unlink()
            if why_not := follow_command(words):
                print(f'not run: {" ".join(words)}: {why_not}')
        forget_sessions()


def follow_command(words):
    """Do what a command line says; else why not, after as much of it as can be looked at."""
    why_not = first_of(READ, words)
    match words:
        case ['sd-resnet', *argv] if why_not:
            read_only('sd_resnet.cli.main', argv)
        case ['sd-resnet', *argv]:
            status = cli.main([*argv, *first_of(SMALL, words).split()])
            assert status == 0, f'exit status {status}'
        case ['python', '-m', module, *argv] if why_not:
            read_only(module, argv)
        case ['python', 'train.py' | 'validate.py' as script, *argv] if REPO:
            run_script(script, argv)
        case ['python', 'train.py' | 'validate.py', *argv]:
            build(argv)
            why_not = 'TIMM_REPO names no clone of timm; its network is built'
        case ['torchrun', *argv]:
            build(argv[argv.index('train.py') :])
            why_not = 'it wants several devices; its network is built'
        case ['pip', 'install', *argv]:
            extras = {name for word in argv for found in re.findall(r'\[(.+)\]', word) for name in found.split(',')}
            assert extras <= PROJECT['optional-dependencies'].keys(), f'unknown extras in {extras}'
            why_not = 'it installs'
        case ['pytest', *argv]:
            missing = [word for word in argv if '/' in word and not (ROOT / word).exists()]
            assert not missing, f'{missing} are not there'
            why_not = 'it would test itself'
        case ['git' | 'hf', *_]:
            why_not = 'it needs a network'
        case _:
            pytest.fail(f'nobody has said how {" ".join(words)!r} is tested')
    return why_not


def first_of(table, words):
    """The first entry of a table whose words all stand in a command line."""
    keys = (key for key in table if all(any(fnmatchcase(word, each) for word in words) for each in key.split()))
    return table.get(next(keys, None), '')


def read_only(module, argv):
    """Let a program read its arguments, and do no more; one that has no parser takes none."""
    if importlib.util.find_spec(module).submodule_search_locations:
        module += '.__main__'
    program, parse = importlib.import_module(module), ArgumentParser.parse_args

    def parse_and_stop(parser, *given):
        parse(parser, *given)
        raise Read

    if not {'argparse', 'ArgumentParser'} & vars(program).keys():
        assert callable(program.main), f'{module} cannot be run'
        assert not argv, f'{module} takes no arguments'
        return
    stopped = patch.object(ArgumentParser, 'parse_args', parse_and_stop)
    with stopped, patch.object(sys, 'argv', [module, *argv]), pytest.raises(Read):
        program.main()


def run_script(script, argv):
    """One of timm's, on a small scale, in a process of its own, where nobody stands in for the Hub."""
    argv = [word for word in argv if word != '--pretrained' or '--pretrained-path' in argv]
    argv += [
        *first_of(SMALL, [script, *argv]).split(),
        *(['--torchcompile', 'eager'] if '--torchcompile' in argv else []),
    ]
    environment = {**os.environ, 'OMP_NUM_THREADS': '2', 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run([sys.executable, script, *argv], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-300:]


def build(argv):
    """The network of a command line of timm's scripts, with its weights, on an image as they would read it."""
    parser = ArgumentParser(allow_abbrev=False)
    for flag, options in {
        '--config': {},
        '--model': {},
        '--checkpoint': dict(default=''),
        '--drop-path': dict(type=float),
        '--num-classes': dict(type=int),
        '--in-chans': dict(type=int),
        '--img-size': dict(type=int),
        '--input-size': dict(nargs=3, type=int),
        '--mean': dict(nargs='+', type=float),
        '--std': dict(nargs='+', type=float),
        '--model-kwargs': dict(nargs='*', default={}, action=ParseKwargs),
        '--pretrained': dict(action='store_true'),
        '--pretrained-path': {},
    }.items():
        parser.add_argument(flag, **options)
    if (config := parser.parse_known_args(argv)[0].config) is not None:
        parser.set_defaults(**yaml.safe_load(Path(config).read_text(encoding='utf-8')))
    args, _ = parser.parse_known_args(argv)
    given = dict(drop_path_rate=args.drop_path, num_classes=args.num_classes, **args.model_kwargs)
    given['in_chans'] = args.in_chans or (args.input_size or [None])[0]
    if args.pretrained_path:
        given['pretrained_cfg_overlay'] = dict(file=args.pretrained_path, num_classes=-1)  # as timm's script has it
    model = timm.create_model(args.model, args.pretrained, checkpoint_path=args.checkpoint, **given).eval()
    data = resolve_data_config(vars(args), model=model)
    mean, std = (torch.tensor(data[name]).view(-1, 1, 1) for name in ('mean', 'std'))
    with torch.no_grad():
        model((torch.rand(1, *data['input_size']) - mean) / std)
