"""Whoever decides by docs/benchmarks.md: its figures, and README's, are those of the committed records."""

import json
import shlex
from dataclasses import asdict
from itertools import chain, product

import pytest
import torch

from docs import benchmarks
from sd_resnet.cli import main as cli
from sd_resnet.cli.commands import bench_settings


def test_the_pages_are_what_the_records_give():
    """Made anew by `python -m docs.benchmarks`."""
    for path, text in benchmarks.pages().items():
        assert path.read_text() == text, path.name


COMMANDS = benchmarks.RECORDS | benchmarks.ON_GPU


@pytest.mark.parametrize('name', COMMANDS)
def test_each_record_is_of_the_command_beside_it(name, monkeypatch):
    """Whoever runs the command again measures what the record holds: these settings, all of them and no others."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    args = cli._parser().parse_args(['bench', *shlex.split(COMMANDS[name])])
    settings = [*chain.from_iterable(bench_settings(args))]
    record = json.loads((benchmarks.FOLDER / 'results' / f'{name}.json').read_text())
    assert record['settings'] == json.loads(json.dumps([*map(asdict, settings)]))
    grids = (product(each.models, each.batches, each.sizes, each.rates) for each in settings)
    ran = [(race['model'], race['batch'], race['size'], race['rate']) for race in record['races']]
    for (model, batch, size, rate), asked in zip(ran, chain.from_iterable(grids), strict=True):
        assert (model, batch, size if asked[2] else None, rate) == asked
    assert (benchmarks.FOLDER / 'results' / f'{name}.txt').is_file()


def test_a_page_without_its_markers_is_refused():
    with pytest.raises(ValueError, match='the page must hold'):
        benchmarks.replaced('# A page\n', 'times', 'a table\n')
    begun = benchmarks.BEGIN.format('times')
    assert benchmarks.replaced(f'a\n{begun}old\n{benchmarks.END}b\n', 'times', 'new\n') == (
        f'a\n{begun}new\n{benchmarks.END}b\n'
    )
