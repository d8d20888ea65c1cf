"""The card of a published network: valid, readable, and every number in it is one of the run's."""

import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image

pytest.importorskip('matplotlib', reason='publishing draws pictures with matplotlib')

from sd_resnet.analysis.runs import read_run
from sd_resnet.hub import repository as publishing

from ..conftest import edit_args, write_run

REPO = 'me/sd_resnet18.test'
# Numbers that measure nothing: the citation in the text, how timm counts, the names of two metrics.
NAMES = ('Huang et al., 2016', '(the first is 0)', 'top-1', 'top-5', 'a multiplication and its addition are two')


def write_card(run, folder, **options):
    publishing.prepare(run, folder, REPO, **options)
    return ModelCard.load(folder / 'README.md')


def recorded(folder):
    """Every number, and every number in a text, of the record, the arguments and the metrics."""

    def numbers(value):
        if isinstance(value, dict):
            value = list(value.values())
        if isinstance(value, list):
            return {number for each in value for number in numbers(each)}
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return {float(value)}
        return {float(number) for number in re.findall(r'\d+(?:\.\d+)?', value)} if isinstance(value, str) else set()

    record = {key: yaml.safe_load((folder / f'{key}.yaml').read_text()) for key in ('record', 'args')}
    del record['record']['sha256']  # digits of which would excuse nearly any small number
    summary = folder / 'summary.csv'
    rows = summary.read_text().splitlines()[1:] if summary.exists() else []
    return numbers(record) | {float(value) for row in rows for value in row.split(',')}


def unrecorded(text, folder):
    """The card's numbers that are nowhere in the record, and how many it has."""
    body = re.sub(r'(?<=`)[0-9a-f]{64}(?=`)', '', text)
    body = re.sub(r'```.*?```|`[^`]*`|\]\([^)]*\)', '', body, flags=re.S)
    for name in NAMES:
        body = body.replace(name, '')
    body = re.sub(r'(?<=\d),(?=\d{3})', '', body)
    found = re.findall(r'(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?', re.sub(r'(\d+\.\d+)(?=\.\d)', '', body))
    known = recorded(folder) | {round(number, 3) for number in recorded(folder)}
    return [number for number in found if float(number) not in known], len(found)


def test_every_number_of_the_quickstarts_card_is_in_its_record(tmp_path):
    pytest.importorskip('sklearn', reason='the quickstart needs scikit-learn')
    from sd_resnet import quickstart

    quickstart.run(tmp_path / 'out', epochs=1, progress=False)
    card = write_card(tmp_path / 'out' / 'run', tmp_path / 'ready')
    wrong, found = unrecorded(card.text, tmp_path / 'ready')
    assert wrong == []
    assert found > 25
    assert '| seed | 0 |' in card.text  # a zero is a fact, not an absence
    share = yaml.safe_load((tmp_path / 'ready' / 'record.yaml').read_text())['survival']['share']
    assert f'| share of the FLOPs left in training, on average | {share} |' in card.text
    assert '| last survival probability p_L | 0.5 |' in card.text
    assert '| blocks, and mean number of active ones | 9, 6.5 |' in card.text
    for number in (f'{card.data.eval_results[0].metric_value}', '269,722', '0.0005', '6.5'):
        assert number in card.text
        changed = card.text.replace(number, f'{number}7')
        assert unrecorded(changed, tmp_path / 'ready')[0], number


def test_the_metadata_and_pictures_of_a_run_of_timms_script(run_folder, tmp_path):
    card = write_card(run_folder, tmp_path / 'ready', license='apache-2.0', dataset='ylecun/mnist')
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ('timm', 'image-classification', 'apache-2.0')
    assert data.tags == ['image-classification', 'timm', 'stochastic-depth']
    assert (data.datasets, data.metrics, data.base_model) == (['ylecun/mnist'], ['accuracy'], None)
    (top1, top5) = data.eval_results
    assert (top1.metric_value, top5.metric_value, top1.dataset_split) == (52.25, 82.25, 'validation')
    assert unrecorded(card.text, tmp_path / 'ready')[0] == []
    assert '**Needs the plugin**' in card.text.split('\n## ')[0]
    for picture in re.findall(r'\]\((\w+\.png)\)', card.text):
        assert (tmp_path / 'ready' / picture).read_bytes().startswith(b'\x89PNG')
    tables = [line for line in card.text.splitlines() if line.startswith('|')]
    assert {line.count('|') for line in tables} == {3}  # two columns each, or the tables fall apart
    assert 'not recorded' in card.text  # hardware, source commit


