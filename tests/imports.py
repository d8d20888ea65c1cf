"""What Python files import, read from their text: nothing is run, and no import is too deep inside to be seen."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = 'sd_resnet'
INIT = '__init__'
# Data flows one way. Of those with a | between them neither imports the other; `__init__` is the package's own.
ORDER = 'errors files figures recipes core resnets converted analysis __init__ hub|bench quickstart|study cli'
BASE = ('errors', 'files', 'figures', 'recipes')  # rooms that every wing but `core` may use


def package_sources():
    """{module: text} of the package, named from its top: 'core.draws', 'core.__init__', '__init__'."""
    folder = ROOT / PACKAGE
    return {
        '.'.join(path.relative_to(folder).with_suffix('').parts): path.read_text(encoding='utf-8')
        for path in sorted(folder.rglob('*.py'))
    }


def imported_names(module, source, inside_functions=True):
    """The full names of everything that a file imports: 'torch.nn', 'sd_resnet.core.draws.Draw'.

    Args:
        module: Its own name, as in `package_sources`, from which relative imports count.
        source: Its text.
        inside_functions: Also those that are reached only when a function is called.
    """
    above = [PACKAGE, *module.split('.')]
    names, nodes = set(), [ast.parse(source)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = [*above[: -node.level], node.module] if node.level else [node.module]
            names.update('.'.join(filter(None, [*start, alias.name])) for alias in node.names)
        elif inside_functions or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            nodes += ast.iter_child_nodes(node)
    return names


def foreign_imports(module, source, inside_functions=True):
    """The top names of what a file imports from elsewhere, the standard library included: {'torch', 'pathlib'}."""
    return {name.split('.')[0] for name in imported_names(module, source, inside_functions)} - {PACKAGE}


def own_imports(sources):
    """{module: the modules of the package that it imports}; a package's name stands for its `__init__`."""
    return {module: set(_own(module, source, sources)) for module, source in sources.items()}


def _own(module, source, sources):
    for name in imported_names(module, source):
        first, *parts = name.split('.')
        if first == PACKAGE:
            # the longest part of the name that is a module; what follows is something in it
            lengths = range(len(parts), -1, -1)
            candidates = (c for n in lengths for c in ('.'.join(parts[:n]), '.'.join([*parts[:n], INIT])))
            yield next(candidate for candidate in candidates if candidate in sources)


def wing_of(module):
    """'core.draws' stands in 'core'; a base room, or the top's `__init__`, is its own."""
    return module.split('.')[0]


def wing_imports(sources):
    """{wing or base room: the others that its modules import}."""
    found = {}
    for module, imported in own_imports(sources).items():
        wing = wing_of(module)
        found.setdefault(wing, set()).update({wing_of(other) for other in imported} - {wing})
    return found


def floors(imports):
    """{wing: its floor}: 1 where it imports none, else one above the highest that it imports."""
    found = {}

    def floor(wing):
        if wing not in found:
            found[wing] = 1 + max(map(floor, imports[wing]), default=0)
        return found[wing]

    for wing in imports:
        floor(wing)
    return found


def count_lines(source):
    return len(source.splitlines())
