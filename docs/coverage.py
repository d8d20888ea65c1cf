"""What `convert` takes over, and what it leaves, of every architecture of timm that has a drop path.

`python -m docs.coverage`, in a clone, builds each on `meta` at rate 0.1, converts it in subset mode, and writes the
record docs/results/coverage.json, the page docs/coverage.md, and sd_resnet/converted/names.txt: the architectures that
are there as `sd_<name>`. A run that was stopped goes on where it was. `--only` measures some again.
"""

import argparse
import fnmatch
import json
import multiprocessing
import re
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import timm
import torch

import sd_resnet
from sd_resnet.converted.converted_models import NAMES
from sd_resnet.converted.trial import find_slots
from sd_resnet.errors import one_line
from sd_resnet.files import written_whole
from sd_resnet.resnets.resnet_imagenet import ARCHITECTURES

FOLDER = Path(__file__).parent
RECORD, PAGE = FOLDER / 'results' / 'coverage.json', FOLDER / 'coverage.md'
UNFINISHED = RECORD.with_suffix('.jsonl')
RATE = 0.1
_SIZES = re.compile(r'\d+(?: x \d+)+')  # differ where the reason is the same
HOW = ('branch', 'block', 'row')  # a drop path is taken over

Record = dict[str, Any]


def measure(name: str) -> Record:
    """One architecture's record. No drop path: no more than its name."""
    try:
        model = _build(name, drop_path_rate=RATE)
    except Exception as error:
        return {'name': name, 'refused': f'timm does not build it: {one_line(error)}'}
    slots = list(find_slots(model))
    if not slots:
        return {'name': name}
    cls = f'{type(model).__module__}.{type(model).__qualname__}'.removeprefix('timm.models.')
    size = sum(parameter.numel() for parameter in model.parameters())
    record: Record = {'name': name, 'class': cls, 'parameters': size, 'drop_paths': len(slots)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of what is left: it is in the record
            conversion = sd_resnet.convert(model)
    except (ValueError, RuntimeError) as error:
        return record | {'refused': _refusal(error)}
    taken = conversion.drop_paths
    why: dict[str, list[Any]] = {}
    left = ((path, f'left: {reason}') for path, reason in conversion.left_alone.items())
    for path, reason in (*taken.items(), *left):
        why.setdefault(_SIZES.sub('...', reason.partition(' fails: ')[0]), [0, path])[0] += 1
    counts = Counter(reason.partition(':')[0] for reason in taken.values())
    record |= {how: counts[how] for how in HOW if counts[how]} | {'left': len(conversion.left_alone)}
    return record | {'why': {reason: each for reason, each in sorted(why.items()) if reason != 'branch'}}


def _build(name: str, device: str = 'meta', **rate: float) -> Any:
    try:
        with torch.device(device):
            return timm.create_model(name, **rate)
    except TypeError:
        if not rate:
            raise
        return _build(name, device)  # it takes none
    except NotImplementedError:
        if device == 'cpu':
            raise
        return _build(name, 'cpu', **rate)  # it computes with its parameters, or torch is too old for that on `meta`


def _refusal(error: Exception) -> str:
    """The first reason of those in brackets, without the module's name; else all that is said."""
    found = re.search(r'\((?:\S*: )?([^;]+?)(?:;.*)?\)$', text := one_line(error, length=None))
    return _SIZES.sub('...', found[1] if found else text)[:200]


def measure_all(names: Iterable[str], workers: int, limit: float) -> Iterator[Record]:
    """The records as they come, each from a process of its own, which is ended after `limit` seconds."""
    context, left = multiprocessing.get_context('fork'), list(reversed(list(names)))
    running: dict[Any, tuple[str, Any, float]] = {}
    while left or running:
        while left and len(running) < workers:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_send, args=(sender, left[-1]))
            process.start()
            sender.close()
            running[receiver] = left.pop(), process, time.monotonic() + limit
        nearest = min(deadline for _, _, deadline in running.values())
        ready = wait(list(running), timeout=max(0, nearest - time.monotonic()))
        for receiver, (name, process, deadline) in list(running.items()):
            if receiver in ready or time.monotonic() > deadline:
                try:
                    yield receiver.recv() if receiver in ready else _not_tried(name, f'takes over {limit:g} s')
                except EOFError:
                    yield _not_tried(name, 'takes more memory than there is')
                process.kill()
                process.join()
                del running[receiver]


def _send(sender: Any, name: str) -> None:
    torch.set_num_threads(1)
    sender.send(measure(name))


def _not_tried(name: str, reason: str) -> Record:
    return {'name': name, 'refused': f'not tried: {reason}'}


def share(record: Record) -> float:
    """Of the drop paths around which there is a shortcut, the share that saves its work: by branch or by block."""
    saved = record.get('branch', 0) + record.get('block', 0)
    return saved / with_shortcut if (with_shortcut := saved + record.get('row', 0) + _left(record)) else 1.0


def _left(record: Record) -> int:
    """Drop paths left alone that have a shortcut; of a refused network all count, but for those that have none."""
    if 'refused' in record:
        return 0 if 'shortcut' in record['refused'] else record.get('drop_paths', 0)
    return sum(n for why, (n, _) in record['why'].items() if why.startswith('left') and 'shortcut' not in why)


def header() -> dict[str, str]:
    """What a record depends on."""
    return {package: version(package) for package in ('timm', 'torch')}


def read() -> tuple[dict[str, str], list[Record]]:
    """Versions, and the records by name; nothing where there is none."""
    if not RECORD.exists():
        return {}, []
    content = json.loads(RECORD.read_text(encoding='utf-8'))
    return content['versions'], content['architectures']


