"""The card of a published network: what the run's record holds, in the words of `hub/model_card.md`, and a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..analysis.costs import NetworkCost
from ..analysis.runs import Run
from ..figures import KEPT, OTHER, new_figure, save_figure
from ..resnets.checkpoints import NO_PLAIN_CIFAR
from ..resnets.resnet_imagenet import StochasticResNet

Epochs = Sequence[Mapping[str, float]]

UNKNOWN = 'not recorded'
_LR_BASE = ('lr_base', 'lr_base_size', 'lr_base_scale')
# Of `args.yaml`, in the order of the card; the rest is in the file.
_RECIPE = (
    *('epochs', 'batch_size', 'grad_accum_steps', 'opt', 'lr', *_LR_BASE, 'momentum', 'weight_decay', 'clip_grad'),
    *('sched', 'warmup_epochs', 'img_size', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'color_jitter', 'aa'),
    *('reprob', 'mixup', 'cutmix', 'smoothing', 'drop', 'amp', 'amp_dtype', 'model_ema', 'model_ema_decay', 'seed'),
    *('device', 'notes'),
)
_LABELS = {'batch_size': 'batch size of each device'}
_VALUES = {'opt sgd': 'sgd (with Nesterov momentum, as timm builds it)'}


def describe(
    run: Run, trained: Any, model: Any, cost: NetworkCost, sha256: str, license: str | None, dataset: str | None
) -> dict[str, Any]:
    """The record of `model`, which is what was `trained`, or folded: all that the card says, in plain Python."""
    cfg, schedule, given = trained.pretrained_cfg, trained.drop_path_schedule, str(run.args.get('dataset') or '')
    shown = ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
    torch_version = torch.__version__.split('+')[0]
    return {
        'architecture': model.pretrained_cfg['architecture'],
        'trained_as': cfg['architecture'],
        'folded': isinstance(trained, StochasticResNet) and not isinstance(model, StochasticResNet),
        'plain': model is not trained,
        'sha256': sha256,
        'parameters': cost.parameters,
        'flops': cost.flops,
        'image_size': cost.image_size,
        'license': license,
        'dataset': dataset or (given.removeprefix('hfds/') if given.startswith('hfds/') else None),
        'base_model': run.base_model,
        'split': run.args.get('val_split') or UNKNOWN,
        'metrics': run.metrics,
        'checkpoint': {'file': run.file, 'epoch': run.checkpoint.epoch, 'averaged': run.checkpoint.averaged},
        'survival': {
            'schedule': schedule if isinstance(schedule, str) else list(schedule),
            'last': round(trained.survival_probs[-1], 6),
            'blocks': len(trained.survival_probs),
            'expected_depth': round(trained.expected_depth, 3),
            'mode': trained.drop_path_mode,
            'rescale': trained.drop_path_rescale,
            'ramp': (run.args.get('model_kwargs') or {}).get('drop_path_ramp'),
            'share': 1.0 if trained.drop_path_mode == 'row' else round(cost.share(trained.survival_probs), 3),
            'probabilities': [round(p, 6) for p in trained.survival_probs],
        },
        'preprocessing': {key: list(cfg[key]) if isinstance(cfg[key], tuple) else cfg[key] for key in shown},
        'published_with': {'sd-resnet': __version__, 'timm': timm.__version__, 'torch': torch_version},
    }


def model_card(record: dict[str, Any], args: dict[str, Any], repo_id: str, summary: bool) -> ModelCard:
    """The card of a run; what the record does not hold is called "not recorded".

    `args` are the run's, `repo_id` is USER/NAME, or NAME alone until there is a repository; `summary`: there is a
    `summary.csv`, and so a picture of the training.
    """
    dataset, metrics, task = record['dataset'], record['metrics'], 'image-classification'
    title = repo_id.split('/')[-1]
    named = dataset or args.get('dataset') or UNKNOWN
    split = {'dataset_split': record['split']}
    kinds = (('eval_top1', 'accuracy', 'top-1 accuracy (%)'), ('eval_top5', 'top-5-accuracy', 'top-5 accuracy (%)'))
    results = [
        EvalResult(task, dataset or 'unknown', named, kind, round(metrics[key], 3), metric_name=name, **split)
        for key, kind, name in kinds
        if key in metrics
    ]
    data = ModelCardData(
        library_name='timm',
        pipeline_tag=task,
        license=record['license'] or 'unknown',
        tags=[task, 'timm', 'stochastic-depth'],
        datasets=[dataset] if dataset else None,
        base_model=record['base_model'],
        metrics=['accuracy'] if 'eval_top1' in metrics else None,
        model_name=title if results else None,  # nothing else takes it
        eval_results=results or None,
    )
    # In an installed package the template lies in the package, in a checkout in `hub/`.
    places = (parent / 'model_card.md' for parent in (Path(__file__).parents[1], Path(__file__).parents[2] / 'hub'))
    template = str(next(path for path in places if path.is_file()))
    facts: dict[str, Any] = {'record': record, 'args': args, 'summary': summary, 'dataset': named, 'results': results}
    facts |= {'title': title, **addresses(repo_id if '/' in repo_id else None)}
    facts |= {'recipe': _recipe(args), 'unknown': UNKNOWN, 'no_plain_cifar': NO_PLAIN_CIFAR}
    return ModelCard.from_template(data, template, **facts)


def addresses(repo_id: str | None) -> dict[str, str]:
    """How a card says to load and to verify its network: from the Hub, or, if None, from the folder that it lies in."""
    load, verify = (f'hf-hub:{repo_id}', repo_id) if repo_id else ('local-dir:.', '.')
    return {'load': f"timm.create_model('{load}', pretrained=True)", 'verify': f'`sd-resnet verify {verify}`'}


def _recipe(args: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings that were on, by what the card calls them."""
    off = {'amp_dtype': not args.get('amp'), 'model_ema_decay': not args.get('model_ema')}
    off |= dict.fromkeys(_LR_BASE, args.get('lr') is not None)
    rows = []
    for name in _RECIPE:
        value = args.get(name)
        if off.get(name) or value is None or value == '' or (value == 0 and name != 'seed'):  # a seed of 0 is a fact
            continue
        value = ', '.join(map(str, value)) if isinstance(value, list) else _VALUES.get(f'{name} {value}', value)
        rows.append((_LABELS.get(name, name.replace('_', ' ')), value))
    return rows


