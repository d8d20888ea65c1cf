"""timm's own, unmodified scripts on a small image folder: what a user types must train, resume, validate and export.

The scripts are in timm's repository only: TIMM_REPO names a clone.
"""

import csv
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import timm
import torch

from sd_resnet.cli import main as cli

from .launch import train_script
from .pair import Failed

REPO = os.environ.get('TIMM_REPO')
pytestmark = pytest.mark.skipif(not REPO, reason="TIMM_REPO does not name a clone of timm's repository")
MODEL = 'sd_resnet20_cifar'
CONVERTED = {
    'sd_vit_tiny_patch16_224': 'img_size=32 embed_dim=32 depth=3 num_heads=2',
    'sd_convnext_atto': 'depths=(1,1,2,1) dims=(8,8,16,16)',
    'sd_regnety_002': 'depth=5 w0=8 wa=8.0 wm=1.5 group_size=8',
    'sd_swin_tiny_patch4_window7_224': 'img_size=32 window_size=4 embed_dim=8 depths=(1,2) num_heads=(2,2)',
}
COMMON = [
    '--num-classes',
    '10',
    '--img-size',
    '32',
    '--device',
    'cpu',
    '--workers',
    '1',
    '-b',
    '24',
    '--opt',
    'sgd',
    '--lr',
    '0.01',
    '--sched',
    'cosine',
]


@pytest.fixture(scope='session')
def digits(tmp_path_factory):
    """A few of scikit-learn's digits as an image folder."""
    datasets = pytest.importorskip('sklearn.datasets', reason='the images are those of scikit-learn')
    from PIL import Image

    folder, seen = tmp_path_factory.mktemp('digits'), [0] * 10
    data = datasets.load_digits()
    for pixels, label in zip(data.images, data.target):
        if seen[label] < 16:
            path = (
                folder / ('train' if seen[label] < 12 else 'validation') / str(label) / f'{label}_{seen[label]:02}.png'
            )  # inference.py wants unique names
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 255 / 16).round().astype('uint8')).resize((32, 32)).save(path)
            seen[label] += 1
    return folder


