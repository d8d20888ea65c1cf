"""What a user at a terminal sees: help with an example, one line for an error, the right exit status."""

import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file

from sd_resnet.cli import main as cli

from ..conftest import make, one_line, write_run

# In the order in which a user meets them.
COMMANDS = ['quickstart', 'info', 'bench', 'recipe', 'data', 'evaluate', 'prune', 'export', 'push', 'verify']


@pytest.mark.parametrize('columns', [80, 100])
def test_help_fits_one_screen_and_lists_the_commands_in_order(columns, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', str(columns))
    with pytest.raises(SystemExit) as stop:
        cli.main(['--help'])
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= columns
    assert [line.split()[0] for line in lines if line.startswith('    ')] == COMMANDS  # with its summary on one line


@pytest.mark.parametrize('command', COMMANDS)
def test_help_has_an_example_that_parses(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, '--help'])
    assert stop.value.code == 0
    example = capsys.readouterr().out.strip().splitlines()[-1]
    assert example.startswith(f'example: sd-resnet {command} ')
    cli._parser().parse_args(example.split()[2:])


@pytest.mark.parametrize(
    ('argv', 'new'),
    [
        (['plot', 'sd_resnet50'], 'sd-resnet info MODEL --plot FILE'),
        (['sweep', 'sd_convnext_atto', '--rates', '0.1'], 'sd-resnet bench '),
        (['growth'], 'sd-resnet bench --growth'),
        (['study', '--help'], 'python -m sd_resnet.study'),
        (['release', 'run', '--tag', 'a'], 'python -m sd_resnet.hub release'),
        (['push', '--repos', 'hub/repos.yaml', '--all'], 'python -m sd_resnet.hub push-all'),
    ],
)
def test_a_command_of_the_first_edition_answers_with_the_new_one(argv, new, capsys):
    assert cli.main(argv) == 2
    said = one_line(capsys)
    assert said.startswith(f'sd-resnet {argv[0]}')
    assert new in said


@pytest.mark.parametrize(
    'argv', [[], ['nothing'], ['info'], ['info', 'sd_resnet18', '--img-size', '0'], ['export', 'x']]
)
def test_wrong_usage_exits_with_2(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert 'Traceback' not in capsys.readouterr().err


@pytest.mark.parametrize(
    ('argv', 'reason'),
    [
        (['info', 'resnet50'], 'model must be sd_resnet50'),
        (['info', 'sd_nothing'], "got 'sd_nothing'"),
        (['info', 'sd_vgg11', '--drop-path', '0.3'], "must be a network with a drop path, got 'sd_vgg11'"),
        (['info', 'sd_vgg11'], "must be a network with a drop path, got 'sd_vgg11'"),
        (['info', 'sd_resnet18', '--drop-path', '1'], 'drop_path_rate must be in [0, 1), got 1.0'),
        (['info', 'sd_resnet18', '--schedule', '1,0.5,0.2'], 'drop_path_schedule must be one of'),
        (['info', 'sd_resnet18', '--schedule', 'cosine'], "got 'cosine'"),
        (['export', 'none.pth', '--out', 'x'], 'none.pth is not a file'),
    ],
)
def test_an_error_is_one_line_with_the_reason_and_exit_1(argv, reason, capsys):
    assert cli.main(argv) == 1
    captured = capsys.readouterr()
    assert captured.out == ''
    assert reason in captured.err
    assert captured.err.count('\n') == 1


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match='model must be'):
        cli.main(['info', 'resnet50', '--debug'])


@pytest.mark.parametrize(
    ('given', 'drop_path', 'default'),
    [
        ('sd_caformer_s18', 'rate 0.15, schedule timm, mode subset', '0.15: MetaFormer baselines, arXiv 2210.13452'),
        ('sd_test_convnext', 'rate 0.1, schedule timm, mode subset', '0.1: none published that we know of'),
        ('sd_resnet18', 'rate 0.5, schedule linear, mode batch', '0.5: Huang et al., arXiv 1603.09382'),
        ('sd_resnet18 --drop-path 0.2 --schedule uniform', 'rate 0.2, schedule uniform, mode batch', '0.5: Huang'),
        ('sd_resnet18 --schedule 1,0.7', 'rate up to 0.3, schedule [1.0, 0.7], mode batch', '0.5: Huang'),
    ],
)
def test_info_says_how_it_drops_and_where_the_default_comes_from(given, drop_path, default, capsys):
    """Else who says nothing of the rate would not know what he trains with."""
    assert cli.main(['info', *given.split()]) == 0
    said = capsys.readouterr().out
    assert f'drop path                 {drop_path}\n' in said
    assert f'the default rate          {default}' in said


