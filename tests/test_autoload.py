"""Automatic registration: it must work wherever Python reads .pth files, cost nothing, and never be in the way.

Most tests run a Python of their own with tiny stand-ins for timm and sd_resnet; two use the real ones from a wheel.
"""

import os
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
START = 'import _sd_resnet_autoload; _sd_resnet_autoload.install()\n'
FAKE_TIMM = "registry = ['resnet50']\n"
FAKE_PLUGIN = "import timm\ntimm.registry.append('sd_resnet50')\n"


@pytest.fixture
def python(tmp_path):
    """Run code with the autoload module started, and with fake packages in a folder."""
    (tmp_path / '_sd_resnet_autoload.py').write_text((ROOT / '_sd_resnet_autoload.py').read_text())
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm' / '__init__.py').write_text(FAKE_TIMM)
    (tmp_path / 'timm' / 'models.py').write_text('')
    (tmp_path / 'sd_resnet.py').write_text(FAKE_PLUGIN)

    def run(code, *flags, path=tmp_path, **environment):
        return subprocess.run(
            [sys.executable, '-S', *flags, '-c', 'import os\n' + START + textwrap.dedent(code)],
            env={**os.environ, 'PYTHONPATH': str(path), **environment},
            capture_output=True,
            text=True,
            cwd=path,  # python -c looks there first
        )

    run.folder = tmp_path
    return run


def _ok(result, expected=None):
    assert result.returncode == 0, result.stderr
    assert result.stderr == ''
    if expected is not None:
        assert result.stdout.strip() == expected


def test_importing_timm_imports_the_plugin_after_it(python):
    _ok(python('import timm; print(timm.registry)'), "['resnet50', 'sd_resnet50']")
    _ok(python('import timm.models, sys; print(sys.modules["timm"].registry)'), "['resnet50', 'sd_resnet50']")


def test_it_can_be_turned_off(python):
    _ok(python('import timm; print(timm.registry)', SD_RESNET_AUTOLOAD='0'), "['resnet50']")
    _ok(python('import sd_resnet, timm; print(timm.registry)', SD_RESNET_AUTOLOAD='0'), "['resnet50', 'sd_resnet50']")


def test_importing_the_plugin_first_registers_once(python):
    _ok(python('import sd_resnet, timm; print(timm.registry)'), "['resnet50', 'sd_resnet50']")


def test_looking_for_timm_first_does_not_use_it_up(python):
    """transformers, accelerate and others call find_spec before they import."""
    code = """
        import importlib.util
        for _ in range(2):
            spec = importlib.util.find_spec('timm')
            assert spec.origin.endswith('__init__.py') and spec.submodule_search_locations
        assert importlib.util.find_spec('timm.models')
        import timm
        print(timm.registry)
    """
    _ok(python(code), "['resnet50', 'sd_resnet50']")


def test_timm_looks_as_if_nobody_had_been_there(python):
    code = """
        import importlib, importlib.resources, inspect, sys
        before = list(sys.meta_path)
        import timm
        assert type(timm.__loader__).__name__ == 'SourceFileLoader', timm.__loader__
        assert timm.__spec__.loader is timm.__loader__
        assert 'registry' in inspect.getsource(timm)
        assert '_Finder' not in repr(sys.meta_path)
        assert len(sys.meta_path) == len(before) - 1
        assert importlib.resources.files('timm').joinpath('__init__.py').is_file()
        importlib.reload(timm)
        assert timm.registry == ['resnet50']  # as a reload does without the plugin
    """
    _ok(python(code))


def test_a_failing_plugin_leaves_timm_usable_with_one_warning(python):
    (python.folder / 'sd_resnet.py').write_text("raise OSError('libcudart is missing')")
    for flags in ((), ('-W', 'error')):
        result = python('import timm, timm.models; print(timm.registry)', *flags)
        assert result.returncode == 0, result.stderr
        assert result.stdout.strip() == "['resnet50']"
        assert result.stderr.count('RuntimeWarning') == 1
        assert 'OSError: libcudart is missing' in result.stderr
        assert 'SD_RESNET_AUTOLOAD=0' in result.stderr
    _ok(python('import timm', '-W', 'ignore'))


