"""Whoever installs the package gets all that it imports, and nothing that it does not."""

import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from .imports import PACKAGE, ROOT, foreign_imports, package_sources

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip('tomli')  # comes with pytest there

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text(encoding='utf-8'))['project']
# Packages that are installed under another name than they are imported by.
DISTRIBUTIONS = {'PIL': 'pillow', 'functorch': 'torch', 'sklearn': 'scikit-learn', 'yaml': 'pyyaml'}
# Extras of those who use the package; the others are for those who change it.
FOR_USERS = ('plot', 'quickstart')
AUTOLOAD = '_sd_resnet_autoload'


def needed(sources, inside_functions=True):
    """The names under which everything is installed that these modules import; see `tests.imports`."""
    found = set()
    for module, source in sources.items():
        found |= foreign_imports(module, source, inside_functions)
    found -= {*sys.stdlib_module_names, AUTOLOAD, 'tests'}
    return {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in found}


def declared(*extras):
    """The names in the dependencies; or in these extras, and in those that they contain."""
    lists = [PROJECT['optional-dependencies'][extra] for extra in extras] or [PROJECT['dependencies']]
    found = set()
    for requirement in (Requirement(line) for lines in lists for line in lines):
        if canonicalize_name(requirement.name) == canonicalize_name(PACKAGE):
            found |= declared(*requirement.extras)
        else:
            found.add(canonicalize_name(requirement.name))
    return found


def test_whatever_is_imported_is_declared_and_the_other_way_round():
    assert needed(package_sources()) == declared() | declared(*FOR_USERS)


def test_without_extras_every_module_can_be_imported():
    """What only an extra brings is imported when it is used."""
    assert needed(package_sources(), inside_functions=False) <= declared()


def test_what_python_reads_at_its_start_imports_the_standard_library_only():
    assert needed({AUTOLOAD: (ROOT / f'{AUTOLOAD}.py').read_text(encoding='utf-8')}) == set()


def test_the_tests_extra_has_what_tests_and_scripts_import():
    paths = [*(ROOT / 'tests').rglob('*.py'), *(ROOT / 'docs').rglob('*.py')]
    sources = {f'tests.{path.stem}': path.read_text(encoding='utf-8') for path in paths}
    assert needed(sources) - {'docs'} <= declared() | declared('test')


def test_imports_are_seen_wherever_they_stand():
    source = 'import numpy.linalg as la\nimport os, yaml\nfrom . import files\ndef f():\n    from PIL import Image'
    assert needed({'core.draws': source}) == {'numpy', 'pyyaml', 'pillow'}
    assert needed({'core.draws': source}, inside_functions=False) == {'numpy', 'pyyaml'}
