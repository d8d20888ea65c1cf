"""`sd-resnet quickstart`: train a small network on real images, publish it to a folder, load it back, compare.

All but the loop is timm's. Each epoch starts from the seed `seed + epoch`, so that a resumed run draws what an unbroken
one would have drawn; what has been measured so far travels inside the checkpoint.
"""

import argparse
import shlex
import time
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from timm.data import create_dataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, CheckpointSaver, ModelEmaV3, accuracy, random_seed, update_summary
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from .analysis.runs import read_run
from .figures import KEPT, OTHER, PROBABILITY, figure_class, new_figure, save_figure
from .files import written_whole
from .hub.card import draw_training
from .hub.repository import write_repository
from .resnets.checkpoints import read_checkpoint

ARCHITECTURE = 'sd_resnet20_cifar'
RUNS: Any = (('stochastic depth', 'run', {}), ('constant depth', 'run_constant', {'drop_path_rate': 0.0}))
NAME = f'{ARCHITECTURE}.digits'
IMAGES = 1797
SIZE = 16  # pixels; the digits have 8, and 32 would cost four times as much without being more accurate
OPTIMIZER: dict[str, Any] = dict(opt='sgd', lr=0.05, momentum=0.9, weight_decay=5e-4)
SCHEDULE: dict[str, Any] = dict(sched='cosine', warmup_epochs=2, warmup_lr=1e-3)
PREPROCESSING: dict[str, Any] = dict(mean=[0.3] * 3, std=[0.38] * 3, crop_pct=1.0, interpolation='bilinear')
CROP: dict[str, Any] = dict(train_crop_mode='rkrr', scale=[0.8, 1.0], ratio=[0.85, 1.2], hflip=0.0, color_jitter=0.0)
REST: dict[str, Any] = dict(batch_size=32, img_size=SIZE, model_ema_decay=0.99)
RECIPE = {**OPTIMIZER, **SCHEDULE, **PREPROCESSING, **CROP, **REST}
History = list[dict[str, Any]]  # of each epoch losses, accuracy in percent, seconds, steps, branches run per block


def run(
    out: Path, *, epochs: int = 30, seed: int = 0, resume: bool = False, compare: bool = False, progress: bool = True
) -> None:
    """Do all of it in the new folder `out`, and print what was reached; the options are those of the command line.

    Raises:
        KeyboardInterrupt: Ctrl-C, with how to go on; the last finished epoch is on disk.
        OSError: `out` exists without `resume`, or is missing with it; or something could not be written, and the last
            checkpoint is untouched.
        ValueError: The folder is damaged, or was begun with other settings.
    """
    if resume and not out.is_dir():
        raise FileNotFoundError(f'{out} is not a folder: nothing to resume; run without --resume')
    if not resume and out.exists():
        raise FileExistsError(f'{out} exists: go on there with --resume, or choose another folder with --out')
    if not 0 <= seed < 2**32:
        raise ValueError(f'seed must be between 0 and 2**32 - 1, got {seed}')
    figure_class()  # or its absence is found when all is trained
    trained, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)  # a second one costs this small network more than it gives
    try:
        data = write_digits(out / 'data')
        for title, folder, model_args in RUNS[: 2 if compare else 1]:
            trained[title] = train(data, out / folder, title, model_args, epochs, seed, progress)
    except KeyboardInterrupt:
        options = f'--out {shlex.quote(str(out))} --epochs {epochs} --seed {seed} --resume' + ' --compare' * compare
        kept = 'the finished epochs are kept; go on with: sd-resnet quickstart'
        raise KeyboardInterrupt(f'{kept} {options}') from None
    finally:
        torch.set_num_threads(threads)

    repository = write_repository(read_run(out / 'run'), out / 'hub', NAME, license='apache-2.0')
    loaded = timm.create_model(f'local-dir:{repository}', pretrained=True)
    test = _loader(data, train=False)
    (logits, labels), (logits_again, _) = (predict(each, test) for each in (trained['stochastic depth'][0], loaded))
    if not torch.equal(logits, logits_again):
        raise RuntimeError(f'{repository} does not compute what was trained; this is a bug of sd_resnet')

    plot_quickstart(trained, out / 'quickstart.png')
    for title, (_, history) in trained.items():
        seconds = sum(epoch['seconds'] for epoch in history)
        percent = history[-1]['eval_top1']
        print(f'{title}: {percent:.2f} % of {len(labels)} test images, {seconds:.0f} s of training')
    before, after = _percent(logits, labels), _percent(logits_again, labels)
    print(f'test accuracy {before:.2f} %\nafter reloading {after:.2f} %')
    print(f'\npicture    {out / "quickstart.png"}\nweights    {repository}')
    print(f"load them  timm.create_model('local-dir:{repository}', pretrained=True)")
    print(f'publish    sd-resnet push {out / "run"} --repo-id USER/{NAME}')
    print(f"\nnext, in a clone of timm's repository:\n{train_command(data, epochs)}")


