"""The model card of a published network: what the run's record holds, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .. import __version__
from ..analysis.costs import NetworkCost
from ..analysis.runs import Run
from ..resnets.checkpoints import NO_PLAIN_CIFAR
from ..resnets.resnet_imagenet import StochasticResNet

UNKNOWN = 'not recorded'
OWNER = 'USER'  # in a card, until it is published
# Of `args.yaml`, in the order of the card; the rest is in the file.
_RECIPE = (
    *('epochs', 'batch_size', 'grad_accum_steps', 'opt', 'lr', 'lr_base', 'lr_base_size', 'lr_base_scale', 'momentum'),
    *('weight_decay', 'clip_grad', 'sched', 'warmup_epochs', 'img_size', 'train_crop_mode', 'scale', 'ratio', 'hflip'),
    *('color_jitter', 'aa', 'reprob', 'mixup', 'cutmix', 'smoothing', 'drop', 'amp', 'amp_dtype', 'model_ema'),
    *('model_ema_decay', 'seed', 'device', 'notes'),
)
_ONLY_WITH = {'amp_dtype': 'amp', 'model_ema_decay': 'model_ema'}
_IN_TRAINING = {
    'batch': 'a dropped block runs neither forward nor backward',
    'subset': 'a block runs, forward and backward, for the samples that keep it and for no other',
    'row': 'the branch of a sample that drops it is computed and multiplied by 0',
}
_LIMITS = (
    'Trained and tested on one data set and one split, by one run; nothing is known of other images. Scores are not '
    'calibrated probabilities.'
)


def describe(
    run: Run, trained: Any, model: Any, cost: NetworkCost, sha256: str, license: str | None, dataset: str | None
) -> dict[str, Any]:
    """The record: all that the card says, in plain Python.

    Args:
        run: The training run.
        trained: Its network.
        model: What is published: `trained`, or the same network folded.
        cost: Of `trained`, at the run's image size.
        sha256: Of the published weights.
        license: The Hub's name of the weights' licence.
        dataset: The data set's name on the Hub; None takes the run's, where that came from the Hub.
    """
    cfg, schedule, given = trained.pretrained_cfg, trained.drop_path_schedule, str(run.args.get('dataset') or '')
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
            'share': round(cost.share(_computed(trained)), 3),
            'probabilities': [round(p, 6) for p in trained.survival_probs],
        },
        'preprocessing': {
            key: list(cfg[key]) if isinstance(cfg[key], tuple) else cfg[key]
            for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
        },
        'published_with': {
            'sd-resnet': __version__,
            'timm': timm.__version__,
            'torch': str(torch.__version__).split('+')[0],
        },
    }


def _computed(trained: Any) -> list[float]:
    """Share of each block's branch that a training step computes on average."""
    return [1.0] * len(trained.survival_probs) if trained.drop_path_mode == 'row' else list(trained.survival_probs)


def constant_depth(record: dict[str, Any]) -> bool:
    """Was nothing ever dropped?"""
    return min(record['survival']['probabilities']) == 1


def skips_work(record: dict[str, Any]) -> bool:
    """Did its training leave work out?"""
    return record['survival']['share'] < 1


def model_card(record: dict[str, Any], run: Run, repo_id: str) -> ModelCard:
    """The card of a run, from `hub/model_card.md`; what the record does not hold is called "not recorded"."""
    metrics, dataset = record['metrics'], record['dataset'] or run.args.get('dataset') or UNKNOWN
    results = [
        EvalResult(
            task_type='image-classification',
            dataset_type=record['dataset'] or 'unknown',
            dataset_name=dataset,
            dataset_split=record['split'],
            metric_type=kind,
            metric_name=label,
            metric_value=round(metrics[key], 3),
        )
        for key, kind, label in (
            ('eval_top1', 'accuracy', 'top-1 accuracy (%)'),
            ('eval_top5', 'top-5-accuracy', 'top-5 accuracy (%)'),
        )
        if key in metrics
    ]
    name, survival, constant = repo_id.split('/')[-1], record['survival'], constant_depth(record)
    scaled = not constant and survival['rescale'] == 'test'
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=record['license'] or 'unknown',
        tags=['image-classification', 'timm', 'stochastic-depth'],
        datasets=[record['dataset']] if record['dataset'] else None,
        base_model=record['base_model'],
        metrics=sorted({result.metric_type for result in results if result.metric_type == 'accuracy'}) or None,
        model_name=name,
        eval_results=results or None,
    )
    accuracy = UNKNOWN
    if results:
        values = ', '.join(f'{result.metric_value} % {str(result.metric_name).split()[0]}' for result in results)
        accuracy = f'{values} (split {record["split"]})'
    return ModelCard.from_template(
        data,
        template_str=_template().read_text(encoding='utf-8'),
        title=name,
        repo_id=repo_id,
        record=record,
        test_time=_test_time(record),
        accuracy=accuracy,
        weights=_weights(record['checkpoint']),
        license=record['license'] or UNKNOWN,
        dataset=dataset,
        curve=bool(run.epochs),
        constant=constant,
        scaled=scaled,
        ordinary=not scaled or record['plain'],  # no survival probabilities in the weights
        skips=skips_work(record),
        in_training=_IN_TRAINING[survival['mode']],
        packaged=bool(run.args.get('packaged')),
        recipe=_recipe(record, run.args),
        limits=_LIMITS + (f' {NO_PLAIN_CIFAR}.' if record['folded'] is False and record['plain'] else ''),
    )


def _recipe(record: dict[str, Any], args: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    if begin := record['base_model'] or args.get('pretrained_path') or args.get('initial_checkpoint'):
        rows.append(('started from', str(begin)))
    for name in _RECIPE:
        value = args.get(name)
        if value is None or value is False or value == '':  # a seed of 0 is a fact
            continue
        without = name in _ONLY_WITH and not args.get(_ONLY_WITH[name])
        if without or (name.startswith('lr_base') and args.get('lr') is not None):
            continue
        label = 'batch size of each device' if name == 'batch_size' else name.replace('_', ' ')
        if name == 'opt' and value == 'sgd':
            value = 'sgd (with Nesterov momentum, as timm builds it)'
        rows.append((label, ', '.join(map(str, value)) if isinstance(value, list) else str(value)))
    for label, key in (
        ('hardware', 'hardware'),
        ('source commit', 'source_commit'),
        ('for comparison', 'baseline'),
    ):
        rows.append((label, str(args.get(key) or UNKNOWN)))
    rows.append(('published with', ', '.join(f'{k} {v}' for k, v in record['published_with'].items())))
    return rows


def _weights(checkpoint: dict[str, Any]) -> str:
    average = ', moving average (EMA)' if checkpoint['averaged'] else ''
    epoch = UNKNOWN if checkpoint['epoch'] is None else f'{checkpoint["epoch"]} (the first is 0)'
    return f'`{checkpoint["file"]}`{average}, epoch {epoch}'


def _test_time(record: dict[str, Any]) -> str:
    if record['survival']['rescale'] == 'train':
        return "nothing is scaled (timm's convention)"
    folded = ', which is folded into the weights here' if record['plain'] else ''
    return f'each branch is multiplied by its survival probability{folded}'


def _template() -> Path:
    """In an installed package beside this file, in a checkout in `hub/`."""
    installed = Path(__file__).parent.parent / 'model_card.md'
    return installed if installed.is_file() else Path(__file__).parents[2] / 'hub' / 'model_card.md'