def test_info_prints_the_table(capsys):
    assert cli.main(['info', 'sd_resnet20_cifar', '--schedule', '1,0.5', '--img-size', '28']) == 0
    assert 'sd_resnet20_cifar, 28 x 28 px' in capsys.readouterr().out
    assert cli.main(['info', 'sd_swin_tiny_patch4_window7_224', '--img-size', '128']) == 0  # built for that size
    header, line = (x for x in capsys.readouterr().out.splitlines() if 'p_l' in x or 'layers.2.blocks.5' in x)
    assert header.index('p_l') + 3 == line.index('0.') + 6  # one column, wide names or not


def test_commands_take_any_of_timms_networks_under_an_sd_name():
    """Also those that are not registered at import: in a Python of its own, where no other test did that."""
    command = [sys.executable, '-m', 'sd_resnet.cli.main', 'info', 'sd_test_convnext2', '--img-size', '64']
    done = subprocess.run(command, capture_output=True, text=True)
    assert 'sd_test_convnext2, 64 x 64 px' in done.stdout, done.stderr


@pytest.mark.parametrize('argv', [['bench'], ['bench', '--growth'], ['prune', 'it', '--data', 'nowhere']])
def test_what_would_fail_after_the_work_fails_before_it(argv, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, '--json', str(tmp_path / 'none' / 'x.json')])
    assert stop.value.code == 2
    assert '--json: must be a file in a folder that exists' in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main([*argv, '--plot', str(tmp_path / 'x.foo')])
    assert stop.value.code == 2
    assert '--plot: must end in .png, .pdf or .svg' in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'matplotlib.figure', None)
    assert cli.main([*argv, '--plot', str(tmp_path / 'x.png')]) == 1
    assert 'matplotlib is needed to draw' in one_line(capsys)


def test_info_draws_a_picture_too(tmp_path, capsys):
    pytest.importorskip('matplotlib', reason='the pictures are drawn with matplotlib')
    assert cli.main(['info', 'sd_resnet20_cifar', '--plot', str(tmp_path / 'picture.png')]) == 0
    assert (tmp_path / 'picture.png').read_bytes().startswith(b'\x89PNG')
    table, written = capsys.readouterr().out.split('\n\nwrote ')
    assert 'p_l' in table
    assert written == f'{tmp_path / "picture.png"}\n'


@pytest.mark.parametrize('name', ['sd_resnet20_cifar', 'sd_resnet34'])
def test_export_says_how_to_load(name, tmp_path, capsys):
    """Grey images and five classes, which timm's networks do not have by themselves."""
    model = make(name, full=True, in_chans=1, num_classes=5)
    torch.save(model.state_dict(), tmp_path / 'in.pth')
    assert cli.main(['export', str(tmp_path / 'in.pth'), '--out', str(tmp_path / 'out.safetensors')]) == 0
    *note, line = capsys.readouterr().out.splitlines()
    assert ('timm has no architecture for the CIFAR nets' in ''.join(note)) == ('cifar' in name)
    loaded = eval(line.partition('load it with ')[2], {'timm': timm}).eval()
    x = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)


def test_export_takes_the_named_weights_of_a_file(tmp_path):
    run = write_run(tmp_path / 'run')
    for flags, key in (([], 'state_dict_ema'), (['--no-ema'], 'state_dict')):
        out = tmp_path / f'{key}.safetensors'
        command = ['export', str(run / 'last.pth.tar'), '--model', 'sd_resnet18', '--out', str(out), *flags]
        assert cli.main(command) == 0
        stored = torch.load(run / 'last.pth.tar', weights_only=False)[key]
        assert torch.equal(load_file(out)['fc.weight'], stored['fc.weight'])