def test_an_uninstalled_plugin_leaves_timm_usable(python):
    (python.folder / 'sd_resnet.py').unlink()
    result = python('import timm; print(timm.registry)')
    assert result.stdout.strip() == "['resnet50']"
    assert "ModuleNotFoundError: No module named 'sd_resnet'" in result.stderr


@pytest.mark.parametrize('code', ['import timm', 'import sd_resnet', 'import sd_resnet, timm'])
def test_a_folder_without_the_package_in_it_is_named_in_one_line(python, code):
    """An editable install leaves a folder of weights beside it; once the checkout has moved, Python imports that."""
    (python.folder / 'sd_resnet.py').rename(python.folder / 'moved.py')
    (python.folder / 'sd_resnet' / 'weights').mkdir(parents=True)
    for flags in ((), ('-W', 'error')):
        result = python(f'{code}; import timm; print(timm.registry)', *flags)
        assert result.stdout.strip() == "['resnet50']", result.stderr
        said = [line for line in result.stderr.splitlines() if 'Warning: ' in line]
        assert len(said) == 1, result.stderr
        assert f'{python.folder / "sd_resnet"} has no __init__.py' in said[0]
        assert 'install sd_resnet again' in said[0]
    _ok(python(code, '-W', 'ignore'))
    _ok(python(code, SD_RESNET_AUTOLOAD='0'))


def test_a_folder_left_over_beside_the_package_is_not_spoken_of(python, tmp_path):
    (tmp_path / 'first' / 'sd_resnet' / 'weights').mkdir(parents=True)
    code = f'import sys; sys.path.insert(0, {str(tmp_path / "first")!r}); import timm; print(timm.registry)'
    _ok(python(code), "['resnet50', 'sd_resnet50']")


def test_broken_or_absent_timm_fails_as_it_does_without_the_plugin(python):
    (python.folder / 'timm' / '__init__.py').write_text('import torch_that_is_not_there')
    code = """
        import os
        try:
            import timm
        except ModuleNotFoundError as error:
            print(error.name)
        open(os.path.join(os.environ['PYTHONPATH'], 'timm', '__init__.py'), 'w').write('registry = []')
        import importlib; importlib.invalidate_caches()
        import timm
        print(timm.registry)
    """
    _ok(python(code), "torch_that_is_not_there\n['sd_resnet50']")
    empty = python.folder / 'empty'
    empty.mkdir()
    (empty / '_sd_resnet_autoload.py').write_text((ROOT / '_sd_resnet_autoload.py').read_text())
    _ok(python('pass', path=empty))
    result = python('import timm', path=empty)
    assert "No module named 'timm'" in result.stderr
    assert '_sd_resnet_autoload' not in result.stderr


def test_a_clone_of_timm_in_the_current_folder_is_taken(python, tmp_path):
    clone = tmp_path / 'clone'
    (clone / 'timm').mkdir(parents=True)
    (clone / 'timm' / '__init__.py').write_text("registry = ['clone']")
    code = f'import sys; sys.path.insert(0, {str(clone)!r}); import timm; print(timm.registry)'
    _ok(python(code), "['clone', 'sd_resnet50']")


def test_timm_from_a_zip_file(python, tmp_path):
    with zipfile.ZipFile(tmp_path / 'packages.zip', 'w') as archive:
        archive.writestr('timm/__init__.py', "registry = ['zip']")
    code = f'import sys; sys.path.insert(0, {str(tmp_path / "packages.zip")!r}); import timm; print(timm.registry)'
    _ok(python(code), "['zip', 'sd_resnet50']")


def test_threads_that_import_at_once_register_once(python):
    (python.folder / 'timm' / '__init__.py').write_text('import time; time.sleep(0.2)\nregistry = []\n')
    code = """
        import threading
        def work():
            import timm
        threads = [threading.Thread(target=work) for _ in range(8)]
        [t.start() for t in threads]; [t.join() for t in threads]
        import timm
        print(timm.registry)
    """
    _ok(python(code), "['sd_resnet50']")


