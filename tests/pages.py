"""The pages as their readers take them: code blocks and command lines, links and headings, words."""

import re
import shlex
import textwrap
from collections import Counter
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from urllib.parse import unquote

from sd_resnet.cli import main as cli

from .imports import ROOT

CARD = ROOT / 'hub' / 'model_card.md'  # a template; what is made of it lies beside its pictures
CARDS = ROOT / 'weights' / 'sd_resnet20_cifar.fmnist'
GUIDES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]  # whose code is run
WRITTEN = [*GUIDES, *(ROOT / f'{name}.md' for name in ('CHANGELOG', 'CONTRIBUTING', 'MODEL_CARD')), CARD]
PAGES = [*WRITTEN, *sorted((ROOT / 'docs').glob('*/**/*.md')), *sorted((ROOT / 'weights').rglob('*.md'))]

# What must not be said, as a pattern, and what is said in its place
TERMS = {
    r'(keep|kept|retain\w*|retention|survivor) probabilit\w+|survival rates?': 'survival probability',
    r'drop(ping|ped|out)? probabilit\w+|(dropout|dropping|drop|stochastic depth) rates?': 'drop path rate, or rate',
    r'residual (branch(es)?|paths?|functions?|mappings?)': 'branch',
    r'(skip|residual|identity)[ -]connections?|identity( (mapping|shortcut|path)s?)?|identities': 'shortcut',
    r'mini( )?batch(es)?': 'mini-batch',
    r'DropPaths?': 'drop path',
    r'state[ _]dictionar(y|ies)|state_dicts?|weight dicts?': 'state dict',
    r'full[ -]depth': 'constant depth',
    r'(skipped|disabled|inactive|deactivated) (block|branch|layer)(e?s)?|dropped layers?': 'dropped block, or branch',
    r'(native|wrapped|patched) (network|model)s?': 'own network, or converted network',
}
STYLE = {
    r'simply|just|easily|obviously': 'nothing',
    r'seamless(ly)?|powerful|blazing(ly)?|effortless(ly)?|state[- ]of[- ]the[- ]art|cutting[- ]edge': 'a measurement',
    r'[a-z]+!': 'the same with a full stop',
    r'[\U0001F000-\U0001FAFF\u2600-\u27BF]': 'a word',
    r'@@\w+@@': 'the figure that is meant',
}


@dataclass
class Block:
    """What stands between two fences."""

    language: str
    line: int  # the number of the first line between them
    text: str = ''
    needs: list[str] = field(default_factory=list)  # packages that not everybody has


def read_blocks(page):
    """All blocks of a page, in order; a ValueError where one does not end."""
    blocks, fence, before = [], '', ''
    for number, line in enumerate(page.read_text(encoding='utf-8').splitlines(), start=1):
        mark = re.match(r' *(`{3,}|~{3,}) *(.*?) *$', line)
        if not fence and mark:
            needs = re.fullmatch(r' *<!-- needs: (.+?) -->', before)
            fence = mark[1]
            blocks.append(Block(mark[2], number + 1, needs=re.split(r'[ ,]+', needs[1]) if needs else []))
        elif fence and mark and mark[1].startswith(fence) and not mark[2]:
            fence, blocks[-1].text = '', textwrap.dedent(blocks[-1].text)
        elif fence:
            blocks[-1].text += f'{line}\n'
        before = line
    if fence:
        raise ValueError(f'{page.name}:{blocks[-1].line - 1}: this block does not end')
    return blocks


def command_lines(block):
    """(number, text) of the lines of a `sh` block that are more than comments; a backslash joins one to the next."""
    for found in re.finditer(r'(?:.*\\\n)*.*\S.*', block.text):
        if not found[0].lstrip().startswith('#'):
            yield block.line + block.text.count('\n', 0, found.start()), found[0].replace('\\\n', ' ')


def commands(line):
    """The words of each command of a line; what `$(sd-resnet ...)` prints is put in its place."""
    found = [[]]
    for word in shlex.split(re.sub(r'\$\(sd-resnet ([^)]*)\)', lambda call: _printed(call[1]), line), comments=True):
        if word == '&&':
            found.append([])
        else:
            found[-1].append(word)
    return found


