"""Whoever opens the house: each wing imports what stands before it and nothing else, and every room is small.

Each rule is a function over {module: text} that lists what breaks it, so that a made-up module shows that it is seen.
"""

import ast
import graphlib
import re
import sys

import pytest

from .imports import (
    BASE,
    INIT,
    ORDER,
    ROOT,
    count_lines,
    floors,
    foreign_imports,
    own_imports,
    package_sources,
    wing_imports,
    wing_of,
)

PLACE = {wing: place for place, wings in enumerate(ORDER.split()) for wing in wings.split('|')}
SOURCES = package_sources()


def arrows_back(sources):
    """Imports from another wing that does not stand before one's own, and wings that have no place."""
    found = [f'{wing} has no place in the order' for wing in map(wing_of, sources) if wing not in PLACE]
    for module, imported in own_imports(sources).items():
        for other in imported:
            mine, its = wing_of(module), wing_of(other)
            if mine != its and {mine, its} <= PLACE.keys() and PLACE[its] >= PLACE[mine]:
                found.append(f'{module} imports {other}')
    return found


def circle(sources):
    """The modules of a circle of imports, the first of them twice."""
    try:
        graphlib.TopologicalSorter(own_imports(sources)).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def foreign_to_core(sources):
    """What `core` imports beside torch, timm, the standard library and itself."""
    allowed = {'torch', 'timm', *sys.stdlib_module_names}
    found = []
    for module in sources:
        if wing_of(module) == 'core':
            others = foreign_imports(module, sources[module]) - allowed
            others |= {other for other in own_imports(sources)[module] if wing_of(other) != 'core'}
            found += [f'{module} imports {other}' for other in others]
    return found


def too_long(sources):
    """Modules of more than 300 lines, and `core` where it has 1,000 together."""
    lines = {module: count_lines(source) for module, source in sources.items()}
    found = [f'{module} has {n} lines' for module, n in lines.items() if n > 300]
    core = sum(n for module, n in lines.items() if wing_of(module) == 'core')
    return found + [f'core has {core} lines'] * (core >= 1000)


def wrong_signs(sources):
    """Wings whose `__init__` holds more than a docstring, or one that does not name all that the wing imports."""
    found = []
    for wing, imported in wing_imports(sources).items():
        if wing in BASE or wing == INIT or wing in sources:
            continue
        tree = ast.parse(sources[f'{wing}.{INIT}'])
        sign = ast.get_docstring(tree) or ''
        if len(tree.body) != 1 or not sign:
            found.append(f'{wing}: only a docstring')
        purpose, _, doors = sign.partition('\n\nImports ')
        named = set(re.findall('`(.+?)`', doors)) | set(BASE if 'base rooms' in doors else ())
        found += [f'{wing}: does not say that it imports {other}' for other in imported - named - {INIT}]
        found += [f'{wing}: may not import {other}' for other in named if PLACE[other] >= PLACE[wing]]
        if not purpose or not doors:
            found.append(f'{wing}: what it is for, a blank line, and "Imports ..."')
    return found


def test_every_arrow_points_one_way():
    assert arrows_back(SOURCES) == []


def test_there_is_no_circle():
    assert circle(SOURCES) == []


def test_the_core_imports_torch_and_timm_only():
    assert foreign_to_core(SOURCES) == []


def test_rooms_and_core_are_small():
    assert too_long(SOURCES) == []


def test_every_wing_says_what_it_is_for_and_what_it_may_import():
    assert wrong_signs(SOURCES) == []


def test_the_house_has_at_most_8_floors():
    assert max(floors(wing_imports(SOURCES)).values()) <= 8


def test_the_page_names_every_room():
    """docs/architecture.md has one line for each: a room that is new, renamed or gone would leave it wrong."""
    page = (ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8')
    rooms = []
    for section in page.split('\n### ')[1:]:
        wing = re.match('`([a-z]+)/`', section)
        names = re.findall(r'^\| `(\w+)(?:\.py|/)` \|', section, re.MULTILINE)
        rooms += [f'{wing[1]}.{name}' if wing else name for name in names]
    assert sorted(rooms) == sorted({module for module in SOURCES if not module.endswith(INIT)} | {'recipes'})


@pytest.mark.parametrize(
    ('module', 'source', 'said'),
    [
        ('core.draws', 'from ..errors import one_line', 'foreign'),
        ('core.draws', 'import sd_resnet', 'foreign'),
        ('core.draws', 'import numpy as np', 'foreign'),
        ('core.draws', 'def f():\n    from torchvision.ops import stochastic_depth', 'foreign'),
        ('core.draws', 'from ..resnets import blocks', 'back'),
        ('core.draws', 'from sd_resnet.resnets.blocks import ResidualBlock', 'back'),
        ('core.draws', 'import sd_resnet.resnets.blocks', 'back'),
        ('core.draws', 'if TYPE_CHECKING:\n    from ..resnets.blocks import ResidualBlock', 'back'),
        ('resnets.blocks', 'class A:\n    async def f(self):\n        from .. import converted', 'back'),
        ('hub.card', 'from ..bench import report', 'back'),
        ('quickstart', 'try:\n    from .study import cells\nexcept ImportError:\n    pass', 'back'),
        ('files', 'from .figures import KEPT', 'back'),
        ('analysis.costs', 'from .. import __version__', 'back'),
        ('attic.dust', 'import torch', 'back'),
        ('core.drop_path', 'from . import draws', 'circle'),
        ('core.drop_path', 'if TYPE_CHECKING:\n    from .draws import Draw', 'circle'),
        ('core.draws', 'x = 1\n' * 301, 'long'),
        ('core.new', 'x = 1\n' * 300, 'long'),
        ('core.__init__', '"""Sign.\n\nImports torch."""\nfrom .draws import Draw', 'sign'),
        ('core.__init__', '', 'sign'),
        ('core.__init__', '"""Sign."""', 'sign'),
        ('core.__init__', '"""Sign.\n\nImports `resnets`."""', 'sign'),
        ('resnets.__init__', '"""Sign.\n\nImports the base rooms."""', 'sign'),
    ],
)
def test_what_breaks_a_rule_is_seen(module, source, said):
    """A small house that keeps every rule, and one room in it that does not."""
    house = {
        **dict.fromkeys((*BASE, 'quickstart'), ''),
        **{f'{wing}.{INIT}': f'"""Sign.\n\nImports {"`core`" if wing != "core" else "torch"}."""' for wing in WINGS},
        **dict.fromkeys(('core.drop_path', 'core.schedules', 'core.ramp'), 'x = 1\n' * 250),
        'core.draws': 'from torch import nn\nfrom .drop_path import StochasticDepth',
        'resnets.blocks': 'import json, numpy\nfrom ..core.draws import Draw',
        **{f'{wing}.{room}': '' for wing, room in (('hub', 'card'), ('study', 'cells'), ('analysis', 'costs'))},
        '__init__': "from .resnets.blocks import ResidualBlock\n__version__ = '1'",
    }
    rules = {'back': arrows_back, 'circle': circle, 'foreign': foreign_to_core, 'long': too_long, 'sign': wrong_signs}
    assert {name: rule(house) for name, rule in rules.items()} == {name: [] for name in rules}
    assert rules[said]({**house, module: source})


WINGS = [wing for wing in PLACE if f'{wing}.{INIT}' in SOURCES and wing not in BASE]


def test_a_floor_is_one_above_all_that_is_imported():
    imports = {'a': set(), 'b': {'a'}, 'c': {'a', 'b'}, 'd': {'a'}}
    assert floors(imports) == {'a': 1, 'b': 2, 'c': 3, 'd': 2}
