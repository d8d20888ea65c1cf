"""One block: the paper's formulas, the work that is skipped, and gradients that optimisers and DDP rely on."""

import copy

import pytest
import torch
from timm.layers import convert_splitbn_model

import sd_resnet
from sd_resnet.core.draws import Draw, Window
from sd_resnet.core.drop_path import StochasticDepth

from ..conftest import count_calls, decide, images, make

NETS = ['sd_resnet18', 'sd_resnet50', 'sd_resnet50d', 'sd_resnet20_cifar']


def _inputs_and_outputs(model, x):
    """Each block with what it was given and what it returned."""
    seen = []
    hooks = [
        block.register_forward_hook(lambda module, args, out: seen.append((module, args[0].clone(), out.clone())))
        for block in model.blocks()
    ]
    model(x)
    for hook in hooks:
        hook.remove()
    return seen


def _formula(block, x, factor):
    """H_l = ReLU(factor * f_l(H_{l-1}) + id(H_{l-1})), from the block's layers one by one."""
    h = block.conv1(x)
    h = block.bn1(h).clamp(min=0)
    h = block.bn2(block.conv2(h))
    if hasattr(block, 'conv3'):
        h = block.bn3(block.conv3(h.clamp(min=0)))
    identity = x if block.downsample is None else block.downsample(x)
    return (identity + factor * h).clamp(min=0)