def write_digits(folder: Path) -> Path:
    """scikit-learn's digits as `train/<class>/*.png` and `validation/<class>/*.png`, every fifth held out."""
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

    digits = load_digits()
    with written_whole(folder) as part:
        for label in range(10):
            for number, pixels in enumerate(digits.images[digits.target == label]):
                path = part / ('validation' if number % 5 == 4 else 'train') / str(label) / f'{number:03}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((pixels * 255 / 16).round().astype('uint8')).save(path)
    return folder


def train(
    data: Path, folder: Path, title: str, model_args: dict[str, Any], epochs: int, seed: int, progress: bool
) -> tuple[Any, History]:
    """Train to the end, from where `folder`'s last checkpoint is: the averaged weights, and what was measured."""
    settings = {
        **{'model': ARCHITECTURE, 'model_kwargs': model_args, 'model_ema': True, 'epochs': epochs, 'seed': seed},
        **{'num_classes': 10, 'label_names': [str(digit) for digit in range(10)], 'hardware': 'CPU, one thread'},
        **{'dataset': 'digits of scikit-learn, every fifth of a class for the test', 'val_split': 'validation'},
        **RECIPE,
    }
    args = argparse.Namespace(**settings, history=[])
    random_seed(seed)
    model: Any = timm.create_model(ARCHITECTURE, num_classes=10, **model_args)
    optimizer = create_optimizer_v2(model, **OPTIMIZER)
    average = ModelEmaV3(model, decay=RECIPE['model_ema_decay'], use_warmup=True)
    folder.mkdir(parents=True, exist_ok=True)
    saver = CheckpointSaver(model, optimizer, args, average, checkpoint_dir=str(folder), max_history=1)
    last = folder / 'last.pth.tar'
    if last.exists():
        args.history = _restore(last, model, optimizer, average, settings)
        saver.checkpoint_files = [(str(path), None) for path in folder.glob('checkpoint-*')]
    else:
        _save(saver, folder, 0)
    (folder / 'args.yaml').write_text(yaml.safe_dump(settings))  # this and `summary.csv` as timm's train.py does

    batches, test = _loader(data, train=True), _loader(data, train=False)
    steps = len(batches)
    schedule = {**SCHEDULE, 'num_epochs': epochs, 'step_on_epochs': False, 'updates_per_epoch': steps}
    scheduler, _ = create_scheduler_v2(optimizer, **schedule)
    ran: Counter[int] = Counter()
    for index, block in enumerate(model.blocks()):  # a dropped block does not call its first convolution
        block.conv1.register_forward_hook(lambda *_, index=index: ran.update([index]))
    done = len(args.history)
    with tqdm(total=epochs * steps, initial=done * steps, desc=title, unit='step', disable=not progress) as bar:
        for epoch in range(done, epochs):
            random_seed(seed + epoch)
            ran.clear()
            start, loss_meter = time.perf_counter(), AverageMeter()
            model.train()
            scheduler.step_update(epoch * steps)
            for step, (images, labels) in enumerate(batches, start=1 + epoch * steps):
                optimizer.zero_grad()
                loss = cross_entropy(model(images), labels)
                loss.backward()
                optimizer.step()
                average.update(model, step)
                scheduler.step_update(step)
                loss_meter.update(loss.item(), len(labels))
                bar.update()
            seconds = time.perf_counter() - start
            predicted = predict(average.module, test)
            loss, eval_loss, top1 = loss_meter.avg, cross_entropy(*predicted).item(), _percent(*predicted)
            bar.set_postfix_str(f'loss {loss:.3f}, test accuracy {top1:.2f} %')
            counted = {'steps': steps, 'executions': [ran[index] for index in range(len(model.survival_probs))]}
            measured = {'train_loss': loss, 'eval_loss': eval_loss, 'eval_top1': top1, 'seconds': seconds}
            args.history.append({**measured, **counted})
            lr, tested = optimizer.param_groups[0]['lr'], {'loss': eval_loss, 'top1': top1}
            update_summary(epoch, {'loss': loss}, tested, folder / 'summary.csv', lr, write_header=epoch == 0)
            _save(saver, folder, epoch)
    return average.module.eval(), args.history


