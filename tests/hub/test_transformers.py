"""A published network in transformers' image-classification classes, which build it by timm and load it themselves."""

import pytest

pytest.importorskip('transformers', '4.53', reason='earlier versions drop the arguments of a network')
pytest.importorskip('matplotlib', reason='publishing draws pictures with matplotlib')

from sd_resnet.cli import main as cli

from ..conftest import fresh_python, write_run

REPO = 'me/net'
LOAD = """
import timm, torch
from transformers import AutoModelForImageClassification
theirs = AutoModelForImageClassification.from_pretrained('me/net').eval()
ours = timm.create_model('hf-hub:me/net', pretrained=True).eval()
x = torch.rand(2, 3, 32, 32)
with torch.no_grad():
    assert torch.equal(theirs(x).logits, ours(x))
assert theirs.timm_model.state_dict().keys() == ours.state_dict().keys()
assert getattr(theirs.timm_model, 'survival_probs', None) == getattr(ours, 'survival_probs', None)
theirs.save_pretrained('saved')
again = AutoModelForImageClassification.from_pretrained('saved').eval()
with torch.no_grad():
    assert torch.equal(again(x).logits, ours(x))
tuned = AutoModelForImageClassification.from_pretrained('me/net', num_labels=3, ignore_mismatched_sizes=True)
assert tuned.timm_model.fc.out_features == 3
assert torch.equal(tuned.timm_model.layer1[0].conv1.weight, ours.layer1[0].conv1.weight)
print(type(theirs.timm_model).__name__)
"""


@pytest.mark.parametrize(
    ('name', 'options', 'kind'),
    [
        ('sd_resnet18', [], 'StochasticResNet'),
        ('sd_resnet20_cifar', [], 'StochasticCifarResNet'),
        ('sd_resnet18', ['--plain'], 'ResNet'),
    ],
)
def test_the_auto_class_computes_what_was_published(server, tmp_path, name, options, kind):
    run = write_run(tmp_path / 'run', name, drop_path_rate=0.4, drop_path_mode='subset')
    assert cli.main(['push', str(run), '--repo-id', REPO, *options]) == 0
    assert fresh_python(LOAD, cwd=tmp_path, HF_HOME=str(tmp_path / 'home')) == kind