@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('rescale', ['test', 'train'])
@pytest.mark.parametrize(('dtype', 'bound'), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@torch.no_grad()
def test_evaluation_is_the_papers_equation_5(name, rescale, dtype, bound):
    model = make(name, dtype=dtype, drop_path_schedule=[0.93, 0.41], drop_path_rescale=rescale)
    for block, x, out in _inputs_and_outputs(model, images(dtype=dtype)):
        p_l = block.drop_path.survival_prob.item() if rescale == 'test' else 1.0  # of the precision that it is kept in
        expected = _formula(block, x, p_l)
        assert (out - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize('name', NETS)
@torch.no_grad()
def test_training_is_unscaled_under_test_rescaling_and_divided_under_train_rescaling(name):
    for rescale in ('test', 'train'):
        model = make(name, train=True, dtype=torch.float64, drop_path_rate=0.9, drop_path_rescale=rescale)
        for p_l, block, x, out, kept in _training_step(model):
            factor = 1 / p_l if rescale == 'train' else 1.0
            expected = _formula(block, x, factor if kept else 0.0)
            torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)


def _training_step(model):
    forward, _ = count_calls(list(model.blocks()))
    seen = _inputs_and_outputs(model, images(dtype=torch.float64))
    kept = [bool(calls) for calls in forward]
    assert True in kept
    assert False in kept
    for (block, x, out), k in zip(seen, kept):
        yield block.drop_path.p_l, block, x, out, k


@pytest.mark.parametrize('name', NETS)
@pytest.mark.parametrize('checkpointing', [False, True])
def test_batch_mode_runs_exactly_the_active_branches_forward_and_backward(name, checkpointing):
    model = make(name, train=True)
    if checkpointing:
        model.set_grad_checkpointing()
    blocks = list(model.blocks())
    forward, backward = count_calls(blocks)
    decisions = []
    draw = model.draw
    model.draw = lambda x: decisions.append(draw(x)) or list(decisions[-1])
    for _ in range(6):
        model(images()).sum().backward()
    active = [sum(step[index].b_l for step in decisions) for index in range(len(blocks))]
    assert 0 < sum(active) < 6 * len(blocks)
    assert [len(calls) for calls in forward] == [n * (2 if checkpointing else 1) for n in active]
    assert [len(calls) for calls in backward] == active


def test_a_dropped_block_returns_its_input_and_leaves_batchnorm_alone():
    model = make('sd_resnet50', train=True)
    x = images()
    decide(model, [False] * 16)
    before = copy.deepcopy(model.state_dict())
    for block, given, out in _inputs_and_outputs(model, x):
        if block.downsample is None:
            assert torch.equal(out, given)
        else:
            assert torch.equal(out, block.downsample(given).relu())
    for index, block in enumerate(model.layer3):
        for key, value in block.state_dict().items():
            if 'downsample' not in key:
                assert torch.equal(value, before[f'layer3.{index}.{key}']), key


def test_a_dropped_block_alone_applies_its_activation_and_spares_its_input():
    block = make('sd_resnet18', train=True, drop_path_rate=0.999999).layer4[1]
    x = torch.randn(2, block.conv1.in_channels, 4, 4)
    given = x.clone()
    assert torch.equal(block(x), given.relu())
    assert torch.equal(x, given)


@pytest.mark.parametrize('act', ['silu', 'leaky_relu'])
def test_other_activations_are_applied_to_a_dropped_blocks_shortcut(act):
    model = make('sd_resnet18', train=True, act_layer=act)
    decide(model, [False] * 8)
    function = getattr(torch.nn.functional, act)
    slope = {} if act == 'silu' else {'negative_slope': model.act1.negative_slope}
    with torch.no_grad():
        for block, given, out in _inputs_and_outputs(model, images()):
            shortcut = given if block.downsample is None else block.downsample(given)
            torch.testing.assert_close(out, function(shortcut, **slope))


def test_dropped_parameters_get_zero_gradients_and_sgd_moves_them_as_by_hand():
    model = make('sd_resnet20_cifar', train=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, nesterov=True)
    block = model.layer2[1]
    weight = block.conv2.weight
    decide(model, [True] * 9)
    model(images()).sum().backward()
    optimizer.step()
    momentum, value = optimizer.state[weight]['momentum_buffer'].clone(), weight.detach().clone()

    decide(model, [True] * 4 + [False] + [True] * 4)
    optimizer.zero_grad()
    model(images()).sum().backward()
    for name, parameter in model.named_parameters():
        if name.startswith('layer2.1.'):
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name
        else:
            assert parameter.grad.any(), name
    optimizer.step()
    gradient = 1e-4 * value
    momentum = 0.9 * momentum + gradient
    torch.testing.assert_close(weight, value - 0.1 * (gradient + 0.9 * momentum))


@pytest.mark.parametrize('mode', ['batch', 'row', 'subset'])
def test_every_parameter_gets_a_gradient_in_every_step(mode):
    """DistributedDataParallel stops at the second step otherwise."""
    model = make('sd_resnet18', train=True, drop_path_mode=mode, drop_path_rate=0.9)
    for _ in range(4):
        model.zero_grad()
        model(images()).sum().backward()
        assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize('batch', [1, 2, 5, 8])
def test_subset_mode_runs_the_rows_that_survive_and_no_others(batch):
    model = make('sd_resnet18', train=True, drop_path_mode='subset', drop_path_rate=0.8)
    forward, backward = count_calls(list(model.blocks()))
    drawn = []
    draw = model.draw
    model.draw = lambda x: drawn.append(draw(x)) or list(drawn[-1])
    for _ in range(6):
        model(images(batch, 64)).sum().backward()
    windows = [[step[index].b_l.rows for step in drawn] for index in range(8)]
    assert [[rows for rows in each if rows] for each in windows] == forward == backward
    for p_l, rows in zip(model.survival_probs, windows):
        assert set(rows) <= {int(p_l * batch), int(p_l * batch) + 1}
    assert batch > 2 or any(0 in each for each in windows)


def test_a_block_of_which_no_row_survives_gives_its_shortcut_and_zero_gradients():
    model = make('sd_resnet18', train=True, drop_path_mode='subset')
    model.draw = lambda x: [Draw(0.5, Window(1, 0, 0))] * 8
    model(images()).sum().backward()
    for block, given, out in _inputs_and_outputs(model, images()):
        shortcut = given if block.downsample is None else block.downsample(given)
        assert torch.equal(out, shortcut.relu())
        assert not block.conv1.weight.grad.any()


@pytest.mark.parametrize('rescale', ['test', 'train'])
@pytest.mark.parametrize('index', [0, 1])
@torch.no_grad()
def test_subset_mode_adds_the_branch_of_the_window_to_its_rows_alone(rescale, index):
    model = make('sd_resnet18', train=True, drop_path_mode='subset', drop_path_rescale=rescale, dtype=torch.float64)
    block = model.layer2[index]
    x = torch.rand(5, block.conv1.in_channels, 8, 8, dtype=torch.float64)
    block.drop_path.configure(0.6, 'subset')
    for start in range(5):
        window = [(start + i) % 5 for i in range(3)]
        reference = copy.deepcopy(block)
        shortcut = reference.shortcut(x).clone()
        branch = reference.bn2(reference.conv2(reference.bn1(reference.conv1(x[window])).relu()))
        shortcut[window] += branch * (1 / 0.6 if rescale == 'train' else 1)
        for after_relu in (False, True):
            out = copy.deepcopy(block)(x, Draw(0.6, Window(start, 3, 3)), after_relu)
            torch.testing.assert_close(out, shortcut.relu(), rtol=1e-12, atol=1e-12)


def test_subset_mode_runs_the_whole_batch_with_a_mask_where_batchnorm_would_see_one_value():
    model = make('sd_resnet18', train=True, drop_path_mode='subset', drop_path_rate=0.9, dtype=torch.float64)
    block = model.layer4[1]
    forward, _ = count_calls([block])
    x = torch.rand(4, block.conv1.in_channels, 1, 1, dtype=torch.float64)
    out = block(x, Draw(0.2, Window(2, 1, 1)))
    assert forward == [[4]]
    changed = [not torch.equal(a, b) for a, b in zip(out, x.relu())]
    assert changed == [False, False, True, False]


@pytest.mark.parametrize('rescale', ['test', 'train'])
@torch.no_grad()
def test_row_mode_drops_whole_samples(rescale):
    model = make('sd_resnet18', train=True, drop_path_mode='row', drop_path_rescale=rescale, dtype=torch.float64)
    block = model.layer2[1]
    x = torch.rand(6, block.conv1.in_channels, 4, 4, dtype=torch.float64)
    mask = torch.tensor([1.0, 0, 1, 1, 0, 0], dtype=torch.float64).view(6, 1, 1, 1)
    branch = copy.deepcopy(block).branch(x)
    p_l = block.drop_path.p_l
    factor = 1 / p_l if rescale == 'train' else 1
    expected = (x + branch * mask * factor).relu()
    torch.testing.assert_close(block(x, Draw(p_l, mask)), expected, rtol=1e-12, atol=1e-12)


def test_frozen_parameters_and_no_grad_training_are_left_in_peace():
    model = make('sd_resnet18', train=True)
    decide(model, [False] * 8)
    model.layer1.requires_grad_(False)
    model(images()).sum().backward()
    assert all(p.grad is None for p in model.layer1.parameters())
    with torch.no_grad():
        assert not model(images()).requires_grad


def test_split_batchnorm_trains_in_batch_mode_and_is_refused_in_subset_mode():
    model = convert_splitbn_model(make('sd_resnet18', train=True), 2)
    model(images()).sum().backward()
    model.set_drop_path(mode='subset')
    with pytest.raises(ValueError, match="'subset' cannot be combined with split BatchNorm"):
        model(images())


def test_test_rescaling_after_an_attention_layer_is_refused_and_train_rescaling_works():
    with pytest.raises(ValueError, match="drop_path_rescale='test' cannot be combined with an attention layer"):
        make('sd_resnet18', block_args={'attn_layer': 'se'}, drop_path_rescale='test')
    for kwargs in ({}, {'drop_path_rate': 0, 'drop_path_rescale': 'test'}):
        model = make('sd_resnet18', train=True, block_args={'attn_layer': 'se'}, **kwargs)
        model(images()).sum().backward()


def test_test_rescaling_without_affine_weights_is_refused():
    norm = lambda channels, **kwargs: torch.nn.BatchNorm2d(channels, affine=False, **kwargs)  # noqa: E731
    with pytest.raises(ValueError, match='needs a last norm layer with weight and bias'):
        sd_resnet.resnets.resnet_imagenet.StochasticResNet(
            sd_resnet.resnets.blocks.StochasticBasicBlock, (1, 1, 1, 1), norm_layer=norm, drop_path_rescale='test'
        )


def test_tracing_into_a_block_in_training_is_refused():
    block = make('sd_resnet18', train=True).layer1[0]
    with pytest.raises(RuntimeError, match='cannot be traced'):
        torch.fx.symbolic_trace(block)


def test_each_block_holds_its_own_drop_path():
    for name in NETS:
        model = make(name)
        own = [block.drop_path for block in model.blocks()]
        assert all(isinstance(drop_path, StochasticDepth) for drop_path in own)
        assert tuple(drop_path.survival_prob for drop_path in own) == model.survival_probs
