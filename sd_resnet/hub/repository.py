"""From a training run to a folder that is exactly a repository of the Hugging Face Hub."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import get_token
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf

from ..analysis.costs import model_cost, plot_costs
from ..analysis.runs import Run, read_run
from ..errors import VerificationError
from ..files import written_whole
from ..resnets.checkpoints import fold
from .card import addresses, describe, model_card, plot_training
from .verify import CARD, CONFIG, RECORD, WEIGHTS, check_contents, check_function, file_hash, refusing, verify

# What this package writes beside the weights: of these a new push leaves none behind that it does not write again.
OWN_FILES = (CARD, CONFIG, RECORD, 'args.yaml', 'summary.csv', 'training.png', 'survival.png')
_SECRET = re.compile(rb'\bhf_[A-Za-z0-9]{20,}')


def prepare(
    source: Path, out: Path, repo_id: str, *, checkpoint: str | None = None, no_ema: bool = False, **options: Any
) -> Path:
    """Write exactly what is to be sent to the new folder `out`.

    `source` is a run folder (`checkpoint` and `no_ema` choose from it, see `read_run`; for `options` see
    `write_repository`), or a finished repository folder, taken as it is, but for a card without a repository,
    which gets this one.

    Raises:
        VerificationError: The finished folder is damaged, its card is another repository's, or a file holds a token.
    """
    if out.exists():
        raise FileExistsError(f'{out} exists; remove it, or choose another folder')
    if not source.is_dir():
        raise FileNotFoundError(f'{source} is not a folder; give a run folder or a finished repository folder')
    if repo_id.count('/') != 1:  # of a bare NAME the client makes a repository under the token's owner
        raise ValueError(f'repo-id must be USER/NAME, got {repo_id!r}')
    validate_repo_id(repo_id)
    if not (source / WEIGHTS).is_file() or not (source / CONFIG).is_file():
        return write_repository(read_run(source, checkpoint, not no_ema), out, repo_id, **options)
    given = {'checkpoint': checkpoint, 'no-ema': no_ema, **options}
    if refused := [f'--{name}' for name, value in given.items() if value]:
        raise ValueError(f'{source} is a finished repository: {", ".join(refused)} must be given when it is written')
    verify(str(source), report=lambda line: None)
    card = _checked_card(source, repo_id)
    with written_whole(out) as part:
        shutil.copytree(source, part, ignore=shutil.ignore_patterns('.git', '.cache'))  # of a clone or a download
        (part / CARD).write_text(card, encoding='utf-8')
        _refuse_secrets(part)
    return out


def write_repository(
    run: Run, out: Path, repo_id: str, *, license: str | None = None, dataset: str | None = None, plain: bool = False
) -> Path:
    """Write a folder laid out like a repository of the Hub: weights, configuration, card, pictures, record.

    `repo_id`, `license` and `dataset`, by their names on the Hub, are for the card; `repo_id` is NAME alone as long as
    there is no repository. `plain` folds the survival probabilities in: for ImageNet's nets an ordinary timm ResNet.

    Raises:
        VerificationError: What was written does not load, or holds a token of the Hub; it is not left behind.
    """
    if run.converted:
        advice = 'load it, sd_resnet.unconvert(model), and timm.models.push_to_hf_hub(model, REPO): see docs/hub.md'
        raise ValueError(f"{run.name} is timm's network, and this publishes the package's own; {advice}")
    trained: Any = run.model()
    model: Any = fold(trained) if plain else trained
    with written_whole(out) as part:
        part.mkdir(parents=True)
        _write_weights(run, model, part, license)
        cost = model_cost(trained, trained.pretrained_cfg['input_size'][-1])
        record = describe(run, trained, model, cost, file_hash(part / WEIGHTS), license, dataset)
        card = model_card(record, run.args, repo_id, bool(run.epochs))
        texts = {RECORD: yaml.safe_dump(record, sort_keys=False, allow_unicode=True)}
        texts |= {'args.yaml': yaml.safe_dump(run.args), CARD: str(card)}
        if run.epochs:
            columns = list(run.epochs[-1])
            rows = [columns, *([f'{epoch.get(c, float("nan")):.10g}' for c in columns] for epoch in run.epochs)]
            texts['summary.csv'] = ''.join(f'{",".join(row)}\n' for row in rows)
            plot_training(run.epochs, part / 'training.png', constant=min(trained.survival_probs) == 1)
        if record['survival']['share'] < 1:
            plot_costs(cost, part / 'survival.png')
        for file, text in texts.items():
            (part / file).write_text(text, encoding='utf-8')
        _refuse_secrets(part)
        loaded = check_contents(part, str(out))
        check_function(trained, loaded, f'{out} computes something else than was trained; this is a bug of sd_resnet')
    return out


def _write_weights(run: Run, model: Any, folder: Path, license: str | None) -> None:
    # timm adds what else the network was built with, as the arguments that came with weights from the Hub.
    args = {key: value for key, value in run.model_args.items() if not key.startswith('drop_path')}
    if hasattr(model, 'drop_path_rate'):
        args |= {key: getattr(model, key) for key in ('drop_path_schedule', 'drop_path_mode', 'drop_path_rescale')}
        if not model.drop_path_sync:
            args['drop_path_sync'] = False
        if (rate := model.drop_path_rate) is not None or isinstance(model.drop_path_schedule, str):
            args['drop_path_rate'] = 1 - model.survival_probs[-1] if rate is None else rate
    args |= {'in_chans': next(model.parameters()).shape[1], 'num_classes': model.num_classes}  # of the stem
    labels = {'label_names': run.label_names} if len(run.label_names or ()) == model.num_classes else {}
    save_for_hf(model, str(folder), labels, model_args=args, safe_serialization=True)
    config = json.loads((folder / CONFIG).read_text(encoding='utf-8'))
    del config['model_args']['num_classes']  # it is beside them, and transformers' wrapper takes it from there only
    config['pretrained_cfg']['hf_hub_filename'] = WEIGHTS  # else a failing request falls back to another file
    if license:
        config['pretrained_cfg']['license'] = license
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')


def _checked_card(folder: Path, repo_id: str) -> str:
    """The card with its repository, if it is of these weights, and says how to load them from where they go."""
    with refusing(f'{folder} holds no {CARD} of text', 'publish the run folder instead', OSError, UnicodeDecodeError):
        card = (folder / CARD).read_text(encoding='utf-8')
    if f'\n# {repo_id.split("/")[-1]}\n' in card:
        for key, here in addresses(None).items():
            card = card.replace(here, addresses(repo_id)[key])
    if not re.search(rf'hf-hub:{re.escape(repo_id)}(?![\w./-])', card):
        other = f'{folder}/{CARD} tells how to load another repository than {repo_id}'
        raise VerificationError(f'{other}; publish under its name, or publish the run folder')
    if file_hash(folder / WEIGHTS) not in card:
        raise VerificationError(f'{folder}/{CARD} does not name the sha256 of {WEIGHTS}; publish the run folder')
    return card


def _refuse_secrets(folder: Path) -> None:
    """A file that holds a token of the Hub is named, without the token."""
    token = (get_token() or '').encode()
    for path in sorted(path for path in folder.rglob('*') if path.is_file() and path.name != WEIGHTS):
        content = path.read_bytes()
        if _SECRET.search(content) or (token and token in content):
            raise VerificationError(f'{path.relative_to(folder)} holds a token of the Hub; remove it, and revoke it')