def test_what_is_not_in_the_record_is_not_in_the_card(tmp_path):
    run = write_run(tmp_path / 'run')
    (run / 'summary.csv').unlink()
    card = write_card(run, tmp_path / 'ready', checkpoint='last')
    assert card.data.eval_results is None
    for row in ('test accuracy', 'licence', 'data set', 'hardware', 'source commit'):
        assert f'| {row} | not recorded |' in card.text
    assert not (tmp_path / 'ready' / 'training.png').exists()


def test_a_last_block_that_never_drops_is_not_constant_depth(tmp_path):
    run = write_run(tmp_path / 'run', drop_path_schedule=[0.5] * 7 + [1.0], **LETTER)
    text = write_card(run, tmp_path / 'ready').text
    assert 'trained with stochastic depth' in text
    assert "carry each block's survival" in text
    assert '## Stochastic depth' in text
    assert (tmp_path / 'ready' / 'survival.png').exists()


LETTER = {'drop_path_rescale': 'test'}
CARRIES, ORDINARY = "carry each block's survival", 'the weights are those of an ordinary residual network'
RETURNS = 'The drop path of the training comes back on loading'
RAMP = '| ramp of the rate | late, 10 steps; the other figures here are those of the full rate |'


@pytest.mark.parametrize(
    ('name', 'options', 'plain', 'said', 'unsaid'),
    [
        ('sd_resnet18', LETTER, False, (CARRIES, 'neither forward nor backward', RETURNS), (ORDINARY, 'ramp')),
        ('sd_resnet18', {}, False, (ORDINARY, RETURNS), (CARRIES,)),
        (
            'sd_resnet18',
            {'drop_path_mode': 'row'},
            False,
            (ORDINARY, 'multiplied by 0', '| 1.0 |'),
            ('neither forward',),
        ),
        ('sd_resnet18', {'drop_path_mode': 'subset'}, False, ('for the samples that keep it',), ('neither forward',)),
        ('sd_resnet18', {'drop_path_ramp': ['late', 10]}, False, (RAMP,), ()),
        ('sd_resnet18', LETTER, True, ('probabilities are folded',), (ORDINARY, CARRIES, RETURNS)),
        ('sd_resnet18', {}, True, ('This is an ordinary `resnet18`',), ('folded',)),
        ('sd_resnet18', {'drop_path_rate': 0.0}, True, ('This is an ordinary `resnet18`',), ('folded',)),
        ('sd_resnet20_cifar', {}, True, (ORDINARY, 'drop path rate of 0'), (CARRIES, RETURNS)),
        ('sd_resnet20_cifar', {'drop_path_rate': 0.0}, False, (ORDINARY, 'at constant depth'), (CARRIES, 'the twin')),
    ],
)
def test_it_says_what_was_trained_and_what_the_weights_are(name, options, plain, said, unsaid, tmp_path):
    run = write_run(tmp_path / 'run', name, **options)
    text = write_card(run, tmp_path / 'ready', plain=plain).text
    assert [part for part in said if part not in text] == []
    assert [part for part in unsaid if part in text] == []
    assert ('survival.png' in text) == (tmp_path / 'ready' / 'survival.png').exists()
    tables = [line for line in text.splitlines() if line.startswith('|')]
    assert {line.count('|') for line in tables} == {3}


CARDS = {
    'measured': ({}, dict(license='apache-2.0', dataset='ylecun/mnist')),
    'little known': ({}, dict(no_ema=True)),
    'plain': ({'drop_path_rescale': 'test'}, dict(license='mit', plain=True)),
    'constant depth': ({'drop_path_rate': 0.0}, dict(license='mit')),
}


@pytest.mark.parametrize('case', CARDS)
def test_the_hub_takes_it_and_nothing_of_it_is_lost(server, tmp_path, case):
    """By the client's own call, which asks the Hub: the one on 127.0.0.1, after the specification of the public one."""
    trained, options = CARDS[case]
    card = write_card(write_run(tmp_path / 'run', **trained), tmp_path / 'ready', **options)
    card.validate()
    assert ('POST', '/api/validate-yaml') in server.requests
    metadata = yaml.safe_load(card.data.to_yaml())
    again = ModelCardData(**metadata)
    assert again.eval_results == card.data.eval_results
    assert (again.eval_results is None) == (case == 'little known')
    assert again.to_dict() == metadata == card.data.to_dict()
    assert ModelCard(card.content).content == card.content == (tmp_path / 'ready' / 'README.md').read_text()