def _call(script, *args, env=None, launcher=()):
    """Arguments for `subprocess`."""
    return dict(
        args=list(map(str, (sys.executable, *launcher, Path(REPO) / script, *args))),
        env={**os.environ, 'OMP_NUM_THREADS': '2', 'HF_HUB_OFFLINE': '1', **(env or {})},
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(script, *args, **options):
    done = subprocess.run(**_call(script, *args, **options), stdout=subprocess.PIPE)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def _train(digits, folder, *flags, epochs=1, model=MODEL, prefetcher=False):
    loader = [] if prefetcher else ['--no-prefetcher']
    args = ['--data-dir', digits, '--model', model, '--output', folder, '--experiment', 'run', '--epochs', epochs]
    _run('train.py', *args, *COMMON, *loader, *flags)
    return _trained(folder / 'run', epochs)


def _trained(run, epochs):
    rows = list(csv.DictReader((run / 'summary.csv').open()))
    assert len(rows) >= epochs
    assert all(math.isfinite(float(row['train_loss'])) and math.isfinite(float(row['eval_loss'])) for row in rows)
    with torch.serialization.safe_globals([__import__('argparse').Namespace]):
        return torch.load(run / 'last.pth.tar', map_location='cpu', weights_only=True)


def _probs(checkpoint, key='state_dict'):
    return [float(value) for name, value in checkpoint[key].items() if name.endswith('drop_path.survival_prob')]


LINEAR = pytest.approx([1 - l / 9 * 0.5 for l in range(1, 10)])


@pytest.mark.parametrize(
    ('flags', 'probs'),
    [
        ('', LINEAR),
        ('--drop-path 0.3', pytest.approx([1 - l / 9 * 0.3 for l in range(1, 10)])),
        ('--model-kwargs drop_path_mode=subset', LINEAR),
        ('--model-kwargs drop_path_rescale=train', []),
        ('--model-kwargs drop_path_schedule=[1,0.5]', pytest.approx([1 - l / 16 for l in range(1, 9)])),
        ('--amp --amp-dtype bfloat16', LINEAR),
        ('--grad-checkpointing', LINEAR),
        ('--model-ema', LINEAR),
        ('--channels-last', LINEAR),
        ('--torchscript', LINEAR),
        ('--torchcompile eager', LINEAR),
        ('--clip-mode agc --clip-grad 0.01', LINEAR),
        ('--layer-decay 0.75', LINEAR),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_train(digits, tmp_path, flags, probs):
    """Under test-time rescaling the checkpoint says what the script's flags have made of the probabilities."""
    flags, _, kwargs = flags.partition('--model-kwargs')
    kwargs = ['--model-kwargs', *(kwargs.split() or []), *([] if 'rescale' in kwargs else ['drop_path_rescale=test'])]
    checkpoint = _train(digits, tmp_path, *flags.split(), *kwargs)
    assert _probs(checkpoint) == probs
    model = timm.create_model(MODEL, num_classes=10, checkpoint_path=str(tmp_path / 'run' / 'last.pth.tar'))
    assert not torch.equal(model.conv1.weight, timm.create_model(MODEL).conv1.weight)
    if '--model-ema' in flags:
        assert _probs(checkpoint, 'state_dict_ema') == probs


def test_train_with_split_batchnorm(digits, tmp_path):
    flags = ['--split-bn', '--aug-splits', '3', '--aa', 'rand-m6-inc1', '--jsd-loss']
    checkpoint = _train(digits, tmp_path, *flags, prefetcher=True)
    assert any('.aux_bn.' in name for name in checkpoint['state_dict'])


def test_train_an_imagenet_network(digits, tmp_path):
    checkpoint = _train(digits, tmp_path, '--model-kwargs', 'drop_path_rescale=test', model='sd_resnet18')
    assert _probs(checkpoint) == pytest.approx([1 - l / 16 for l in range(1, 9)])


def test_fine_tuning_from_an_own_checkpoint_to_other_classes(digits, tmp_path):
    """timm loads without strictness here: a plain ResNet would compute something else in silence."""
    _train(digits, tmp_path / 'first', '--drop-path', '0.3')
    source = tmp_path / 'first' / 'run' / 'last.pth.tar'
    three = tmp_path / 'three'
    for split in ('train', 'validation'):
        for digit in '012':
            (three / split).mkdir(parents=True, exist_ok=True)
            (three / split / digit).symlink_to(digits / split / digit)
    flags = ['--pretrained', '--pretrained-path', source, '--num-classes', '3', '--lr', '1e-12', '--weight-decay', '0']
    checkpoint = _train(three, tmp_path / 'second', *flags)
    assert checkpoint['state_dict']['fc.weight'].shape[0] == 3
    trained = timm.create_model(MODEL, num_classes=10, checkpoint_path=str(source)).state_dict()
    # p_L went from 0.3 to 0.5: that changes nothing in the weights
    tuned = checkpoint['state_dict']['layer3.2.bn2.weight']
    torch.testing.assert_close(tuned, trained['layer3.2.bn2.weight'], rtol=1e-4, atol=1e-6)


def test_resuming_a_killed_run(digits, tmp_path):
    args = ['--data-dir', digits, '--model', MODEL, '--output', tmp_path, '--experiment', 'run', *COMMON]
    last, log = tmp_path / 'run' / 'last.pth.tar', tmp_path.with_suffix('.log')
    with log.open('w') as file:
        running = subprocess.Popen(**_call('train.py', *args, '--no-prefetcher', '--epochs', 200), stdout=file)
    try:
        while not last.exists():
            assert running.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
    finally:
        running.kill()
        running.wait()
    (name,) = [path.name for path in tmp_path.iterdir()]
    checkpoint = tmp_path / name / 'last.pth.tar'
    with torch.serialization.safe_globals([__import__('argparse').Namespace]):
        reached = torch.load(checkpoint, weights_only=True)['epoch']
    _run(
        'train.py',
        *('--data-dir', digits, '--model', MODEL, '--output', tmp_path, '--experiment', 'again', *COMMON),
        *('--no-prefetcher', '--epochs', reached + 2, '--resume', checkpoint),
    )
    assert _trained(tmp_path / 'again', 1)['epoch'] == reached + 1


@pytest.mark.parametrize('model', [MODEL, 'sd_vit_tiny_patch16_224'])
def test_a_warm_up_goes_on_where_it_was(digits, tmp_path, model):
    """timm's script saves and loads tensors only; the rates after it are those of a run that was never broken."""
    own = CONVERTED.get(model, 'drop_path_rescale=train').split()
    ramp = ['--drop-path', '0.5', '--model-kwargs', "drop_path_ramp=('warmup',12)", *own]
    flags = ['--data-dir', digits, '--model', model, '--output', tmp_path, *COMMON, '--no-prefetcher', *ramp]

    def rates(name, *more):
        out = tmp_path / f'{name}.json'
        launcher = [Path(__file__).with_name('rates.py'), out]
        _run('train.py', *flags, '--experiment', name, *more, launcher=launcher)
        return json.loads(out.read_text())

    first = rates('first', '--epochs', 1)
    second = rates('second', '--epochs', 3, '--resume', tmp_path / 'first' / 'last.pth.tar')
    unbroken = rates('unbroken', '--epochs', 3)
    assert first + second == unbroken
    assert len({tuple(step) for step in unbroken}) == 13  # 0 to 12 twelfths: the break lies inside the warm-up
    assert len(first) < 12 < len(unbroken)


@pytest.fixture(scope='session')
def trained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp('trained')
    _train(digits, folder, epochs=2)
    return folder / 'run' / 'last.pth.tar'


def test_validate(digits, trained):
    output = _run(
        'validate.py',
        *(
            '--data-dir',
            digits,
            '--split',
            'validation',
            '--model',
            MODEL,
            '--num-classes',
            10,
            '--checkpoint',
            trained,
        ),
        *('--device', 'cpu', '--workers', 1, '--no-prefetcher'),
    )
    assert '"top1"' in output


@pytest.mark.parametrize('flags', ['', '--plain'])
def test_a_run_goes_to_the_hub_and_validates_the_same_from_there(digits, server, tmp_path, flags):
    """From the Hub into an empty cache in another process; folded, without the plugin."""
    _train(digits, tmp_path, '--model-ema', '--model-ema-decay', '0.5', '--drop-path', '0.3', model='sd_resnet18')
    push = ['push', str(tmp_path / 'run'), '--repo-id', 'me/trained', '--license', 'mit', *flags.split()]
    assert cli.main(push) == 0
    common = ['--data-dir', digits, '--split', 'validation', '--num-classes', 10, '--device', 'cpu', '--workers', 1]
    common += ['--no-prefetcher', '--results-format', 'json', '--img-size', 32]
    best = ['--model', 'sd_resnet18', '--checkpoint', tmp_path / 'run' / 'model_best.pth.tar', '--use-ema']
    here = _result(_run('validate.py', *common, *best))
    environment = {'HF_HUB_OFFLINE': '0', 'HF_HOME': str(tmp_path / 'empty'), 'SD_RESNET_AUTOLOAD': str(int(not flags))}
    there = _result(_run('validate.py', *common, '--model', 'hf-hub:me/trained', '--pretrained', env=environment))
    assert there['top1'] == here['top1']
    assert there['param_count'] == here['param_count']
    assert cli.main(['verify', 'me/trained']) == 0


def test_averaged_checkpoints_go_to_the_hub_without_an_accuracy_that_nobody_measured(digits, server, tmp_path):
    _train(digits, tmp_path, epochs=2)
    run = tmp_path / 'run'
    _run('avg_checkpoints.py', '--input', run, '--output', run / 'averaged.pth', '-n', 2)
    assert cli.main(['push', str(run), '--repo-id', 'me/averaged', '--checkpoint', 'averaged.pth']) == 0
    assert '| test accuracy | not recorded |' in server.files('me/averaged')['README.md'].decode()
    loaded = timm.create_model('hf-hub:me/averaged', pretrained=True).state_dict()
    averaged = torch.load(run / 'averaged.pth', weights_only=True)
    assert all(torch.equal(tensor, averaged[key].to(tensor.dtype)) for key, tensor in loaded.items())


def _result(output):
    return json.loads(output[output.rindex('{') : output.rindex('}') + 1])


def test_inference(digits, trained, tmp_path):
    pytest.importorskip('pandas', reason="timm's inference.py needs pandas")
    _run(
        'inference.py',
        *('--data-dir', digits / 'validation', '--model', MODEL, '--num-classes', 10, '--checkpoint', trained),
        *('--device', 'cpu', '--workers', 1, '--results-dir', tmp_path, '--topk', 1),
    )
    assert list(tmp_path.iterdir())


def test_onnx_export(trained, tmp_path):
    pytest.importorskip('onnx', reason='ONNX export needs onnx')
    runtime = pytest.importorskip('onnxruntime', reason='the file is run with onnxruntime')
    out = tmp_path / 'model.onnx'
    _run('onnx_export.py', out, '--model', MODEL, '--num-classes', 10, '--checkpoint', trained, '--img-size', 32)
    model = timm.create_model(MODEL, num_classes=10, checkpoint_path=str(trained)).eval()
    x = torch.randn(1, 3, 32, 32)
    session = runtime.InferenceSession(str(out), providers=['CPUExecutionProvider'])
    (logits,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(x), rtol=1e-4, atol=1e-4)


def test_benchmark():
    output = _run(
        'benchmark.py',
        *('--model', MODEL, '--device', 'cpu', '--batch-size', 4, '--num-bench-iter', 5, '--num-warm-iter', 1),
        *('--bench', 'both', '--img-size', 32),
    )
    assert 'train_samples_per_sec' in output


def test_feature_distillation_with_the_model_as_student(digits, tmp_path):
    """The student's features come through forward_intermediates in some versions, forward_features in others."""
    if '--kd-distill-type' not in (Path(REPO) / 'train.py').read_text():
        pytest.skip("this clone's train.py has no feature distillation")
    teacher = tmp_path / 'teacher'
    from timm.models import save_for_hf

    save_for_hf(timm.create_model('resnet10t', num_classes=10), str(teacher), safe_serialization=True)
    flags = ['--kd-model-name', f'local-dir:{teacher}', '--kd-distill-type', 'feature']
    checkpoint = _train(digits, tmp_path, *flags)
    assert _probs(checkpoint) == LINEAR


RANK_FLAGS = {
    'plain': '',
    'accumulation': '--grad-accum-steps 2',
    'EMA': '--model-ema',
    'bfloat16': '--amp --amp-dtype bfloat16',
    'checkpointing': '--grad-checkpointing',
    'compiled': '--torchcompile eager',
}
RANK_RUNS = {
    **{
        f'{model} {mode}{flag}': (
            model,
            f'--drop-path 0.5 --model-kwargs drop_path_mode={mode} drop_path_schedule=uniform {size} {flag}',
            False,
        )
        for model, size in CONVERTED.items()
        for mode in ('batch', 'subset')
        for flag in ('', ' --grad-checkpointing')
    },
    **{
        f'{model} {mode} {name}': (model, f'{flags} --model-kwargs drop_path_mode={mode}', False)
        for model in ('sd_resnet18', MODEL)
        for mode in ('batch', 'row', 'subset')
        for name, flags in RANK_FLAGS.items()
    },
    f'{MODEL} unsynchronised': (MODEL, '--model-kwargs drop_path_sync=False', False),
    f'{MODEL} stand-in for SyncBatchNorm': (MODEL, '', True),
    f'{MODEL} stand-in for SyncBatchNorm, accumulation': (MODEL, '--grad-accum-steps 2', True),
}


def _rank_args(digits, folder, model, flags, epochs=1):
    return [
        *('--data-dir', digits, '--model', model, '--output', folder, '--experiment', 'run', '--epochs', epochs),
        *(*COMMON, '-b', 12, '--workers', 0, '--no-prefetcher', *flags.split()),
    ]


@pytest.mark.parametrize('run', RANK_RUNS)
def test_two_ranks_of_timms_train_script_stay_equal(two_ranks, digits, tmp_path, run):
    model, flags, stand_in = RANK_RUNS[run]
    args = _rank_args(digits, tmp_path, model, flags)
    first, second = two_ranks.run(train_script, Path(REPO) / 'train.py', args, stand_in)
    assert 'recompile_limit' not in two_ranks.said()
    assert first['parameters'] == second['parameters']
    assert first.get('ema') == second.get('ema')
    assert ('ema' in first) == ('EMA' in run)
    if 'row' not in run and 'subset' not in run:
        runs = Counter(first['ran'])
        assert min(runs.values()) < max(runs.values())
        assert (first['ran'] == second['ran']) == ('unsynchronised' not in run)


def test_a_rank_that_dies_ends_the_other_and_both_resume(two_ranks, digits, tmp_path, monkeypatch):
    script, last = Path(REPO) / 'train.py', tmp_path / 'out' / 'run' / 'last.pth.tar'
    monkeypatch.setattr(two_ranks, 'grace', two_ranks.limit)
    args = _rank_args(digits, tmp_path / 'out', MODEL, '', epochs=300)
    with pytest.raises(Failed) as failure:
        two_ranks.run(train_script, script, args, dies_after=last)
    assert 'rank 1: died with exit code -9' in str(failure.value)
    assert 'rank 0: Traceback' in str(failure.value)  # gloo sees the closed connection long before its time-out
    with torch.serialization.safe_globals([__import__('argparse').Namespace]):
        reached = torch.load(last, weights_only=True)['epoch']
    args = _rank_args(digits, tmp_path / 'again', MODEL, f'--resume {last}', epochs=reached + 2)
    first, second = two_ranks.run(train_script, script, args)
    assert first == second
    assert first['ran']
    assert _trained(tmp_path / 'again' / 'run', 1)['epoch'] == reached + 1