@torch.no_grad()
def predict(model: nn.Module, loader: Any) -> tuple[Tensor, Tensor]:
    """Logits (N, 10) and labels (N,) of a loader's images, in evaluation mode."""
    model.eval()
    logits, labels = zip(*((model(images), labels) for images, labels in loader))
    return torch.cat(logits), torch.cat(labels)


def train_command(data: Path, epochs: int) -> str:
    """The same training with timm's own script."""
    values = {name: ' '.join(map(str, value)) if isinstance(value, list) else value for name, value in RECIPE.items()}
    flags = ' '.join(f'--{name.replace("_", "-")} {value}' for name, value in values.items())
    return (
        f'python train.py --data-dir {shlex.quote(str(data.resolve()))} --model {ARCHITECTURE} --num-classes 10 '
        f'--epochs {epochs} {flags} --model-ema --model-ema-warmup --device cpu --no-prefetcher --workers 1'
    )


def _loader(data: Path, train: bool) -> Any:
    process = {'use_prefetcher': False, 'num_workers': 0, 'persistent_workers': False, 'device': torch.device('cpu')}
    options = {**process, **PREPROCESSING, **(CROP if train else {})}  # in this process, so that one seed rules all
    dataset = create_dataset('', root=str(data), split='train' if train else 'validation')
    return create_loader(dataset, (3, SIZE, SIZE), RECIPE['batch_size'] if train else 256, is_training=train, **options)


def _save(saver: CheckpointSaver, folder: Path, epoch: int) -> None:
    try:
        saver.save_checkpoint(epoch)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        (folder / 'tmp.pth.tar').unlink(missing_ok=True)
        raise OSError(f'{folder} could not take a checkpoint, the one before is untouched: {error}') from error


def _restore(path: Path, model: Any, optimizer: Any, average: ModelEmaV3, settings: dict[str, Any]) -> History:
    read_checkpoint(path)  # one clear error where the file is damaged
    with torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location='cpu', weights_only=True)
    begun = vars(content['args'])
    for name, value in settings.items():
        if begun.get(name) != value:
            raise ValueError(f'{path} was begun with {name}={begun.get(name)!r}, got {value!r}')
    model.load_state_dict(content['state_dict'])
    average.module.load_state_dict(content['state_dict_ema'])
    optimizer.load_state_dict(content['optimizer'])
    return begun['history']


def _percent(logits: Tensor, labels: Tensor) -> float:
    return accuracy(logits, labels)[0].item()


def plot_quickstart(trained: dict[str, tuple[Any, History]], path: Path) -> None:
    """Draw losses and accuracy per epoch, and how often each block survived beside its survival probability."""
    figure, ((losses, accuracies, survival),) = new_figure(3)
    for (title, (_, history)), color in zip(trained.items(), (KEPT, OTHER)):
        draw_training(losses, accuracies, history, color, title, named=color == KEPT)
    best = max(epoch['eval_top1'] for _, history in trained.values() for epoch in history)
    room = 5 if losses.get_yscale() == 'log' else 1.3  # for the legend
    losses.set(title='Loss', ylim=(None, losses.get_ylim()[1] * room))
    accuracies.set(title='Accuracy', ylim=(min(90.0, best - 5), 100.2))
    model, history = next(iter(trained.values()))
    final, style = history[-1]['eval_top1'], {'textcoords': 'offset points', 'ha': 'right', 'fontsize': 9}
    accuracies.annotate(f'{final:.2f} %', (len(history), final), (0, -28), **style)
    steps = sum(epoch['steps'] for epoch in history)
    observed = [sum(runs) / steps for runs in zip(*(epoch['executions'] for epoch in history))]
    blocks = range(1, len(observed) + 1)
    survival.bar(blocks, observed, 0.75, color=KEPT, alpha=0.85, label=f'observed in {steps:,} steps')
    survival.plot(blocks, model.survival_probs, 'o-', color=PROBABILITY, markersize=5, label='survival probability')
    survival.set(title='Survival of the blocks', xlabel='block l', ylabel='share of steps in which the branch ran')
    survival.set(xticks=blocks, ylim=(0, 1.3), yticks=[0, 0.25, 0.5, 0.75, 1])
    for axis, place in ((losses, 'upper right'), (accuracies, 'center right'), (survival, 'upper center')):
        axis.title.set_fontsize(11)
        axis.legend(fontsize=8, frameon=False, loc=place)
    save_figure(figure, path)