def smallest(records: list[Record]) -> dict[str, Record]:
    """One record of each class, of the model with the fewest parameters that the installed timm knows."""
    known = [record for record in records if 'class' in record and timm.is_model(record['name'])]
    return {r['class']: r for r in sorted(known, key=lambda record: record['parameters'], reverse=True)}


def write(records: list[Record]) -> None:
    """The record, a line for each architecture, the list of names, and the page."""
    lines = ',\n'.join(json.dumps(record) for record in records)
    texts = {
        RECORD: f'{{"versions": {json.dumps(header())}, "architectures": [\n{lines}\n]}}\n',
        NAMES: ''.join(f'{name}\n' for name in names(records)),
        PAGE: page(header(), records),
    }
    for path, text in texts.items():
        with written_whole(path) as part:
            part.write_text(text, encoding='utf-8')


def names(records: list[Record]) -> list[str]:
    """Those that are there as `sd_<name>`, converted."""
    return [record['name'] for record in records if 'refused' not in record and record['name'] not in ARCHITECTURES]


def page(versions: dict[str, str], records: list[Record]) -> str:
    """docs/coverage.md."""
    refused = [record for record in records if 'refused' in record]
    converted = [record for record in records if 'refused' not in record]
    classes: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        classes[record.get('class', 'not built')].append(record)
    reasons: dict[str, list[Any]] = {}
    for record in converted:
        for why, (count, path) in record['why'].items():
            reasons.setdefault(why, [0, f'`{path}` of `{record["name"]}`'])[0] += count
    by_reason: dict[str, list[str]] = defaultdict(list)
    for record in refused:
        by_reason[record['refused']].append(f'`{record["name"]}`')
    made_with = ', '.join(f'{name} {number}' for name, number in versions.items())
    sums, most = _sums(records), sorted(reasons.items(), key=lambda item: -item[1][0])
    return '\n'.join(
        (
            '# Which drop paths are taken over',
            '',
            f'Every architecture of timm with a drop path, converted in subset mode ({made_with}). Of one',
            'that you train:',
            '',
            '```sh',
            'sd-resnet info sd_convnext_atto',
            '```',
            '',
            'This page is made by `python -m docs.coverage` from [its record](results/coverage.json).',
            '',
            f'- **{len(records):,}** architectures of {len(classes)} classes; {len(refused)} are refused.',
            f'- **{sums["drop_paths"]:,}** drop paths: {sums["branch"]:,} are taken over by branch, {sums["block"]:,}',
            f'  with their block, {sums["row"]:,} by row, which saves no work; {sums["left"]:,} are left alone.',
            f'- Of those around which there is a shortcut **{_share(records):.1%}** save their work.',
            '',
            '## By class of timm',
            '',
            '| class | architectures | refused | drop paths | by branch | by block | by row | left alone |',
            '| --- | --- | --- | --- | --- | --- | --- | --- |',
            *(_row(name, each) for name, each in sorted(classes.items())),
            '',
            '## Why not by branch',
            '',
            '| how, and why | drop paths | for example |',
            '| --- | --- | --- |',
            *(f'| {why} | {n:,} | {path} |' for why, (n, path) in most),
            '',
            '## Refused',
            '',
            *(f'- {why}: {", ".join(names)}' for why, names in sorted(by_reason.items())),
            '',
        )
    )


def _sums(records: list[Record]) -> Counter[str]:
    return Counter({key: sum(r.get(key, 0) for r in records) for key in ('drop_paths', *HOW, 'left')})


def _share(records: list[Record]) -> float:
    return share({**_sums(records), 'why': {'left': (sum(map(_left, records)), '')}})


def _row(name: str, records: list[Record]) -> str:
    sums, refused = _sums(records), sum('refused' in record for record in records)
    cells = (len(records), refused, *(sums[key] for key in ('drop_paths', *HOW, 'left')))
    return f'| `{name}` | ' + ' | '.join(f'{cell:,}' for cell in cells) + ' |'


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog='python -m docs.coverage', description=__doc__)
    parser.add_argument('--only', nargs='+', default=['*'], metavar='PATTERN', help='names of architectures, with *')
    parser.add_argument('--workers', type=int, default=2, help='processes at once')
    parser.add_argument('--limit', type=float, default=300, help='seconds for one architecture')
    args = parser.parse_args(argv)
    all_names = [name for name in timm.list_models() if not name.startswith('sd_')]
    done = _unfinished()
    wanted = [name for name in all_names if any(fnmatch.fnmatch(name, pattern) for pattern in args.only)]
    for record in measure_all([name for name in wanted if name not in done], args.workers, args.limit):
        done[record['name']] = record
        print(f'{len(done):>5} {record["name"]}: {record.get("refused", "")}', flush=True)
        with UNFINISHED.open('a', encoding='utf-8') as file:
            file.write(f'{json.dumps(record)}\n')
    known = {record['name']: record for record in read()[1]} | done
    write([known[name] for name in sorted(known) if len(known[name]) > 1 and name in all_names])
    UNFINISHED.unlink()


def _unfinished() -> dict[str, Record]:
    """What a run that was stopped has measured with these versions; from now on the file has that and no half line."""
    lines = UNFINISHED.read_text(encoding='utf-8').split('\n')[:-1] if UNFINISHED.exists() else []
    if lines[:1] != [json.dumps(header())]:
        lines = [json.dumps(header())]
    UNFINISHED.write_text(''.join(f'{line}\n' for line in lines), encoding='utf-8')
    return {record['name']: record for record in map(json.loads, lines[1:])}


if __name__ == '__main__':
    main()
