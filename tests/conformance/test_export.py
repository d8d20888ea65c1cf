"""Networks that leave Python: ONNX, torch.export, TorchScript and torch.fx must compute what evaluation computes."""

import copy

import pytest
import timm
import torch
from timm.models import create_feature_extractor

from sd_resnet.resnets.paper_rescaling import set_block

from ..conftest import images, make

NETS = ['sd_resnet18', 'sd_resnet50', 'sd_resnet20_cifar']


def _agree(out, expected):
    assert (out - expected).abs().max() <= 1e-4 * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize('name', NETS)
@torch.no_grad()
def test_torch_export(name):
    model, x = make(name), images(2)
    program = torch.export.export(model, (x,))
    _agree(program.module()(x), model(x))


@pytest.mark.parametrize('name', NETS)
@torch.no_grad()
def test_onnx(name, tmp_path):
    pytest.importorskip('onnx', reason='the ONNX test needs onnx')
    pytest.importorskip('onnxscript', reason='the ONNX test needs onnxscript')
    runtime = pytest.importorskip('onnxruntime', reason='the ONNX test needs onnxruntime')
    model, x = make(name), images(2)
    torch.onnx.export(model, (x,), str(tmp_path / 'model.onnx'), input_names=['x'], dynamo=True)
    session = runtime.InferenceSession(str(tmp_path / 'model.onnx'), providers=['CPUExecutionProvider'])
    (out,) = session.run(None, {'x': x.numpy()})
    _agree(torch.from_numpy(out), model(x))


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('rescale', ['test', 'train'])
@torch.no_grad()
def test_torchscript_by_script_and_by_trace(name, rescale):
    model, x = make(name, drop_path_rescale=rescale), images(2)
    expected = model(x)
    scripted = torch.jit.script(model)
    _agree(scripted(x), expected)
    _agree(torch.jit.trace(model, x)(x), expected)
    assert torch.equal(model(x), expected)  # the model itself is as it was


@pytest.mark.filterwarnings('ignore::FutureWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('rescale', ['test', 'train'])
@pytest.mark.parametrize('mode', ['batch', 'row', 'subset'])
def test_scripted_training_drops_by_gates(mode, rescale):
    """timm's train.py --torchscript: the branch is computed and multiplied by 0 or 1, or by 0 or 1 over its share."""
    options = dict(drop_path_mode=mode, drop_path_rescale=rescale, drop_path_rate=0.9)
    model = make('sd_resnet18', train=True, dtype=torch.float64, **options)
    scripted = torch.jit.script(model)
    x = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    block = getattr(scripted.layer1, '1')
    p_l = model.survival_probs[1]
    h = torch.rand(8, 16, 8, 8, dtype=torch.float64)
    whole = copy.deepcopy(model.layer1[1])
    set_block(whole, 1.0, mode, rescale, keep_function=False)
    whole.act2 = torch.nn.Identity()
    share = 1 if rescale == 'test' else p_l
    survived = (h + (whole(h) - h) / share).relu()
    survivors = []
    for _ in range(40):
        scripted.zero_grad()
        out = block(h)
        alive = (out != h).flatten(1).any(1)
        torch.testing.assert_close(out, torch.where(alive.view(8, 1, 1, 1), survived, h))
        survivors.append(int(alive.sum()))
        out.sum().backward()
        assert alive.any() == any(p.grad.any() for p in block.parameters())
    if mode == 'batch':
        assert set(survivors) == {0, 8}
    elif mode == 'subset':
        assert set(survivors) == {int(p_l * 8), int(p_l * 8) + 1}
    else:
        assert len(set(survivors)) > 2
    scripted(x).sum().backward()
    assert all(p.grad is not None for p in scripted.parameters())


@pytest.mark.parametrize('name', NETS)
def test_feature_extraction_by_fx_keeps_dropping_in_training(name):
    """A decision frozen into the graph would train one sub-network for ever."""
    model, x = make(name, drop_path_rate=0.8), images(4)
    extractor = create_feature_extractor(model, {'layer3': 'out'})
    with torch.no_grad():
        _agree(extractor(x)['out'], model.forward_intermediates(x)[1][3])
    extractor.train()
    counts = []
    block = model.layer3[1]
    block.conv1.register_forward_hook(lambda *_: counts.append(1))
    for _ in range(20):
        extractor(x)['out'].sum().backward()
    assert 0 < len(counts) < 20


def test_a_default_tracer_is_refused_in_training_only():
    model = timm.create_model('sd_resnet18')
    torch.fx.symbolic_trace(model.eval())
    with pytest.raises(RuntimeError, match='cannot be traced'):
        torch.fx.symbolic_trace(model.train())
