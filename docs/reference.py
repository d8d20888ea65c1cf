"""docs/reference.md, from docstrings, signatures and the command line: `python -m docs.reference`, in a clone.

Signatures are read from the source, and options from the parsers: so every version of Python writes the same page.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sd_resnet
from sd_resnet.cli.main import _parser
from sd_resnet.converted.convert import Conversion, convert
from sd_resnet.converted.published_rates import UNPUBLISHED
from sd_resnet.core.ramp import DropPathRamp
from sd_resnet.core.schedules import DEFAULT_DROP_PATH_RATE
from sd_resnet.files import written_whole
from sd_resnet.resnets.network import StochasticDepthNet

PAGE = Path(__file__).with_suffix('.md')
WIDTH = 120

HEAD = """# Reference

Options, functions, classes and commands: what each takes, gives and refuses (made by `python -m docs.reference`).

```python
import timm

import sd_resnet

model = timm.create_model('sd_resnet18', drop_path_rate=0.2, drop_path_mode='subset')  # options of a model
assert model.survival_probs == sd_resnet.survival_probs(8, 0.2)  # a function
model.set_drop_path(rate=0)  # a method of an own network
assert model.expected_depth == 8
```

[Options of a model](#options-of-a-model), [functions](#functions), [classes](#classes), [own networks](#own-networks),
[command line](#command-line). Sections and equations are those of
[Huang et al.](https://arxiv.org/abs/1603.09382); p_l is the survival probability of block l of L. A refusal names the
argument, its value and what is allowed: [troubleshooting](troubleshooting.md) has causes and cures.
`sd_resnet.__version__` is the version.
"""

# Of `drop_path_<name>`
VALUES = {
    'rate': "1 - p_L, in [0, 1); 0 drops nothing. `--drop-path` of timm's scripts",
    'schedule': "`'linear'`, `'uniform'`, `'timm'`, a sequence of L probabilities, or a pair of them, (p_1, p_L): see "
    '[`survival_probs`](#survival_probs)',
    'mode': "`'batch'`: one draw for each block and mini-batch (section 3); `'subset'`: one for each image, and the "
    "branch runs on the rows that survive; `'row'`: one for each image, as a mask, which saves nothing",
    'rescale': "`'train'`: the branch over p_l in training, timm's; `'test'`: times p_l in evaluation, equation 5 to "
    'the letter, see [checkpoints](checkpoints.md)',
    'sync': 'a bool: in batch mode all ranks of a distributed training drop the same blocks',
    'ramp': "`None`, or (kind, steps) with a kind of `'warmup'`, `'early'`, `'late'`, `'decay'`: a rate that changes "
    "during training, not under `'test'`, see [`DropPathRamp`](#droppathramp)",
}
WHO = """Own networks are timm's ResNets, `timm.list_models(module='resnet_imagenet')`, and the paper's CIFAR nets,
`timm.list_models(module='resnet_cifar')`. Converted networks are `timm.list_models(module='converted_models')`,
and what [`convert`](#convert) has converted. `timm.create_model` takes these options beside all that timm's own
entrypoint takes; timm's `train.py` takes them as
`--model-kwargs drop_path_mode=subset "drop_path_ramp=('late',1000)"`. A value that is not allowed is a `ValueError`;
an option that a network does not take is timm's `TypeError`. **Every `sd_` model drops when nothing is said**;
`sd-resnet info NAME` prints at which rate, and where it was published.
"""
OWN = """`model` is one of this package's ResNets; with `features_only=True` it is behind `.network`. Its ramp is
`model.drop_path_ramp`, a [`DropPathRamp`](#droppathramp) or `None`. The settings of a converted network are changed by
[`convert`](#convert).
"""
COMMANDS = """The exit status is 0, 2 after wrong usage, else 1, with the reason in one line on standard error. Each
command takes `--help`, and `--debug`, which shows the traceback of an error; `sd-resnet --version` prints the version.
In brackets stands what is taken where nothing is given. Maintainers' commands: [CONTRIBUTING](../CONTRIBUTING.md).
"""

OWN_MEMBERS = ('survival_probs', 'expected_depth', 'set_drop_path')
_SECTION = re.compile(r'^(Args|Returns|Raises):\n((?:(?: {4}.*)?\n)+)', re.M)
_ITEM = re.compile(r'^(\*{0,2}\w+): (.*)\n((?:(?: {4}.*)?\n)*)', re.M)
_FIELD = re.compile(r'^ {4}(\w+): (.+?)  # (.+)$', re.M)


def page() -> str:
    """All of it."""
    public = {name: getattr(sd_resnet, name) for name in sd_resnet.__all__ if name != '__version__'}
    classes = {name: each for name, each in public.items() if inspect.isclass(each)}
    classes |= {each.__name__: each for each in (Conversion, DropPathRamp)}
    own = {f'model.{name}': getattr(StochasticDepthNet, name) for name in OWN_MEMBERS}
    lines = [HEAD, '## Options of a model', '', *options(), '', WHO, '## Functions', '']
    for name, each in public.items():
        lines += [] if name in classes else entry(name, each, each)
    lines += ['## Classes', '']
    for name, each in sorted(classes.items()):
        lines += entry(name, each, each.__init__)
    lines += ['## Own networks', '', OWN]
    for name, each in own.items():
        lines += entry(name, each, each)
    return '\n'.join([*lines, '## Command line', '', COMMANDS, *commands()]).rstrip() + '\n'


def options() -> Iterator[str]:
    """The table of what models take."""
    own, converted = (inspect.signature(each).parameters for each in (StochasticDepthNet.__init__, convert))
    yield '| option | values | own networks: default | converted networks: default | argument of `convert` |'
    yield '| --- | --- | --- | --- | --- |'
    for name, values in VALUES.items():
        argument = 'drop_path_rate' if name == 'rate' else name
        if name == 'rate':
            defaults = [f'{DEFAULT_DROP_PATH_RATE}', f'as published, else {UNPUBLISHED}']
        else:
            given = own[f'drop_path_{name}'], converted.get(argument)
            defaults = [f'`{each.default!r}`' if each else 'not taken' for each in given]
        taken = f'`{argument}`' if argument in converted else ''
        yield f'| `drop_path_{name}` | {values} | {" | ".join(defaults)} | {taken} |'


def entry(heading: str, what: Any, called: Any) -> Iterator[str]:
    """One function, class, method or property: what it is for, takes, gives and raises; `called` has its arguments."""
    text, sections = read(what)
    yield from (f'### `{heading}`', '', *flow(text), '')
    listed = list(fields(what) if what is Conversion else _takes_and_gives(what, called, sections))
    yield from [*listed, ''] if listed else []


def _takes_and_gives(what: Any, called: Any, sections: dict[str, str]) -> Iterator[str]:
    if not isinstance(what, property):
        meanings, (parameters, returned) = items(sections.get('Args', '')), signature(called)
        for name, written in parameters.items():
            yield from item(f'`{written}`', meanings.get(name, ''))
        if returned not in ('None', 'Any'):
            yield from item(f'returns `{returned}`', sections.get('Returns', ''))
    for kind, text in items(sections.get('Raises', '')).items():
        yield from item(f'raises `{kind}`', text)
    for name, member in vars(what).items() if inspect.isclass(what) else ():
        if isinstance(member, property):
            yield from item(f'attribute `{name}`', read(member)[0])


def fields(cls: Any) -> Iterator[str]:
    """Of a dataclass, with the comments beside them."""
    for name, kind, text in _FIELD.findall(inspect.getsource(cls)):
        yield from item(f'`{name}: {kind}`', text)


def signature(function: Any) -> tuple[dict[str, str], str]:
    """How each parameter is written, by its name; and the type of what is returned."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    given, positional = tree.args, [*tree.args.posonlyargs, *tree.args.args]
    defaults = [*[None] * (len(positional) - len(given.defaults)), *given.defaults, *given.kw_defaults]
    found = {}
    for parameter, default in zip([*positional, *given.kwonlyargs], defaults):
        kind = f': {ast.unparse(parameter.annotation)}' if parameter.annotation else ''
        found[parameter.arg] = f'{parameter.arg}{kind}{f" = {ast.unparse(default)}" if default else ""}'
    found.pop('self', None)
    return found, ast.unparse(tree.returns) if tree.returns else 'None'


def commands() -> Iterator[str]:
    """Each command, with what can follow it."""
    (named,) = (action for action in _parser()._actions if isinstance(action.choices, dict))
    for name, parser in named.choices.items():
        example = parser.epilog.partition(': ')[2]
        yield from (f'### `sd-resnet {name}`', '', *flow(f'{parser.description} For example `{example}`.'), '')
        for action in parser._actions:
            if action.dest not in ('help', 'debug'):
                yield from item(_written(action), action.help % vars(action))
        yield ''


def _written(action: Any) -> str:
    """As `argparse` says it, in all of its versions alike."""
    value = action.metavar or '|'.join(action.choices or [action.dest.upper()])
    value = '' if action.nargs == 0 else {'+': f'{value} ...', '?': f'[{value}]'}.get(action.nargs, value)
    required = action.required and action.option_strings
    return f'`{" ".join(filter(None, (", ".join(action.option_strings), value)))}`{", required" if required else ""}'


def read(what: Any) -> tuple[str, dict[str, str]]:
    """The text of a docstring, and its sections by their names."""
    text = f'{inspect.getdoc(what)}\n'
    return _SECTION.sub('', text), {name: textwrap.dedent(body) for name, body in _SECTION.findall(text)}


def items(section: str) -> dict[str, str]:
    """What a section says of each name."""
    return {name: f'{first}\n{textwrap.dedent(rest)}' for name, first, rest in _ITEM.findall(section)}


def item(head: str, text: str) -> Iterable[str]:
    return flow(text, f'- {head}: ', '  ') if text.strip() else [f'- {head}']


def flow(text: str, start: str = '', indent: str = '') -> Iterator[str]:
    """Paragraphs and lists of a docstring, the first line after `start`, the others indented."""
    for number, paragraph in enumerate(re.split(r'\n\s*\n', text.strip())):
        if number:
            yield ''
        for part in re.split(r'\n(?=\* )', paragraph):
            mark = '- ' if part.startswith('* ') else ''
            yield from _filled(part.removeprefix('* '), start + mark, indent + ' ' * len(mark))
            start = indent


def _filled(text: str, line: str, indent: str) -> Iterator[str]:
    """Lines of at most `WIDTH` that break in no code, and not before what begins a list or a heading."""
    words = re.findall(r'(?:`[^`]*`|\S)+', ' '.join(text.split()))
    line += words[0]
    for word in words[1:]:
        if len(line) + 1 + len(word) > WIDTH and not re.match(r'[-+*#>=|]|\d+[.)]', word):
            yield line
            line = indent + word
        else:
            line += f' {word}'
    yield line


def main() -> None:
    with written_whole(PAGE) as part:
        part.write_text(page(), encoding='utf-8')


if __name__ == '__main__':
    main()
