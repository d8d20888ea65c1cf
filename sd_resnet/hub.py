"""From a training run to a repository of the Hugging Face Hub: folder, model card, push."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData, constants, get_token, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf

from .checkpoints import NO_PLAIN_CIFAR, to_resnet
from .costs import model_cost
from .plots import plot_costs, plot_training
from .records import Run, read_run
from .resnet_imagenet import StochasticResNet
from .verification import (
    CARD,
    CONFIG,
    OTHER_WEIGHTS,
    RECORD,
    WEIGHTS,
    VerificationError,
    check_contents,
    explain,
    file_hash,
    read_tensors,
)

UNKNOWN = 'not recorded'
_SECRET = re.compile(r'\bhf_[A-Za-z0-9]{20,}')
# Of `args.yaml`, in the order of the card; the rest is in the file.
_RECIPE = (
    *('epochs', 'batch_size', 'grad_accum_steps', 'opt', 'lr', 'momentum', 'weight_decay', 'clip_grad', 'sched'),
    *('warmup_epochs', 'img_size', 'train_crop_mode', 'scale', 'ratio', 'hflip', 'color_jitter', 'aa', 'reprob'),
    *('mixup', 'cutmix', 'smoothing', 'drop', 'amp', 'amp_dtype', 'model_ema', 'model_ema_decay', 'pretrained', 'seed'),
    'notes',
)
_LIMITS = (
    'Trained and tested on one data set and one split, by one run; nothing is known of other images. Scores are not '
    'calibrated probabilities.'
)


@dataclass(frozen=True)
class Published:
    """What a push left on the Hub.

    Attributes:
        url: The revision's page.
        revision: The commit.
        sha256: Of `model.safetensors`.
        line: Python that loads it.
        changed: False if the repository held exactly this before.
    """

    url: str
    revision: str
    sha256: str
    line: str
    changed: bool


def prepare(
    source: Path,
    out: Path,
    repo_id: str,
    *,
    checkpoint: str | None = None,
    no_ema: bool = False,
    plain: bool = False,
    license: str | None = None,
    dataset: str | None = None,
) -> Path:
    """Write exactly what is to be sent to a new folder.

    Args:
        source: A run folder, or a finished repository folder, which is taken as it is.
        out: The new folder.
        repo_id: `USER/NAME`.
        checkpoint: File name in the run folder; see `read_run`.
        no_ema: Take the raw weights where averaged ones are there too.
        plain: See `write_repository`, as for the rest.
        license: The Hub's name of the weights' licence.
        dataset: The data set's name on the Hub.

    Raises:
        FileExistsError: `out` exists.
        FileNotFoundError: `source` does not exist, or is neither.
        ValueError: A finished folder was given together with what only a run folder can take, or a name is not one.
    """
    if out.exists():
        raise FileExistsError(f'{out} exists; remove it, or choose another folder')
    if not source.is_dir():
        raise FileNotFoundError(f'{source} is not a folder; give a run folder or a finished repository folder')
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f'repo-id must be USER/NAME, got {repo_id!r}') from error
    if not (source / WEIGHTS).is_file() or not (source / CONFIG).is_file():
        run = read_run(source, checkpoint, not no_ema)
        return write_repository(run, out, repo_id, license=license, dataset=dataset, plain=plain)
    given = {'checkpoint': checkpoint, 'no-ema': no_ema, 'plain': plain, 'license': license, 'dataset': dataset}
    if refused := [f'--{name}' for name, value in given.items() if value]:
        raise ValueError(f'{source} is a finished repository: {", ".join(refused)} must be given when it is written')
    check_contents(source, str(source))
    return Path(shutil.copytree(source, out))


def read_listing(listing: Path) -> list[tuple[Path, str, bool]]:
    """`hub/repos.yaml`: folder, repository and whether it is private, of everything that is published.

    Args:
        listing: A list of entries with `folder` (relative to the listing's parent folder), `repo_id`, `license` and
            `visibility` (`public` or `private`).

    Raises:
        ValueError: An entry is incomplete, or its licence is not its card's.
    """
    try:
        entries = yaml.safe_load(listing.read_text(encoding='utf-8')) or []
    except (yaml.YAMLError, OSError) as error:
        raise ValueError(f'{listing} cannot be read: {" ".join(str(error).split())[:150]}') from error
    keys = {'folder', 'repo_id', 'license', 'visibility'}
    found = []
    for entry in entries:
        if not isinstance(entry, dict) or set(entry) != keys or entry['visibility'] not in ('public', 'private'):
            raise ValueError(
                f'{listing}: an entry must have {", ".join(sorted(keys))} (public or private), got {entry}'
            )
        folder = listing.absolute().parent.parent / entry['folder']
        if not (folder / CARD).is_file():
            raise ValueError(f'{listing}: {entry["folder"]} holds no {CARD}')
        if (license := ModelCard.load(folder / CARD).data.license) != entry['license']:
            raise ValueError(f'{listing}: license of {folder.name} is {entry["license"]!r}, its card says {license!r}')
        found.append((folder, entry['repo_id'], entry['visibility'] == 'private'))
    return found


def write_repository(
    run: Run,
    out: Path,
    repo_id: str,
    *,
    license: str | None = None,
    dataset: str | None = None,
    plain: bool = False,
) -> Path:
    """Write a folder laid out like a repository of the Hub: weights, configuration, card, pictures, record.

    Args:
        run: The training run and its checkpoint.
        out: The folder; one that is there is replaced when the new one is complete.
        repo_id: `USER/NAME`, for the card.
        license: The Hub's name of the weights' licence.
        dataset: The data set's name on the Hub.
        plain: Fold the survival probabilities in: for ImageNet's nets an ordinary timm ResNet.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: The run's files do not belong together.
        VerificationError: What was written does not load; it is not left behind.
    """
    trained: Any = run.model()
    model: Any = trained
    if plain:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # NO_PLAIN_CIFAR, which is in the card
            model = to_resnet(trained)
    part = out.with_name(f'{out.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        _write_weights(run, model, part, license)
        record = _record(run, trained, model, part, license, dataset)
        (part / RECORD).write_text(yaml.safe_dump(record, sort_keys=False, allow_unicode=True), encoding='utf-8')
        (part / 'args.yaml').write_text(yaml.safe_dump(run.args), encoding='utf-8')
        if run.epochs:
            columns = list(run.epochs[-1])
            rows = [columns, *([f'{epoch.get(c, float("nan")):.10g}' for c in columns] for epoch in run.epochs)]
            (part / 'summary.csv').write_text(''.join(f'{",".join(row)}\n' for row in rows), encoding='utf-8')
            plot_training(run.epochs, part / 'training.png')
        plot_costs(model_cost(trained, record['image_size']), part / 'survival.png')
        model_card(record, run, repo_id).save(part / CARD)
        check_contents(part, str(out))
        if out.exists():
            shutil.rmtree(out)
        return part.replace(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def model_card(record: dict[str, Any], run: Run, repo_id: str) -> ModelCard:
    """The card of a run, from `hub/model_card.md`; what the record does not hold is called "not recorded"."""
    survival = dict(record['survival'])
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
    name = repo_id.split('/')[-1]
    data = ModelCardData(
        library_name='timm',
        pipeline_tag='image-classification',
        license=record['license'] or 'unknown',
        tags=['image-classification', 'timm', 'stochastic-depth'],
        datasets=[record['dataset']] if record['dataset'] else None,
        metrics=sorted({result.metric_type for result in results if result.metric_type == 'accuracy'}) or None,
        model_name=name,
        eval_results=results or None,
    )
    config, checkpoint = record['preprocessing'], record['checkpoint']
    accuracy = UNKNOWN
    if results:
        weights = 'averaged weights' if checkpoint['averaged'] else 'raw weights'
        values = ', '.join(f'{result.metric_value} % {str(result.metric_name).split()[0]}' for result in results)
        accuracy = f'{values} ({weights} after epoch {checkpoint["epoch"]}, split {record["split"]})'
    return ModelCard.from_template(
        data,
        template_str=_template().read_text(encoding='utf-8'),
        title=name,
        repo_id=repo_id,
        record=record,
        trained_as=record['trained_as'],
        test_time=_test_time(record),
        accuracy=accuracy,
        license=record['license'] or UNKNOWN,
        dataset=dataset,
        preprocessing=config,
        survival=survival,
        curve=bool(run.epochs),
        recipe=_recipe(record, run),
        limits=_LIMITS + (f' {NO_PLAIN_CIFAR}.' if record['folded'] is False and record['plain'] else ''),
    )


def push(
    folder: Path,
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> Published:
    """Make a branch of a repository hold exactly this folder's files, in one commit, and check what arrived.

    Other weights that the branch holds are deleted by the same commit; other files stay.

    Args:
        folder: As `write_repository` leaves it.
        repo_id: `USER/NAME`; created if it does not exist.
        private: Readable with a token of its owner only.
        revision: Branch, created if it does not exist; None is `main`.
        message: Of the commit.

    Raises:
        VerificationError: Something is wrong with the folder, the Hub, or what came back, in one line. Until the
            commit, which is atomic, the branch is as it was.
    """
    check_contents(folder, str(folder))
    refuse_secrets(folder)
    try:
        return _push(folder, repo_id, private, revision, message)
    except VerificationError:
        raise
    except Exception as error:
        reason, token = explain(error, repo_id), get_token()
        raise VerificationError(reason.replace(token, '***') if token else reason) from error


def _push(folder: Path, repo_id: str, private: bool, revision: str | None, message: str | None) -> Published:
    api = HfApi(library_name='sd-resnet')
    ModelCard.load(folder / CARD).validate()
    try:
        info = api.model_info(repo_id)
        if private and not info.private:
            api.update_repo_settings(repo_id, private=True)
    except RepositoryNotFoundError:
        api.create_repo(repo_id, private=private)
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    head = api.model_info(repo_id, revision=revision).sha
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        parent_commit=head,  # another push in between makes this one fail
        commit_message=message or f'Publish {folder.name}',
        delete_patterns=list(OTHER_WEIGHTS),
    )
    sha256 = _compare_published(folder, repo_id, commit.oid)
    at = f'@{revision}' if revision else ''
    return Published(
        f'{constants.ENDPOINT}/{repo_id}/tree/{commit.oid}',
        commit.oid,
        sha256,
        f"timm.create_model('hf-hub:{repo_id}{at}', pretrained=True)",
        commit.oid != head,
    )


def refuse_secrets(folder: Path) -> None:
    """Raise where a file of text holds a token of the Hub, without repeating it.

    Raises:
        VerificationError: With the file's name.
    """
    token = get_token()
    for path in sorted(path for path in folder.rglob('*') if path.is_file() and path.suffix not in ('.png', '')):
        if path.name == WEIGHTS:
            continue
        text = path.read_text(encoding='utf-8', errors='replace')
        if _SECRET.search(text) or (token and token in text):
            raise VerificationError(f'{path} holds a token of the Hub, nothing was sent; remove it, and revoke it')


def _write_weights(run: Run, model: Any, folder: Path, license: str | None) -> None:
    args = {k: v for k, v in (run.args.get('model_kwargs') or {}).items() if not k.startswith('drop_path')}
    if run.args.get('gp'):
        args['global_pool'] = run.args['gp']
    if hasattr(model, 'drop_path_rate'):
        args |= {key: getattr(model, key) for key in ('drop_path_schedule', 'drop_path_mode', 'drop_path_rescale')}
        if isinstance(model.drop_path_schedule, str) or model.drop_path_rate is not None:
            rate = model.drop_path_rate
            args['drop_path_rate'] = 1 - model.survival_probs[-1] if rate is None else rate
    stem = model.conv1[0] if isinstance(model.conv1, torch.nn.Sequential) else model.conv1
    if stem.in_channels != 3:
        args['in_chans'] = stem.in_channels
    labels = {'label_names': run.label_names} if len(run.label_names or ()) == model.num_classes else {}
    save_for_hf(model, str(folder), labels, model_args=args, safe_serialization=True)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    config['pretrained_cfg']['hf_hub_filename'] = WEIGHTS  # else a failing request falls back to another file
    if license:
        config['pretrained_cfg']['license'] = license
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _record(
    run: Run, trained: Any, model: Any, folder: Path, license: str | None, dataset: str | None
) -> dict[str, Any]:
    """All that the card says, in plain Python."""
    cfg = trained.pretrained_cfg
    cost = model_cost(trained, cfg['input_size'][-1])
    schedule = trained.drop_path_schedule
    return {
        'architecture': model.pretrained_cfg['architecture'],
        'trained_as': trained.pretrained_cfg['architecture'],
        'folded': isinstance(trained, StochasticResNet) and not isinstance(model, StochasticResNet),
        'plain': model is not trained,
        'sha256': file_hash(folder / WEIGHTS),
        'parameters': cost.parameters,
        'flops': cost.flops,
        'image_size': cost.image_size,
        'license': license,
        'dataset': dataset,
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
            'share': round(cost.expected_share, 3),
            'probabilities': [round(p, 6) for p in trained.survival_probs],
        },
        'preprocessing': {
            key: list(cfg[key]) if isinstance(cfg[key], tuple) else cfg[key]
            for key in ('input_size', 'mean', 'std', 'interpolation', 'crop_pct', 'crop_mode')
        },
        'published_with': {name: version(name) for name in ('sd-resnet', 'timm', 'torch')},
    }


def _recipe(record: dict[str, Any], run: Run) -> list[tuple[str, str]]:
    args = run.args
    rows = [
        (name.replace('_', ' '), ', '.join(map(str, args[name])) if isinstance(args[name], list) else str(args[name]))
        for name in _RECIPE
        if args.get(name) not in (None, False, '')
    ]
    for label, key in (('hardware', 'hardware'), ('source commit', 'source_commit'), ('baseline', 'baseline')):
        rows.append((label, str(args.get(key) or UNKNOWN)))
    rows[-1] = ('mean and spread over runs, against constant depth', rows[-1][1])
    rows.append(('published with', ', '.join(f'{k} {v}' for k, v in record['published_with'].items())))
    return rows


def _test_time(record: dict[str, Any]) -> str:
    if record['survival']['rescale'] == 'train':
        return "nothing is scaled (timm's convention)"
    folded = ', which is folded into the weights here' if record['plain'] else ''
    return f'each branch is multiplied by its survival probability{folded}'


def _template() -> Path:
    """In an installed package beside this file, in a checkout in `hub/`."""
    installed = Path(__file__).with_name('model_card.md')
    return installed if installed.is_file() else Path(__file__).parent.parent / 'hub' / 'model_card.md'


def _compare_published(folder: Path, repo_id: str, revision: str) -> str:
    """Download a revision into an empty cache, and compare every file and every tensor; sha256 of the weights."""
    with tempfile.TemporaryDirectory() as cache:
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob('*') if path.is_file())
        arrived = Path(snapshot_download(repo_id, revision=revision, cache_dir=cache, allow_patterns=files))
        for file in files:
            if not (arrived / file).is_file() or file_hash(folder / file) != file_hash(arrived / file):
                raise VerificationError(f'{repo_id}@{revision}: {file} came back different; push again')
        sent = read_tensors(folder / WEIGHTS, str(folder))
        model = timm.create_model(f'hf-hub:{repo_id}@{revision}', pretrained=True, cache_dir=cache)
        loaded = model.state_dict()
        if sent.keys() != loaded.keys() or not all(torch.equal(tensor, loaded[key]) for key, tensor in sent.items()):
            raise VerificationError(f'{repo_id}@{revision} loads other tensors than were sent; push again')
        return file_hash(arrived / WEIGHTS)