def plot_training(epochs: Epochs, path: Path, constant: bool = False) -> None:
    """Draw a run's losses and accuracies per epoch, as far as `summary.csv` has them; `constant` is constant depth."""
    figure, ((losses, accuracies),) = new_figure(2)
    color = OTHER if constant else KEPT
    draw_training(losses, accuracies, epochs, color, 'top 1')
    if any(epoch.get('eval_top5', 100) < 100 for epoch in epochs):
        _draw(accuracies, epochs, 'eval_top5', '--', color, 'top 5')
    for axis in (losses, accuracies):
        if axis.has_data():
            axis.legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def draw_training(losses: Any, accuracies: Any, epochs: Epochs, color: str, title: str, named: bool = True) -> None:
    """Add a run to two axes; `named` says what the losses are, once for all runs."""
    _draw(losses, epochs, 'train_loss', '--', color, "training, the recipe's loss and images" if named else None)
    _draw(losses, epochs, 'eval_loss', '-', color, 'test images' if named else None)
    _draw(accuracies, epochs, 'eval_top1', '-', color, title)
    shown = [value for line in losses.get_lines() for value in line.get_ydata()]
    if shown and max(shown) > 10 * min(shown) > 0:
        losses.set_yscale('log')
    for axis, label in ((losses, 'loss (cross entropy)'), (accuracies, 'test accuracy (%)')):
        axis.set(xlabel='epoch', ylabel=label)
        axis.xaxis.get_major_locator().set_params(integer=True)


def _draw(axis: Any, epochs: Epochs, key: str, style: str, color: str, label: str | None) -> None:
    """A metric over how often the images had been seen; timm's first epoch is 0, and not every one need be measured."""
    if all(key in epoch for epoch in epochs):
        passes = [epoch.get('epoch', index) + 1 for index, epoch in enumerate(epochs)]
        marker = 'o' if len(epochs) == 1 else None  # one point makes no line
        axis.plot(passes, [epoch[key] for epoch in epochs], style, marker=marker, color=color, label=label)
