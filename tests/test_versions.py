"""Whoever holds on to older versions: what `.ci/run` tries are the versions that pyproject.toml promises."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip('tomli')  # comes with pytest there

ROOT = Path(__file__).parent.parent
if not (ROOT / '.ci').is_dir():
    pytest.skip('a source distribution comes without .ci', allow_module_level=True)
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
PINNED = [Requirement(line) for line in (ROOT / '.ci' / 'oldest.txt').read_text(encoding='utf-8').splitlines()]
CORE = (ROOT / '.ci' / 'core_tests').read_text(encoding='utf-8').split()

# They name a ramp, and train none.
ELSEWHERE = ('test_card.py', 'test_converted_models.py', 'test_subnetworks.py', 'test_versions.py')


def lower_bounds(lines):
    """{name: version} of those that have one."""
    found = {}
    for requirement in map(Requirement, lines):
        for specifier in requirement.specifier:
            if specifier.operator in ('>=', '=='):
                found[canonicalize_name(requirement.name)] = Version(specifier.version)
    return found


def test_the_oldest_versions_that_are_tried_are_the_lower_bounds():
    """A bound that nobody tried is a promise that nobody keeps."""
    declared = lower_bounds(PROJECT['dependencies'])
    extras = lower_bounds(line for lines in PROJECT['optional-dependencies'].values() for line in lines)
    pinned = lower_bounds(map(str, PINNED))
    assert {name: version for name, version in pinned.items() if name in declared} == declared
    assert {name: version for name, version in pinned.items() if name not in declared}.items() <= extras.items()


def test_every_version_runs_whatever_compiles_or_ramps():
    """A file that is renamed, or new, would be tried with the newest versions only, without a word."""
    for path in CORE:
        assert (ROOT / path).exists(), path
    for path in (ROOT / 'tests').rglob('test_*.py'):
        compiles = re.search(r'torch\.compile\(|\.compile\(backend|drop_path_ramp=', path.read_text(encoding='utf-8'))
        listed = any(path.relative_to(ROOT).is_relative_to(each) for each in CORE)
        assert not compiles or listed or path.name in ELSEWHERE or {'conformance', 'cuda'} & {*path.parts}, path
