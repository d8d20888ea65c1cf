"""`sd-resnet quickstart`: train a small network on real images, publish it to a folder, load it back, compare.

Data sets, loaders, optimiser, schedule, EMA and checkpoints are timm's; only the loop is ours. Each epoch starts from
the seed `seed + epoch`, so that a resumed run draws what an unbroken one would have drawn; what has been measured so
far travels inside the checkpoint.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, accuracy, random_seed
from torch import Tensor, nn
from tqdm import tqdm

from .analysis.runs import read_run
from .figures import KEPT, OTHER, PROBABILITY, figure_class, new_figure, save_figure
from .hub.card import OWNER
from .hub.pictures import draw_training
from .hub.repository import write_repository
from .resnets.checkpoints import read_checkpoint

ARCHITECTURE = 'sd_resnet20_cifar'
REPO_ID = f'{OWNER}/{ARCHITECTURE}.digits'
IMAGES = 1797
SIZE = 16  # pixels; the digits have 8, and 32 would cost four times as much without being more accurate
RECIPE: dict[str, Any] = dict(
    opt='sgd',
    lr=0.05,
    momentum=0.9,
    weight_decay=5e-4,
    sched='cosine',
    warmup_epochs=2,
    warmup_lr=1e-3,
    batch_size=32,
    img_size=SIZE,
    mean=[0.3] * 3,
    std=[0.38] * 3,
    train_crop_mode='rkrr',
    scale=[0.8, 1.0],
    ratio=[0.85, 1.2],
    hflip=0.0,
    color_jitter=0.0,
    crop_pct=1.0,
    interpolation='bilinear',
    model_ema_decay=0.99,
)


@dataclass
class Result:
    """One trained network.

    Attributes:
        title: For the picture's legend.
        model: The averaged weights of the last epoch.
        survival_probs: p_l of the trained network.
        history: One entry per epoch: losses, accuracy in percent, seconds, steps, branches run per block.
    """

    title: str
    model: Any
    survival_probs: tuple[float, ...]
    history: list[dict[str, Any]]


def run(
    out: Path,
    *,
    epochs: int = 30,
    seed: int = 0,
    resume: bool = False,
    compare: bool = False,
    progress: bool = True,
) -> None:
    """Do all of it, and print what was reached.

    Args:
        out: New folder for images, run, Hub folder and picture.
        epochs: Passes over the training images.
        seed: Of weights, order, augmentation and decisions.
        resume: Go on in a folder that an interrupted run left.
        compare: Train the constant-depth network too.
        progress: Show progress bars.

    Raises:
        FileExistsError: `out` exists and `resume` was not asked for.
        FileNotFoundError: There is nothing to resume.
        KeyboardInterrupt: Ctrl-C, with how to go on; the last finished epoch is on disk.
        ModuleNotFoundError: scikit-learn or matplotlib is missing.
        OSError: Something could not be written; the last checkpoint is untouched.
        ValueError: The folder is damaged, or was begun with other settings.
    """
    if resume and not out.is_dir():
        raise FileNotFoundError(f'{out} is not a folder: nothing to resume; run without --resume')
    if not resume and out.exists():
        raise FileExistsError(f'{out} exists: go on there with --resume, or choose another folder with --out')
    if not 0 <= seed < 2**32:
        raise ValueError(f'seed must be between 0 and 2**32 - 1, got {seed}')
    figure_class()  # or its absence is found when all is trained
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second one costs this small network more than it gives
    try:
        data = write_digits(out / 'data')
        result = train(data, out / 'run', 'stochastic depth', {}, epochs, seed, progress)
        constant = None
        if compare:
            options = {'drop_path_rate': 0.0}
            constant = train(data, out / 'run_constant', 'constant depth', options, epochs, seed, progress)
    except KeyboardInterrupt:
        again = f'sd-resnet quickstart --out {shlex.quote(str(out))} --epochs {epochs} --seed {seed} --resume'
        again += ' --compare' * compare
        raise KeyboardInterrupt(f'the finished epochs are kept; go on with: {again}') from None
    finally:
        torch.set_num_threads(threads)

    test = _loader(data, train=False)
    logits, labels = predict(result.model, test)
    reached = _percent(logits, labels)
    repository = write_repository(read_run(out / 'run'), out / 'hub', REPO_ID, license='apache-2.0')
    loaded = timm.create_model(f'local-dir:{repository}', pretrained=True).eval()
    logits_again, _ = predict(loaded, test)
    if not torch.equal(logits, logits_again):
        raise RuntimeError(f'{repository} does not compute what was trained; this is a bug of sd_resnet')

    results = [result] if constant is None else [result, constant]
    plot_quickstart(results, out / 'quickstart.png')
    for each in results:
        seconds = sum(epoch['seconds'] for epoch in each.history)
        percent = _percent(*predict(each.model, test))
        print(f'{each.title}: {percent:.2f} % of {len(labels)} test images, {seconds:.0f} s of training')
    print(f'test accuracy {reached:.2f} %')
    print(f'after reloading {_percent(logits_again, labels):.2f} %')
    print(f'\npicture    {out / "quickstart.png"}\nweights    {repository}')
    print(f"load them  timm.create_model('local-dir:{repository}', pretrained=True)")
    print(f'publish    sd-resnet push {out / "run"} --repo-id {REPO_ID}')
    print(f"\nnext, in a clone of timm's repository:\n{train_command(data, epochs)}")


def write_digits(folder: Path) -> Path:
    """scikit-learn's digits as `train/<class>/*.png` and `validation/<class>/*.png`, every fifth of a class held out.

    Raises:
        ModuleNotFoundError: scikit-learn is missing.
        ValueError: The folder exists and does not hold all images.
    """
    if folder.exists():
        found = sum(1 for _ in folder.glob('*/*/*.png'))
        if found != IMAGES:
            raise ValueError(f'{folder} holds {found} images instead of {IMAGES}: remove it, and run with --resume')
        return folder
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError('scikit-learn is needed: pip install "sd-resnet[quickstart]"') from error
    from PIL import Image

    part = folder.with_name(f'{folder.name}.part')
    shutil.rmtree(part, ignore_errors=True)
    digits = load_digits()
    seen = [0] * 10
    for pixels, label in zip(digits.images, digits.target):
        split = 'validation' if seen[label] % 5 == 4 else 'train'
        path = part / split / str(label) / f'{seen[label]:03}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype('uint8')).save(path)
        seen[label] += 1
    part.replace(folder)
    return folder


def train(
    data: Path, folder: Path, title: str, model_args: dict[str, Any], epochs: int, seed: int, progress: bool
) -> Result:
    """Train to the end, from where `folder`'s last checkpoint is."""
    args = argparse.Namespace(
        model=ARCHITECTURE,
        model_kwargs=model_args,
        model_ema=True,
        num_classes=10,
        label_names=[str(digit) for digit in range(10)],
        dataset='digits of scikit-learn, every fifth of a class for the test',
        val_split='validation',
        epochs=epochs,
        seed=seed,
        hardware='CPU, one thread',
        history=[],
        **RECIPE,
    )
    random_seed(seed)
    model: Any = timm.create_model(ARCHITECTURE, num_classes=10, **model_args)
    optimizer = create_optimizer_v2(
        model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay, momentum=args.momentum
    )
    average = ModelEmaV3(model, decay=args.model_ema_decay, use_warmup=True)
    folder.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, args, average, checkpoint_dir=str(folder), max_history=1)
    last = folder / 'last.pth.tar'
    if last.exists():
        _restore(last, model, optimizer, average, args)
        saver.checkpoint_files = [(str(path), None) for path in folder.glob('checkpoint-*')]
    else:
        _save(saver, folder, 0)

    batches, test = _loader(data, train=True), _loader(data, train=False)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=epochs,
        warmup_epochs=args.warmup_epochs,
        warmup_lr=args.warmup_lr,
        step_on_epochs=False,
        updates_per_epoch=len(batches),
    )
    executions = _count_executions(model)
    done = len(args.history)
    with tqdm(
        total=epochs * len(batches), initial=done * len(batches), desc=title, unit='step', disable=not progress
    ) as bar:
        for epoch in range(done, epochs):
            random_seed(seed + epoch)
            executions[:] = [0] * len(executions)
            start, loss_meter = time.perf_counter(), AverageMeter()
            model.train()
            scheduler.step_update(epoch * len(batches))
            for step, (images, labels) in enumerate(batches, start=1 + epoch * len(batches)):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                average.update(model, step)
                scheduler.step_update(step)
                loss_meter.update(loss.item(), len(labels))
                bar.update()
            seconds = time.perf_counter() - start
            logits, labels = predict(average.module, test)
            args.history.append(
                {
                    'train_loss': loss_meter.avg,
                    'eval_loss': nn.functional.cross_entropy(logits, labels).item(),
                    'eval_top1': _percent(logits, labels),
                    'lr': optimizer.param_groups[0]['lr'],
                    'seconds': seconds,
                    'steps': len(batches),
                    'executions': list(executions),
                }
            )
            bar.set_postfix_str(f'loss {loss_meter.avg:.3f}, test accuracy {args.history[-1]["eval_top1"]:.2f} %')
            _save(saver, folder, epoch)
    _write_record(args, folder)
    return Result(title, average.module.eval(), model.survival_probs, args.history)