def test_installing_twice_waits_once(python):
    code = "_sd_resnet_autoload.install(); import sys, timm; print(timm.registry, '_Finder' in repr(sys.meta_path))"
    _ok(python(code), "['resnet50', 'sd_resnet50'] False")


def test_starting_it_imports_nothing_else(tmp_path):
    """Each module that it pulled in would be paid for at every start of every Python of the environment."""
    (tmp_path / '_sd_resnet_autoload.py').write_text((ROOT / '_sd_resnet_autoload.py').read_text())
    code = 'import sys, os; before = set(sys.modules)\n' + START + 'print(sorted(set(sys.modules) - before))'
    result = subprocess.run(
        [sys.executable, '-S', '-c', code],  # without the .pth file, which has started it already where it is installed
        env={**os.environ, 'PYTHONPATH': str(tmp_path), 'SD_RESNET_AUTOLOAD': '1'},
        capture_output=True,
        text=True,
    )
    assert result.stdout.strip() == "['_sd_resnet_autoload']"


def test_the_start_file_of_python_3_15_names_the_same_function():
    """PEP 829: MODULE:FUNCTION lines in NAME.start take the place of import lines in NAME.pth."""
    assert (ROOT / 'sd_resnet.start').read_text() == '_sd_resnet_autoload:install\n'
    assert (ROOT / 'sd_resnet.pth').read_text() == START


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """This checkout's wheel in a bare environment, which sees the other packages of this one."""
    pytest.importorskip('hatchling', reason='hatchling builds the wheel')
    folder = tmp_path_factory.mktemp('wheel')
    pip = [
        sys.executable,
        '-m',
        'pip',
        'wheel',
        '-q',
        '--no-deps',
        '--no-build-isolation',
        '-w',
        str(folder),
        str(ROOT),
    ]
    subprocess.run(pip, check=True)
    venv.create(folder / 'bare', with_pip=False)
    interpreter = folder / 'bare' / 'bin' / 'python'
    site = sysconfig.get_path('purelib', vars={'base': str(folder / 'bare'), 'platbase': str(folder / 'bare')})
    with zipfile.ZipFile(next(folder.glob('*.whl'))) as archive:
        archive.extractall(site)
        names = archive.namelist()
    # a path line adds the folder but does not read its own .pth files, so this environment's installation is not used
    (Path(site) / 'parent.pth').write_text(f'{sysconfig.get_path("purelib")}\n')
    return interpreter, Path(site), names


def test_the_wheel_holds_the_package_and_the_files_at_its_root(wheel):
    _, _, names = wheel
    assert {'_sd_resnet_autoload.py', 'sd_resnet.pth', 'sd_resnet.start', 'sd_resnet/py.typed'} <= set(names)
    assert {'sd_resnet/weights/README.md', 'sd_resnet/recipes/fmnist.yaml', 'sd_resnet/model_card.md'} <= set(names)
    assert not [name for name in names if name.startswith(('tests', 'docs', '.ci'))]


def test_a_wheel_registers_the_models_also_after_find_spec(wheel):
    interpreter, site, _ = wheel
    code = (
        "import importlib.util; importlib.util.find_spec('timm'); import timm; timm.create_model('sd_resnet50')\n"
        'import sd_resnet; print(sd_resnet.__file__)'
    )
    environment = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'SD_RESNET_AUTOLOAD')}
    result = subprocess.run([interpreter, '-c', code], env=environment, capture_output=True, text=True, cwd=site.parent)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(site / 'sd_resnet' / '__init__.py')


def test_python_starts_in_silence_where_timm_and_torch_are_absent(wheel):
    interpreter, site, _ = wheel
    (site / 'parent.pth').rename(site / 'parent.off')
    try:
        result = subprocess.run([interpreter, '-W', 'error', '-c', 'pass'], capture_output=True, text=True)
    finally:
        (site / 'parent.off').rename(site / 'parent.pth')
    assert (result.returncode, result.stdout, result.stderr) == (0, '', '')
