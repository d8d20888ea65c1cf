"""Whoever reads a page: its code runs, its command lines are accepted, its links lead somewhere, its words are ours."""

import ast
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.models import _builder
from timm.optim import create_optimizer_v2

import sd_resnet
from sd_resnet.analysis import datasets
from sd_resnet.cli import main as cli

from . import pages
from .analysis.test_pruning import write_images
from .conftest import edit_args, write_run
from .imports import ROOT, package_sources
from .readers import REPO, follow
from .test_dependencies import PROJECT


@pytest.fixture(scope='session')
def examples(tmp_path_factory):
    """What the pages' examples name: images, a run of timm's `train.py` on them, and what is published of it."""
    pytest.importorskip('matplotlib', reason='publishing draws pictures with matplotlib')
    folder = tmp_path_factory.mktemp('examples')
    (folder / 'home' / 'output' / 'train').mkdir(parents=True)
    (folder / 'home' / 'docs' / 'results').mkdir(parents=True)
    write_images(folder / 'home' / 'images', 30, 10, 10, size=28, mode='L')
    run = write_run(folder / 'home' / 'output' / 'train' / 'RUN', 'sd_resnet20_cifar', in_chans=1)
    edit_args(run, data_dir='images', in_chans=1, img_size=None, input_size=[1, 28, 28], mean=[0.3], std=[0.3])
    model = timm.create_model('sd_resnet20_cifar', in_chans=1)
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.05, weight_decay=2e-5)  # as the script has it, for --resume
    for file in run.glob('*.tar'):
        torch.save({**torch.load(file, weights_only=False), 'optimizer': optimizer.state_dict()}, file)
    assert cli.main(['push', str(run), '--repo-id', 'me/my_model', '--dry-run', str(folder / 'published')]) == 0
    return folder


@pytest.fixture
def home(examples, server, fashion, tmp_path, monkeypatch):
    """A reader's folder, in which he is, and a Hub that knows him. Fashion-MNIST is noise: see `fashion`."""
    shutil.copytree(examples / 'home', tmp_path / 'home')
    for script in ('train.py', 'validate.py') if REPO else ():
        (tmp_path / 'home' / script).symlink_to(Path(REPO).absolute() / script)
    server.put('me/my_model', {path.name: path.read_bytes() for path in (examples / 'published').iterdir()})
    published = datasets._published
    monkeypatch.setattr(datasets, '_published', lambda source: published(source or fashion))
    monkeypatch.setattr(_builder, 'load_pretrained', partial(load_new, _builder.load_pretrained))
    monkeypatch.chdir(tmp_path / 'home')
    yield tmp_path / 'home'
    torch._dynamo.reset()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def load_new(load_pretrained, model, pretrained_cfg=None, *args, **kwargs):
    """timm's `load_pretrained`, but for what lies in timm's own repositories: those cannot be reached from here.

    In its place come the weights of timm's network of that name and tag, as they are when it is new: of the names and
    shapes of what is published. All that timm does with it is done.
    """
    config = dict(pretrained_cfg or model.pretrained_cfg)
    if not (config.get('source') or config.get('file')) and (config.get('hf_hub_id') or config.get('url')):
        name = '.'.join(filter(None, (config['architecture'].removeprefix('sd_'), config.get('tag'))))
        config['state_dict'] = timm.create_model(name).state_dict()
    load_pretrained(model, config, *args, **kwargs)


def each(paths):
    return pytest.mark.parametrize('page', paths, ids=lambda path: path.relative_to(ROOT).as_posix())


@each(pages.GUIDES)
@pytest.mark.usefixtures('home')
def test_all_that_a_page_says_can_be_done(page, monkeypatch):
    failed, absent = follow(page, monkeypatch)
    assert not failed, '\n'.join(failed)
    if absent:
        pytest.skip('; '.join(absent))


@each(pages.PAGES)
def test_links_lead_somewhere(page):
    found = pages.broken_links(page)
    assert not found, '\n'.join(found)


@each(pages.WRITTEN)
def test_each_thing_has_one_name(page):
    found = pages.wrong_words(page)
    assert not found, '\n'.join(found)


@pytest.mark.parametrize('module', package_sources())
def test_messages_have_the_same_names(module):
    """Strings of several words that are not docstrings."""
    nodes = [*ast.walk(ast.parse(package_sources()[module]))]
    docstrings = [node.value for node in nodes if isinstance(node, ast.Expr)]
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and node not in docstrings]
    said = '\n'.join(re.sub('`.*?`', '', text) for text in texts if isinstance(text, str) and ' ' in text)
    assert not [f'not {wrong!r}, but {right}' for _, wrong, right in pages.wrong_terms(said)]