def _printed(command):
    with redirect_stdout(StringIO()) as out:
        assert cli.main(shlex.split(command)) == 0
    return out.getvalue().strip()


def _without(text, *patterns):
    """The text with what matches taken out, and every line where it was."""
    for pattern in patterns:
        text = re.sub(pattern, lambda found: '\n' * found[0].count('\n'), text, flags=re.M | re.S)
    return text


_BLOCKS, _COMMENTS = r'^ *(```+|~~~+).*?^ *\1 *$', r'<!--.*?-->'
_CODE = r'(?<!`)(`+)(?!`)(?:(?!\n\n).)+?(?<!`)\1(?!`)'
_QUOTED, _CITED, _TARGETS = r'"(?:(?!\n\n)[^"])*"', r'^>[^\n]*', r'(?<=\])\([^)]*\)'


def anchors(page):
    """What may follow `#` in a link to the page: code hosts make it from headings, and number those that are alike."""
    text, found, seen = _without(page.read_text(encoding='utf-8'), _BLOCKS, _COMMENTS), set(), Counter()
    for heading in re.findall(r'^#{1,6} +(.+?)[ #]*$', text, re.M):
        slug = re.sub(r'[^\w\- ]', '', _without(heading, _TARGETS).lower()).replace(' ', '-')
        found.add(f'{slug}-{seen[slug]}' if seen[slug] else slug)
        seen[slug] += 1
    return found | set(re.findall(r'<a (?:id|name)="([^"]+)"', text))


def broken_links(page):
    """A line for each link of a page that leads nowhere; of those out of the repository only the form is looked at."""
    whole = page.read_text(encoding='utf-8')
    text, folder, faults = _without(whole, _BLOCKS, _COMMENTS, _CODE), CARDS if page == CARD else page.parent, []
    for found in re.finditer(r'\]\(\s*<?([^)\s>]+)|(?:src|href)="([^"]+)"|^\[[^\]]+\]: *(\S+)', text, re.M):
        target = next(filter(None, found.groups()))
        file, _, anchor = unquote(target).partition('#')
        place = folder / file if file else page
        if re.match(r'\w+:', target):
            continue
        if not place.exists():
            faults.append((found.start(), f'{target}: there is no such file', text))
        elif anchor and (place.suffix != '.md' or anchor not in anchors(place)):
            faults.append((found.start(), f'{target}: {place.name} has no such heading', text))
    faults += [(found.start(), 'a picture without a description', text) for found in re.finditer(r'!\[\s*\]', text)]
    for found in re.finditer(r'https?://[^\s)>\]"\'`]+', whole):
        if not _well_formed(found[0].rstrip('.,;:')):
            faults.append((found.start(), f'{found[0]}: must be https, and nobody is called like that', whole))
    return [f'{page.name}:{_line(within, start)}: {fault}' for start, fault, within in faults]


def _well_formed(url):
    placeholder = r'/(USER|OWNER|ORG|NAME|REPO|your\W?\w*)(/|$)|//example\.|[<{]|\.\.\.'
    on_the_loopback_interface = r'https?://(127\.0\.0\.1|localhost)\b'
    https = re.match(r'https://[\w-]+(\.[\w-]+)+([/?#]|$)', url) and not re.search(placeholder, url)
    return https or re.match(on_the_loopback_interface, url)


def wrong_words(page):
    """A line for each word of a page that should be another; code, quotations and targets of links are no words."""
    text = _without(page.read_text(encoding='utf-8'), _BLOCKS, _COMMENTS, _CODE, _TARGETS, _QUOTED, _CITED)
    found = wrong_terms(text.replace('![', ' ['), TERMS | STYLE)
    return [f'{page.name}:{line}: not {said!r}, but {right}' for line, said, right in found]


def wrong_terms(text, table=TERMS):
    """(number of the line, what is said there, what should be) of a text."""
    for wrong, right in table.items():
        pattern = wrong.replace(' ', r'\s+')  # lines break anywhere
        for found in re.finditer(rf'(?<!\w)(?:{pattern})(?!\w)', text, re.I):
            yield _line(text, found.start()), found[0], right


def _line(text, position):
    return text.count('\n', 0, position) + 1
