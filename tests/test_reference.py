"""Whoever looks up a name or a message: docs/reference.md and docs/troubleshooting.md say what the source says."""

import ast
import inspect
import re

import pytest
import timm
import torch

import sd_resnet
from docs import reference
from sd_resnet.core.ramp import KINDS, DropPathRamp
from sd_resnet.core.refusals import MODES, RESCALES
from sd_resnet.core.schedules import SCHEDULES
from sd_resnet.resnets.network import StochasticDepthNet

from .imports import ROOT, package_sources

PAGE = reference.PAGE.read_text(encoding='utf-8')
SOURCES = [*package_sources().values(), (ROOT / '_sd_resnet_autoload.py').read_text(encoding='utf-8')]
TROUBLE = (ROOT / 'docs' / 'troubleshooting.md').read_text(encoding='utf-8')


def test_the_page_is_what_the_script_writes():
    """Made anew by `python -m docs.reference`."""
    assert reference.page() == PAGE


def test_a_changed_docstring_changes_the_page(monkeypatch):
    monkeypatch.setattr(sd_resnet.register, '__doc__', 'Something else.\n\nArgs:\n    name: Any.\n')
    entry = 'Something else.\n\n- `name: str`: Any.\n- returns `str`\n'
    assert entry not in PAGE
    assert entry in reference.page()


ENTRIES = dict(re.findall(r'^### `(.+?)`\n\n(.*?)(?=^###? |\Z)', PAGE, re.M | re.S))


def net():
    return timm.create_model('test_vit', drop_path_rate=0.1)


# What an entry says that it raises, and a call that does
WRONG = {
    'convert': {
        'ValueError': lambda: sd_resnet.convert(net(), mode='rows'),
        'RuntimeError': lambda: sd_resnet.convert(net(), input_size=(1, 32, 32)),
    },
    'register': {'ValueError': lambda: sd_resnet.register('test_vit.r160_in1k')},
    'subnetwork': {
        'TypeError': lambda: sd_resnet.subnetwork(torch.nn.Linear(1, 1), depth=1),
        'ValueError': lambda: sd_resnet.subnetwork(timm.create_model('sd_resnet18')),
    },
    'survival_probs': {'ValueError': lambda: sd_resnet.survival_probs(0)},
    'to_resnet': {'TypeError': lambda: sd_resnet.to_resnet(net())},
    'DropPathRamp': {'ValueError': lambda: DropPathRamp('sudden', 1)},
    'StochasticDepth': {'ValueError': lambda: sd_resnet.StochasticDepth(0.0)},
    'model.set_drop_path': {'ValueError': lambda: timm.create_model('sd_resnet18').set_drop_path(rate=1.0)},
}


def test_every_public_name_is_there():
    assert ENTRIES.keys() >= {*sd_resnet.__all__, 'Conversion', 'DropPathRamp'} - {'__version__'}
    assert '`sd_resnet.__version__`' in PAGE


@pytest.mark.parametrize('name', [name for name in ENTRIES if not name.startswith('sd-resnet ')])
def test_what_it_raises_is_there_and_nothing_else(name):
    wrong = WRONG.get(name, {})
    assert {*re.findall(r'^- raises `(\w+)`: \S', ENTRIES[name], re.M)} == wrong.keys()
    for kind, call in wrong.items():
        with pytest.raises(Exception, match=' ') as raised:
            call()
        assert type(raised.value).__name__ == kind


TAKING = [name for name in ENTRIES if name in sd_resnet.__all__ or name == 'model.set_drop_path']


@pytest.mark.parametrize('name', TAKING)
def test_every_argument_is_there_with_its_meaning(name):
    function = getattr(StochasticDepthNet if name.startswith('model.') else sd_resnet, name.split('.')[-1])
    arguments = inspect.signature(function).parameters.keys() - {'self'}
    found = dict(re.findall(r'^- `(\w+): [^`]+`(.*)', ENTRIES[name], re.M))
    assert found.keys() == arguments
    assert all(found.values()) or name == 'expected_depth'  # whose first sentence says it


def test_the_options_are_those_that_networks_take():
    rows = dict(re.findall(r'^\| `(drop_path_\w+)` \| (.*)', PAGE, re.M))
    own = inspect.signature(StochasticDepthNet.__init__).parameters
    assert rows.keys() == {name for name in own if name.startswith('drop_path_')}
    values = {'mode': MODES, 'rescale': RESCALES, 'schedule': SCHEDULES, 'ramp': KINDS}
    for name, allowed in values.items():
        assert [value for value in allowed if f"`'{value}'`" not in rows[f'drop_path_{name}']] == []


@pytest.mark.parametrize('name', ['info', 'bench', 'push', 'verify'])
def test_commands_are_there_with_what_can_follow(name):
    entry = ' '.join(ENTRIES[f'sd-resnet {name}'].split())
    assert '%(' not in entry
    assert f'For example `sd-resnet {name} ' in entry
    assert ' - `' in entry


def templates(tree):
    """Every text of a source, with a line's end for what is put into it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield ''.join(part.value if isinstance(part, ast.Constant) else '\n' for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def quoted(page):
    """The messages with which rows of tables begin."""
    return [message for cell in re.findall(r'^\| (`.*?) \| ', page, re.M) for message in re.findall('`(.+?)`', cell)]


def said_by(message, texts):
    """Does one of the texts hold all of a message but its `...`, in this order?"""
    pattern = re.compile('.*'.join(map(re.escape, message.split('...'))), re.S)
    return any(pattern.search(text) for text in texts)


TEXTS = [text for source in SOURCES for text in templates(ast.parse(source))]


def test_messages_are_quoted_as_the_source_has_them():
    messages = quoted(TROUBLE)
    assert len(messages) > 90
    assert [message for message in messages if max(map(len, message.split('...'))) < 8] == []
    assert [message for message in messages if not said_by(message, TEXTS)] == []
    assert len(set(messages)) == len(messages)


def test_a_message_that_the_source_does_not_have_is_found():
    made_up = '| `drop_path_rate must be in [0, 2), got ...`, `is empty` | cause | cure |\n| `row` mode |'
    assert [said_by(message, TEXTS) for message in quoted(made_up)] == [False, True]


def refusals(source):
    """The texts of what a module raises."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise):
            yield max(templates(node), key=len, default='')


@pytest.mark.parametrize('module', ['core.refusals', 'core.schedules', 'core.drop_path'])
def test_what_core_refuses_has_an_entry(module):
    texts = list(filter(None, refusals(package_sources()[module])))
    assert texts
    known = quoted(TROUBLE)
    assert [text for text in texts if not any(said_by(message, [text]) for message in known)] == []
