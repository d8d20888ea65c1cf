"""Whoever decides by docs/benchmarks.md: its figures, and README's, are those of the committed records."""

import shlex

import pytest

from docs import benchmarks
from sd_resnet.cli import main as cli


def test_the_pages_are_what_the_records_give():
    """Made anew by `python -m docs.benchmarks`."""
    for path, text in benchmarks.pages().items():
        assert path.read_text() == text, path.name


@pytest.mark.parametrize('name', benchmarks.RECORDS)
def test_each_record_is_of_the_command_beside_it(name):
    args = cli._parser().parse_args(['bench', *shlex.split(benchmarks.RECORDS[name])])
    for record in benchmarks.read_records(name):
        assert record.race.model in (args.models or [record.race.model])
        assert record.race.rate in (args.rates or [record.race.rate])
        assert record.race.batch in (args.batches or [16])
        assert record.race.size in (args.sizes or [record.race.size])
        kept = {each: record.settings[each] for each in ('steps', 'seeds', 'compile', 'channels_last', 'schedule')}
        assert kept == {each: getattr(args, each) or record.settings[each] for each in kept}
        assert kept['compile'] == args.compile
        assert kept['channels_last'] == args.channels_last
        assert record.settings['peers'] == args.peers
        assert all(len(run) == args.steps for run in record.race.contestants['subset'].seconds)
        assert len(record.race.contestants['subset'].seconds) == args.seeds


def test_a_page_without_its_markers_is_refused():
    with pytest.raises(ValueError, match='the page must hold'):
        benchmarks.replaced('# A page\n', 'times', 'a table\n')
    begun = benchmarks.BEGIN.format('times')
    assert benchmarks.replaced(f'a\n{begun}old\n{benchmarks.END}b\n', 'times', 'new\n') == (
        f'a\n{begun}new\n{benchmarks.END}b\n'
    )