@torch.no_grad()
def predict(model: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
    """Logits (N, 10) and labels (N,) of a loader's images, in evaluation mode."""
    model.eval()
    logits, labels = zip(*((model(images), labels) for images, labels in loader))
    return torch.cat(logits), torch.cat(labels)


def train_command(data: Path, epochs: int) -> str:
    """The same training with timm's own script."""
    flags = ' '.join(
        f'--{name.replace("_", "-")} {" ".join(map(str, value)) if isinstance(value, list) else value}'
        for name, value in RECIPE.items()
    )
    return (
        f'python train.py --data-dir {shlex.quote(str(data.resolve()))} --model {ARCHITECTURE} --num-classes 10 '
        f'--epochs {epochs} {flags} --model-ema --model-ema-warmup --device cpu --no-prefetcher --workers 1'
    )


def _loader(data: Path, train: bool) -> Any:
    dataset = create_dataset('', root=str(data), split='train' if train else 'validation')
    augmentation = {key: RECIPE[key] for key in ('train_crop_mode', 'scale', 'ratio', 'hflip', 'color_jitter')}
    return create_loader(
        dataset,
        input_size=(3, SIZE, SIZE),
        batch_size=RECIPE['batch_size'] if train else 256,
        is_training=train,
        use_prefetcher=False,
        mean=RECIPE['mean'],
        std=RECIPE['std'],
        num_workers=0,  # in this process, so that one seed rules all
        persistent_workers=False,
        crop_pct=RECIPE['crop_pct'],
        interpolation=RECIPE['interpolation'],
        device=torch.device('cpu'),
        **(augmentation if train else {}),
    )


def _count_executions(model: Any) -> list[int]:
    """How often each block's branch ran in training; a dropped block does not call its first convolution."""
    counts = [0] * len(model.survival_probs)

    def count(index: int, block: nn.Module) -> None:
        if block.training:
            counts[index] += 1

    for index, block in enumerate(model.blocks()):
        block.conv1.register_forward_hook(lambda module, *_, index=index: count(index, module))
    return counts


def _save(saver: CheckpointSaver, folder: Path, epoch: int) -> None:
    try:
        saver.save_checkpoint(epoch)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        (folder / 'tmp.pth.tar').unlink(missing_ok=True)
        raise OSError(f'{folder} could not take a checkpoint, the one before is untouched: {error}') from error


def _restore(path: Path, model: Any, optimizer: Any, average: ModelEmaV3, args: argparse.Namespace) -> None:
    read_checkpoint(path)  # one clear error where the file is damaged
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location='cpu', weights_only=True)
    for name, value in _settings(content['args']):
        if getattr(args, name) != value:
            raise ValueError(f'{path} was begun with {name}={value!r}, got {getattr(args, name)!r}')
    model.load_state_dict(content['state_dict'])
    average.module.load_state_dict(content['state_dict_ema'])
    optimizer.load_state_dict(content['optimizer'])
    args.history[:] = content['args'].history


