"""Whoever counts on what docs/coverage.md says of his network: the record holds, of one small model of each class."""

import json

import pytest
import timm

from docs import coverage

VERSIONS, RECORDS = coverage.read()


@pytest.mark.parametrize('record', coverage.smallest(RECORDS).values(), ids=lambda record: record['name'])
def test_nothing_is_lost(record):
    """Another version of timm may have other networks: there the share that saves its work must not fall."""
    found = coverage.measure(record['name'])
    if VERSIONS['timm'] == timm.__version__:
        assert found == record
    else:
        assert ('refused' in found) <= ('refused' in record)
        assert coverage.share(found) >= coverage.share(record) - 1e-9


def test_the_page_and_the_list_are_of_the_record():
    assert coverage.PAGE.read_text(encoding='utf-8') == coverage.page(VERSIONS, RECORDS)
    assert coverage.NAMES.read_text(encoding='utf-8').split() == coverage.names(RECORDS)
    assert [record['name'] for record in RECORDS] == sorted(record['name'] for record in RECORDS)


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch, capsys):
    """And another leaves what it did not measure; a line that was written by halves is measured again."""
    for name in ('RECORD', 'PAGE', 'NAMES', 'UNFINISHED'):
        monkeypatch.setattr(coverage, name, tmp_path / getattr(coverage, name).name)
    made_up = {'name': 'vit_tiny_patch16_224', 'class': 'somebody.else', 'drop_paths': 7, 'refused': 'made up'}
    lines = [json.dumps(coverage.header()), json.dumps(made_up), '{"name": "test_v']
    coverage.UNFINISHED.write_text('\n'.join(lines), encoding='utf-8')
    coverage.main(['--only', 'test_vit', 'vit_tiny_patch16_224', '--workers', '1'])
    _, records = coverage.read()
    assert [record['name'] for record in records] == ['test_vit', 'vit_tiny_patch16_224']
    assert records[1] == made_up
    assert coverage.NAMES.read_text(encoding='utf-8') == 'test_vit\n'
    assert not coverage.UNFINISHED.exists()
    coverage.main(['--only', 'vit_tiny_patch16_224', '--workers', '1', '--limit', '0'])
    _, records = coverage.read()
    assert records[1]['refused'] == 'not tried: takes over 0 s'
    assert 'test_vit' in capsys.readouterr().out