@pytest.mark.parametrize(
    ('right', 'wrong', 'said'),
    [
        ('license: mit', 'license: my-own', 'license.*must be one of'),
        ('library_name: timm', 'library_name: 5', 'library_name.*must be a string'),
        ('- stochastic-depth', '- 2016', 'tags.*must be a string or an array of strings'),
        ('name: ylecun/mnist', 'name: 5', r'results\.dataset\.name.*is required'),
        ('type: image-classification', 'type: 5', r'results\.task\.type.*is required'),
    ],
)
def test_a_card_that_the_hub_would_not_take_is_refused(server, run_folder, tmp_path, right, wrong, said):
    """Or the test before this one would show nothing."""
    card = write_card(run_folder, tmp_path / 'ready', license='mit', dataset='ylecun/mnist')
    assert right in card.content
    with pytest.raises(ValueError, match=said):
        ModelCard(card.content.replace(right, wrong)).validate()


INSTALLED = {
    True: 'pip install timm',
    False: "pip install .  # in a clone of sd_resnet's repository: it is in no package index yet",
}


@pytest.mark.parametrize('repo_id', [REPO, 'sd_resnet18.test'])
@pytest.mark.parametrize('plain', INSTALLED)
def test_who_does_what_it_says_gets_there(run_folder, tmp_path, monkeypatch, plain, repo_id):
    """From the Hub, or, before it is published, from the folder itself; and nothing is called by a placeholder."""
    publishing.write_repository(read_run(run_folder), tmp_path / 'out', repo_id, plain=plain)
    text = (tmp_path / 'out' / 'README.md').read_text()
    assert re.findall('pip install.*', text) == [INSTALLED[plain]]
    assert not re.search(r'\b(USER|OWNER|NAME|DIR|TODO)\b|[{}]{2}|%}', text)
    source = f'hf-hub:{REPO}' if repo_id == REPO else 'local-dir:.'
    assert re.findall(r"create_model\('(.*?)'", text) == [source]
    Image.new('RGB', (40, 50)).save(tmp_path / 'out' / 'image.png')
    monkeypatch.chdir(tmp_path / 'out')
    (code,) = re.findall(r'```python\n(.*?)```', text, re.S)
    found = {}
    exec(code.replace(f"'{source}'", "'local-dir:.'"), found)
    assert found['probabilities'].shape == (1, 10)


def test_the_share_of_flops_in_subset_mode_is_that_of_batch_mode(tmp_path):
    """Each row survives with p_l, whatever the batch size."""
    label = 'share of the FLOPs left in training, on average'
    rows = set()
    for mode in ('subset', 'batch'):
        run = write_run(tmp_path / mode, drop_path_rate=0.05, drop_path_mode=mode)
        text = write_card(run, tmp_path / f'ready_{mode}').text
        rows.update(line for line in text.splitlines() if label in line)
        assert 'survival.png' in text
    assert len(rows) == 1


def test_weights_that_nobody_measured_carry_no_accuracy(run_folder, tmp_path):
    assert (
        '`model_best.pth.tar`, moving average (EMA), epoch 1 (the first is 0)'
        in write_card(run_folder, tmp_path / 'best').text
    )
    raw = write_card(run_folder, tmp_path / 'raw', no_ema=True)
    assert raw.data.eval_results is None
    torch.save(read_run(run_folder).checkpoint.state_dict, run_folder / 'averaged.pth')  # as avg_checkpoints.py does
    averaged = write_card(run_folder, tmp_path / 'averaged', checkpoint='averaged.pth')
    assert averaged.data.eval_results is None
    assert '| weights | `averaged.pth`, epoch not recorded |' in averaged.text


def test_settings_that_were_off_are_not_shown_as_the_recipe(run_folder, tmp_path):
    edit_args(run_folder, amp=False, amp_dtype='float16', lr=None, lr_base=0.1, grad_accum_steps=1)
    text = write_card(run_folder, tmp_path / 'ready').text
    assert 'float16' not in text
    assert '| lr base | 0.1 |' in text
    assert '| lr |' not in text


def test_it_names_what_the_training_started_from(run_folder, tmp_path):
    edit_args(run_folder, model='sd_resnet18.a2_in1k', pretrained=True, dataset='hfds/ylecun/mnist')
    card = write_card(run_folder, tmp_path / 'ready')
    assert card.data.base_model == 'timm/resnet18.a2_in1k'
    assert '| started from | timm/resnet18.a2_in1k |' in card.text
    assert card.data.datasets == ['ylecun/mnist']


def test_where_things_lay_on_this_machine_is_not_published(run_folder, tmp_path):
    here = str(tmp_path)
    edit_args(run_folder, resume=f'{here}/a/last.pth.tar', wandb_tags=[f'{here}/b'], opt_kwargs={'log': f'{here}/c'})
    edit_args(run_folder, output='../../somebody/runs')
    write_card(run_folder, tmp_path / 'ready')
    for path in (tmp_path / 'ready').glob('*'):
        assert here.encode() not in path.read_bytes(), path
        assert b'somebody' not in path.read_bytes(), path