def test_the_readme_is_short_and_begins_with_what_was_found():
    lines = (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
    assert len(lines) <= 130
    assert sum(len(line.split()) for line in lines) <= 1400
    assert any(re.match(r'!\[.+\]\(|\|.*\d', line) for line in lines[:24])


def test_the_citation_is_of_this_version_and_names_the_paper():
    cited = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    assert {'cff-version', 'message', 'title', 'authors'} <= cited.keys()  # what the format asks for
    assert (cited['cff-version'], cited['type']) == ('1.2.0', 'software')
    assert cited['version'] == sd_resnet.__version__
    assert (cited['license'], cited['authors']) == (PROJECT['license'], PROJECT['authors'])
    (paper,) = cited['references']
    assert {'type', 'title', 'authors'} <= paper.keys()
    assert f'title = {{{paper["title"]}}}' in pages.CARD.read_text(encoding='utf-8')
    assert [author['family-names'] for author in paper['authors']] == ['Huang', 'Sun', 'Liu', 'Sedra', 'Weinberger']


WRONG = {  # a page, and how each of the lines that are found begins
    '```\npip install .\n```': ["wrong.md:2: Failed: a block must be python, sh or text, not ''"],
    '```python\nx = 1\n```\n\n```python\nassert x == 1\nassert x == 2\n```': ['wrong.md:7: AssertionError: '],
    '```python\nx = 1 +\n```': ['wrong.md:2: SyntaxError: '],
    '```sh\nmake all\n```': ["wrong.md:2: Failed: nobody has said how 'make all' is tested"],
    '```sh\nsd-resnet info \\\n  sd_resnet18\nsd-resnet info resnet18\n```': ['wrong.md:4: AssertionError: exit'],
    '```sh\npip install . && sd-resnet inform\n```': ['wrong.md:2: SystemExit: 2'],
    '```sh\nsd-resnet bench --peers --fast\n```': ['wrong.md:2: SystemExit: 2'],
    '```sh\npython -m docs.gpu --fast\n```': ['wrong.md:2: SystemExit: 2'],
    '```sh\npython -m docs.architecture --fast\n```': ['wrong.md:2: AssertionError: docs.architecture takes no'],
    '```sh\npip install ".[everything]"\n```': ["wrong.md:2: AssertionError: unknown extras in {'everything'}"],
    '```sh\ntorchrun train.py --model sd_resnet18 --model-kwargs drop_path_mode=no\n```': ['wrong.md:2: ValueError: '],
    '```sh\npython train.py --model sd_resnet18 --in-chans 1\n```': ['wrong.md:2: '],
    '```sh\nsd-resnet info sd_resnet18  # a comment\n\n# another\n```\n\n```text\nnothing\n```': [],
    '<!-- needs: torch timm>=99 -->\n```python\nraise ValueError\n```\n': [],
}


@pytest.mark.parametrize('text', WRONG)
@pytest.mark.usefixtures('home')
def test_what_cannot_be_done_is_found(text, monkeypatch):
    """Else the test of the pages would say nothing."""
    page = Path('wrong.md')
    page.write_text(text)
    failed, absent = follow(page, monkeypatch)
    assert (len(failed), len(absent)) == (len(WRONG[text]), text.count('needs'))
    assert all(said.startswith(expected) for said, expected in zip(failed, WRONG[text])), failed


def test_links_and_words_that_are_wrong_are_found(tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(
        '# A `drop_path`, twice: here\n\n# A drop_path twice here\n\n'
        '[](#a-drop_path-twice-here-1) [](#a-drop_path-twice-here-2) [](page.md#a-drop_path-twice-here) [](none.md)\n'
        '![](page.md) `[](none.md)` https://github.com/USER/it <http://arxiv.org> [a](https://arxiv.org/abs/1)\n'
    )
    assert [fault.split(':')[1] for fault in pages.broken_links(page)] == ['5', '5', '6', '6', '6']
    page.write_text('a skip\nconnection; "a skip connection"; `identity`\n\nIt just works! @@FIGURE@@ [b](just.md)\n')
    assert [fault.split(':')[1] for fault in pages.wrong_words(page)] == ['1', '4', '4', '4']
