"""What each command of `sd-resnet` does: a function by its name, whose docstring is what `--help` says."""

import json
import sys
from argparse import Namespace
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path

from ..analysis import costs, datasets, evaluation, pruning
from ..analysis.networks import defaults_of
from ..bench import breaks, measure, report
from ..errors import UsageError
from ..figures import figure_class
from ..hub.push import push as push_to_hub
from ..hub.repository import prepare
from ..hub.verify import verify as verify_repository
from ..quickstart import run as run_quickstart
from ..recipes import recipes
from ..resnets import checkpoints


def quickstart(args: Namespace) -> None:
    """Train on digits, publish to a folder, load it back."""
    epochs = {} if args.epochs is None else {'epochs': args.epochs}
    run_quickstart(args.out, seed=args.seed, resume=args.resume, compare=args.compare, **epochs)


def info(args: Namespace) -> None:
    """Show the blocks: survival probability, parameters, FLOPs."""
    cost = costs.network_cost(args.model, args.img_size, args.drop_path, args.schedule)
    print(costs.cost_table(cost))
    default = defaults_of(cost.architecture)
    schedule = default.schedule if args.schedule is None else args.schedule
    given = None if isinstance(schedule, str) else f'up to {1 - min(block.survival_prob for block in cost.blocks):g}'
    rate = given or (default.rate if args.drop_path is None else args.drop_path)
    print(f'drop path                 rate {rate}, schedule {schedule}, mode {default.mode}')
    print(f'the default rate          {default.rate:g}: {default.source}')
    if args.plot:
        costs.plot_costs(cost, args.plot)
        print(f'\nwrote {args.plot}')


def bench(args: Namespace) -> None:
    """Measure training steps beside those of timm's drop path."""
    if args.plot:
        figure_class()  # or its absence is found after the work
    panels = bench_settings(args)
    races = [[race for settings in panel for race in measure.run(settings)] for panel in panels]
    settings, flat = [*chain.from_iterable(panels)], [*chain.from_iterable(races)]
    print(report.table(settings[0], flat))
    tried = breaks.try_all() if args.peers else None
    if tried:
        print(f'\n{breaks.table(tried)}')
    if args.json:
        report.save_record(settings, flat, args.json, breaks=tried and breaks.record(tried))
    if args.plot:
        report.plot(settings[0], races, args.plot)


def bench_settings(args: Namespace) -> list[list[measure.Settings]]:
    """What `bench` measures, panel by panel."""
    given = {field.name: getattr(args, field.name) for field in fields(measure.Settings)}
    given = {name: value for name, value in given.items() if value is not None}
    chosen = {'models': '--model', 'rates': '--drop-path', 'batches': '--batch', 'sizes': '--size', 'peers': '--peers'}
    if args.growth and (refused := [flag for name, flag in chosen.items() if given.get(name)]):
        raise UsageError(f'{refused[0]} does not go with --growth, which goes over many')
    if args.growth:
        return measure.growth(**given)
    if args.peers and not args.models:
        return measure.beside_peers(**given)
    return [[measure.Settings(**given)]]


def recipe(args: Namespace) -> None:
    """List recipes for timm's train.py, or print one's path."""
    found = recipes()
    if args.name is None:
        print('\n'.join(f'{name:<22}{summary}' for name, (_, summary) in found.items()))
    elif args.name in found:
        print(found[args.name][0])
    else:
        raise ValueError(f'recipe must be one of {", ".join(found)}, got {args.name!r}')


def data(args: Namespace) -> None:
    """Write a data set as timm's scripts read it."""
    folder = datasets.write_fashion_mnist(args.folder, args.pad, args.images)
    print(f'wrote {folder}; train with --dataset torch/fashion_mnist --data-dir {folder} --val-split test')


def evaluate(args: Namespace) -> None:
    """Measure accuracy on a test set."""
    found = evaluation.evaluate(args.model, args.data, args.images, progress=sys.stderr.isatty())
    if args.json:
        print(json.dumps({'model': args.model, **asdict(found)}))
    else:
        scores = f'top-1 {found.top1:.2f} %, top-5 {found.top5:.2f} %, error {100 - found.top1:.2f} %'
        print(f'{args.model}: {scores}, {found.images} images')


def prune(args: Namespace) -> None:
    """Remove the blocks that a trained network can best do without."""
    if args.out and args.out.exists():
        raise FileExistsError(f'{args.out} exists; remove it, or choose another folder')
    if args.plot:
        figure_class()  # or its absence is found after the work
    models = [pruning.load(source) for source in args.models]
    if args.out:
        pruning.check_savable(models[0])
    pruned = []
    for source, model in zip(args.models, models):
        name = Path(source).name if Path(source).is_dir() else source
        pruned.append(pruning.prune(model, name, args.data, args.share, args.images))
    records = [record for record, _ in pruned]
    networks = [network for _, own in pruned for network in own]
    pruning.measure_latency([point for record in records for point in record.points], networks)
    print(pruning.table(records))
    if args.out:
        print(f'\nwrote {args.out}; load it with {pruning.save(pruned[0][1][-1], args.out)}')
    if args.json:
        pruning.save_record(records, args.json)
    if args.plot:
        pruning.plot_pruning(records, args.plot)


def export(args: Namespace) -> None:
    """Write a checkpoint as a plain timm ResNet."""
    architecture, model_args = checkpoints.export(args.checkpoint, args.out, args.model, use_ema=not args.no_ema)
    if architecture.startswith('sd_'):
        print(f'note: {checkpoints.NO_PLAIN_CIFAR}')
    given = ', '.join(f'{key}={value!r}' for key, value in {**model_args, 'checkpoint_path': str(args.out)}.items())
    print(f'wrote {args.out}; load it with timm.create_model({architecture!r}, {given})')


def push(args: Namespace) -> None:
    """Publish a training run on the Hugging Face Hub, and verify it."""
    options = {name: getattr(args, name) for name in ('checkpoint', 'no_ema', 'plain', 'license', 'dataset')}
    commit = {'private': args.private or None, 'revision': args.revision, 'message': args.message}
    if not args.dry_run:
        push_to_hub(args.source, args.repo_id, **commit, **options)
    elif refused := [name for name, value in commit.items() if value]:
        raise UsageError(f'--{refused[0]} does not go with --dry-run')
    else:
        folder = prepare(args.source, args.dry_run, args.repo_id, **options)
        print(f'wrote {folder}, nothing was sent; look at it, and load it with')
        print(f"  timm.create_model('local-dir:{folder}', pretrained=True)")


def verify(args: Namespace) -> None:
    """Check a repository's hashes, tensors and outputs."""
    verify_repository(args.target, args.fix)