def _settings(args: argparse.Namespace) -> Iterator[tuple[str, Any]]:
    yield from ((name, value) for name, value in vars(args).items() if name != 'history')


def _write_record(args: argparse.Namespace, folder: Path) -> None:
    """`args.yaml` and `summary.csv`, as timm's `train.py` names them."""
    (folder / 'args.yaml').write_text(yaml.safe_dump(dict(_settings(args))))
    columns = ['train_loss', 'eval_loss', 'eval_top1', 'lr', 'seconds']
    lines = [','.join(['epoch', *columns])]
    lines += [','.join([str(i), *(str(epoch[c]) for c in columns)]) for i, epoch in enumerate(args.history)]
    (folder / 'summary.csv').write_text('\n'.join(lines) + '\n')


def _percent(logits: Tensor, labels: Tensor) -> float:
    return accuracy(logits, labels)[0].item()


def plot_quickstart(results: Sequence[Result], path: Path) -> None:
    """Draw losses and accuracy per epoch, and how often each block survived beside its survival probability."""
    figure, ((losses, accuracies, survival),) = new_figure(3)
    for result, color in zip(results, (KEPT, OTHER)):
        draw_training(losses, accuracies, result.history, color, result.title, result is results[0])
    best = max(epoch['eval_top1'] for result in results for epoch in result.history)
    accuracies.set_ylim(min(90.0, best - 5), 100.2)
    final = results[0].history[-1]['eval_top1']
    accuracies.annotate(
        f'{final:.2f} %', (len(results[0].history), final), (0, -28), textcoords='offset points', ha='right', fontsize=9
    )
    losses.set_ylim(top=losses.get_ylim()[1] * (5 if losses.get_yscale() == 'log' else 1.3))  # room for the legend
    losses.legend(fontsize=8, frameon=False, loc='upper right')
    accuracies.legend(fontsize=8, frameon=False, loc='center right')

    result = results[0]
    steps = sum(epoch['steps'] for epoch in result.history)
    observed = [sum(runs) / steps for runs in zip(*(epoch['executions'] for epoch in result.history))]
    blocks = range(1, len(observed) + 1)
    survival.bar(blocks, observed, 0.75, color=KEPT, alpha=0.85, label=f'observed in {steps:,} steps')
    survival.plot(blocks, result.survival_probs, 'o-', color=PROBABILITY, markersize=5, label='survival probability')
    survival.set_ylim(0, 1.3)
    survival.set_yticks([0, 0.25, 0.5, 0.75, 1])
    survival.set_xticks(list(blocks))
    survival.set_xlabel('block l')
    survival.set_ylabel('share of steps in which the branch ran')
    survival.legend(fontsize=8, frameon=False, loc='upper center')
    for axis, title in zip((losses, accuracies, survival), ('Loss', 'Accuracy', 'Survival of the blocks')):
        axis.set_title(title, fontsize=11)
    save_figure(figure, path)
