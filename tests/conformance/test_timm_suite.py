"""timm's own model tests, of the installed version, over this package's models: who uses timm's API must not notice.

The tests are in timm's source distribution, not in its wheel, and are fetched when needed. By default the smaller
models are tested; SD_RESNET_TEST_ALL=1 tests all own ones and a converted one of each of timm's classes, a few in each
process, because timm's tests keep memory.
"""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import timm

from docs import coverage

pytest.importorskip('expecttest', reason="timm's tests need expecttest")

DEFAULT = ['sd_resnet18', 'sd_resnet50', 'sd_resnet50d', 'sd_resnet20_cifar', 'sd_resnet56_cifar']
CONVERTED = ['sd_vit_tiny_patch16_224', 'sd_convnext_atto']
EVERYTHING = os.environ.get('SD_RESNET_TEST_ALL') == '1'
OF_CLASSES = {f'sd_{record["name"]}' for record in coverage.smallest(coverage.read()[1]).values()}
NAMES = sorted({*timm.list_models(module=('resnet_imagenet', 'resnet_cifar')), *OF_CLASSES & {*timm.list_models()}})
GROUPS = [NAMES[i : i + 4] for i in range(0, len(NAMES), 4)] if EVERYTHING else [DEFAULT + CONVERTED]
# forward, backward, default_cfgs, torchscript, features, intermediates (2), fx forward, fx backward, fx torchscript
TESTS_PER_MODEL = 10
TESTS_PER_CONVERTED_MODEL = 8  # timm leaves two of them out for ViT


@pytest.fixture(scope='session')
def suite(request, tmp_path_factory):
    """timm's tests/test_models.py."""
    folder = request.config.cache.mkdir(f'timm-{timm.__version__}')
    path = folder / 'test_models.py'
    if not path.exists():
        loaded = tmp_path_factory.mktemp('timm')
        pip = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--no-binary', 'timm', '-d', str(loaded)]
        result = subprocess.run([*pip, f'timm=={timm.__version__}'], capture_output=True, text=True)
        archives = list(loaded.glob('timm-*.tar.gz'))
        if not archives:
            pytest.skip(f"timm's source distribution could not be downloaded: {result.stderr.strip()[-200:]}")
        with tarfile.open(archives[0]) as archive:
            (member,) = [m for m in archive.getmembers() if m.name.endswith('/tests/test_models.py')]
            own = folder / f'{os.getpid()}.part'
            own.write_bytes(archive.extractfile(member).read())
        own.replace(path)  # at once: another worker of pytest may look for it
    return path


@pytest.mark.timeout(0)  # each of timm's tests has its own, see suite_plugin.py
@pytest.mark.parametrize('models', GROUPS, ids=','.join)
def test_timms_own_tests_pass_for_our_models(suite, models):
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [
            *(sys.executable, '-m', 'pytest', '-q', '-p', 'tests.conformance.suite_plugin', '-p', 'no:cacheprovider'),
            *('-W', 'ignore', '-c', os.devnull, '--rootdir', str(suite.parent), str(suite)),
            *('-k', 'sd_ and not pretrained and not inference'),  # these two download weights
        ],
        cwd=suite.parent,
        env={**os.environ, 'PYTHONPATH': str(root), 'SD_RESNET_SUITE_MODELS': ' '.join(models)},
        capture_output=True,
        text=True,
    )
    tail = '\n'.join(result.stdout.splitlines()[-40:])
    assert result.returncode == 0, f'{tail}\n{result.stderr[-2000:]}'
    counts = {what: int(n) for n, what in re.findall(r'(\d+) (passed|skipped|failed|error)', tail.splitlines()[-1])}
    print(counts)
    converted = len(set(models) & set(timm.list_models(module='converted_models')))
    expected = TESTS_PER_MODEL * (len(models) - converted) + TESTS_PER_CONVERTED_MODEL * converted
    if not EVERYTHING:  # timm skips tests of its largest models
        assert counts['passed'] >= expected
        assert counts.get('skipped', 0) == 0
