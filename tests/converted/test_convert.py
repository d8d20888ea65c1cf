"""Any timm network, converted: what breaks for its users, in evaluation, in training and in the statistics of drops.

Statistical bounds are four standard errors, with fixed seeds, where nothing else is said.
"""

import copy
import io
import math
import pickle

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import sd_resnet
from sd_resnet.converted.blocks import UnitBlock
from sd_resnet.converted.by_branch import Take
from sd_resnet.converted.convert import converted_blocks
from sd_resnet.core.draws import Draw, Window
from sd_resnet.resnets import ranks

from ..families import REFUSED, build
from .conftest import assert_a_step_is_timms, branch_drop_paths, entries, quiet

VIT, CONVNEXT, REGNET = 'test_vit', 'test_convnext', 'regnetx_002'
UNITS = ['csatv2', 'davit_tiny', 'vit_base_patch16_xp_224']  # blocks of which subset mode drops as one


def convert(model, x, rate=0.4, schedule='uniform', **kwargs):
    return sd_resnet.convert(model, rate, schedule, input_size=tuple(x.shape[1:]), **kwargs)


def step(model, x, seed=1):
    """Logits and gradients of a training step."""
    torch.manual_seed(seed)
    model.train().zero_grad()
    out = model(x)
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize('mode', ['subset', 'batch', 'row'])
@pytest.mark.parametrize('name', [VIT, CONVNEXT, REGNET, *UNITS])
def test_evaluation_and_state_dict_are_the_unconverted_ones(name, mode):
    """Else pretrained weights would not load, or compute something else. At rate 0 and back, training is timm's.

    Of every class, in subset mode, see `test_branches`.
    """
    model, x = build(name)
    plain = copy.deepcopy(model)
    convert(model, x, mode=mode)
    assert [(k, v.shape) for k, v in model.state_dict().items()] == [
        (k, v.shape) for k, v in plain.state_dict().items()
    ]
    assert [k for k, _ in model.named_parameters()] == [k for k, _ in plain.named_parameters()]
    plain.eval(), model.eval()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    convert(model, x, rate=0, mode=mode)
    expected = step(plain, x)
    assert same(step(model, x), expected)
    assert same([*model.state_dict().values()], [*plain.state_dict().values()])  # norm statistics
    sd_resnet.unconvert(model)
    assert not converted_blocks(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert same(step(model, x), step(plain, x))


@pytest.mark.parametrize('name', REFUSED)
def test_a_network_without_a_block_that_can_be_skipped_is_refused_with_the_reason(name):
    with torch.device('meta'):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=REFUSED[name]):
        sd_resnet.convert(model, 0.4)
    assert not converted_blocks(model)


def recorded(block):
    """The rows of every pass through the block's own forward: of a block that drops as one."""
    rows, plain = [], block.plain_class

    class Recorder:
        @staticmethod
        def forward(self, x, *args, **kwargs):
            rows.append(x.shape[0])
            return plain.forward(self, x, *args, **kwargs)

    block.plain_class = Recorder
    return rows


def recorded_branches(model):
    """The rows of every pass through the entry of each branch."""
    rows = []
    for (module, position), *_ in entries(model).values():
        rows.append([])
        module.register_forward_pre_hook(
            lambda m, args, own=rows[-1], position=position: own.append(args[position].shape[0])
        )
    return rows


def alone(model, x):
    """The blocks that drop as one in training, with what they are called with; norms in evaluation."""
    seen = {}
    blocks = [block for block in converted_blocks(model).values() if isinstance(block, UnitBlock)]
    hooks = [
        block.register_forward_pre_hook(lambda m, a, k: seen.update({m: (a, k)}), with_kwargs=True) for block in blocks
    ]
    with torch.no_grad():
        model.eval()(x)
    for hook in hooks:
        hook.remove()
    for block in blocks:
        block.train()
        for module in block.modules():
            if isinstance(module, (_BatchNorm, nn.Dropout)):
                module.eval()
    return [(block, *seen[block]) for block in blocks]


@pytest.mark.filterwarnings('ignore:.* save no work')
@pytest.mark.parametrize('name', UNITS)
def test_each_sample_of_a_block_survives_as_drawn_and_the_rows_are_counted(name):
    """k = 0.6 * 5 = 3 rows of 5 in every step, each as often as the others, and no row more is computed."""
    model, x = build(name)
    convert(model, x)
    passes = 40
    for block, args, kwargs in alone(model, x):
        rows = recorded(block)
        with torch.no_grad():
            survived = sum((block(*args, **kwargs) != args[0]).flatten(1).any(1).int() for _ in range(passes))
        assert rows == [3] * passes
        assert int(survived.sum()) == 3 * passes
        assert ((survived / passes - 0.6).abs() < 4 * math.sqrt(0.6 * 0.4 / passes)).all()


@pytest.mark.parametrize('name', UNITS)
def test_what_a_block_adds_is_unbiased(name, monkeypatch):
    """In each row the block's own change over p_l, or none; so its mean over all five windows is the undropped one."""
    model, x = build(name)
    convert(model, x)
    blocks = alone(model, x)
    for block, args, kwargs in blocks[:: len(blocks) - 1 or 1]:  # the first and the last
        with torch.no_grad():
            branch = block.plain_class.forward(block, *args, **kwargs) - args[0]
            assert branch.abs().max() > 1e-4
            for start in range(5):
                monkeypatch.setattr(block.draws, 'draw', lambda block, x, start=start: Draw(0.6, Window(start, 3, 3)))
                mask = torch.tensor([(row - start) % 5 < 3 for row in range(5)]).view(-1, *[1] * (branch.dim() - 1))
                out = block(*args, **kwargs)
                torch.testing.assert_close(out, args[0] + mask / 0.6 * branch, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', [VIT, CONVNEXT, REGNET])
def test_what_survives_is_divided_by_p_l(name, monkeypatch):
    """Else every branch would be trained on another mean than it is tested with."""
    model, x = build(name)
    convert(model, x, mode='batch')
    block, args, kwargs = alone(model, x)[-1]
    monkeypatch.setattr(block.draws, 'draw', lambda block, x: Draw(0.6, True))
    with torch.no_grad():
        out = block(*args, **kwargs)
        if block.last_relu is not None:
            holder, slot, _ = block.plain_slots[0]
            setattr(block.get_submodule(holder), slot, _Masked(1 / 0.6))
            expected = block.plain_class.forward(block, *args, **kwargs)
        else:
            branch = block.plain_class.forward(block, *args, **kwargs) - args[0]
            assert branch.abs().max() > 1e-4
            expected = args[0] + branch / 0.6
    torch.testing.assert_close(out, expected)


class _Masked(nn.Module):
    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


@pytest.mark.parametrize('name', [VIT, CONVNEXT, 'tf_efficientnetv2_b0'])
def test_batch_mode_runs_the_drawn_blocks_and_leaves_zero_gradients(name):
    """Whole blocks, as often as p_l says; None gradients would break DistributedDataParallel."""
    model, x = build(name)
    convert(model, x, mode='batch')
    blocks = converted_blocks(model)
    rows = [recorded(block) for block in blocks.values()]
    steps, ran = 60, 0
    for index in range(steps):
        before = [len(r) for r in rows]
        step(model, x[:2], index)
        now = [len(r) - b for r, b in zip(rows, before)]
        assert set(now) <= {0, 1}
        ran += sum(now)
        assert all(p.grad is not None for p in model.parameters())
        for block, executed in zip(blocks.values(), now):
            assert any(p.grad.any() for p in block.parameters()) == bool(executed)
    n = steps * len(rows)
    assert abs(ran / n - 0.6) < 4 * math.sqrt(0.24 / n)


def test_what_cannot_be_converted_so_is_refused_with_its_reason():
    model, x = build(VIT)
    with pytest.raises(ValueError, match="drop_path_sync must be True or False, got 'no'"):
        convert(model, x, sync='no')
    with pytest.raises(ValueError, match=r"model must be timm's, got StochasticResNet, which skips already"):
        sd_resnet.convert(timm.create_model('sd_resnet18'), 0.5)


@pytest.mark.parametrize('name', [VIT, CONVNEXT, REGNET])
def test_row_mode_is_timms_drop_path(name, recorded):
    """Every branch is computed, and multiplied by a mask with each row's own draw."""
    model, x = build(name, rate=0.3)
    plain = copy.deepcopy(model)
    conversion = convert(model, x, mode='row')
    assert set(conversion.drop_paths.values()) == {'row'}
    assert_a_step_is_timms(quiet(model.double()), quiet(plain.double()), x.double(), recorded)
    with torch.no_grad():
        for _ in range(20):
            model(x.double())
    survived = torch.stack([mask for masks in recorded.values() for mask in masks]) > 0
    assert len(recorded) == len(branch_drop_paths(model))
    assert abs(survived.double().mean() - 0.6) < 4 * math.sqrt(0.24 / survived.numel())
    assert survived.sum(1).unique().numel() > 2  # not the same number each time, as in subset mode


@pytest.mark.parametrize(
    ('rate', 'schedule', 'expected'),
    [
        (0.5, 'timm', [1 - 0.5 * l / 5 for l in range(6)]),
        (0.5, 'linear', [1 - 0.5 * l / 6 for l in range(1, 7)]),
        (0.5, 'uniform', [0.5] * 6),
        (None, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]),
        (None, 'timm', [1 - 0.3 * l / 5 for l in range(6)]),  # what the network was built with
        (None, 'uniform', [0.7] * 6),
    ],
)
def test_schedules(rate, schedule, expected):
    model, x = build(VIT, rate=0.3)
    convert(model, x, 0.9, 'linear')  # leaves no trace
    conversion = convert(model, x, rate, schedule)
    assert list(conversion.survival_probs.values()) == pytest.approx(expected)
    assert list(conversion.survival_probs) == [f'blocks.{l}' for l in range(6)]
    sd_resnet.unconvert(model)
    assert [m.drop_prob for m in model.modules() if isinstance(m, DropPath)][::2] == pytest.approx(
        [0.3 * l / 5 for l in range(1, 6)]
    )


def test_a_networks_own_rule_is_kept():
    """EfficientNet counts blocks without a shortcut too, and from 0 over L."""
    model, x = build('tf_efficientnetv2_b0', rate=0.2)
    own = {n.rpartition('.')[0]: 1 - m.drop_prob for n, m in model.named_modules() if isinstance(m, DropPath)}
    conversion = convert(model, x, None, 'timm')
    assert conversion.survival_probs == pytest.approx({name: own.get(name, 1) for name in conversion.survival_probs})
    assert all('never used' in reason or 'shape' in reason for reason in conversion.left_alone.values())


@pytest.mark.parametrize(
    ('kwargs', 'named'),
    [
        (dict(rate=1.5), 'drop_path_rate'),
        (dict(schedule='cosine'), 'drop_path_schedule'),
        (dict(mode='column'), 'drop_path_mode'),
        (dict(ramp=('sometimes', 3)), 'drop_path_ramp'),
        (dict(ramp=('warmup', 0)), 'drop_path_ramp'),
    ],
)
def test_errors_name_the_argument_and_change_nothing(kwargs, named):
    model, x = build(VIT, rate=0.3)
    with pytest.raises(ValueError, match=named):
        convert(model, x, **kwargs)
    assert not converted_blocks(model)
    convert(model, x, 0.4, ramp=('late', 3))
    with pytest.raises(ValueError, match=named):
        convert(model, x, **kwargs)
    assert [block.block_drop_path.drop_prob for block in converted_blocks(model).values()] == [0.0] * 6
    assert list(model.state_dict())[-1] == 'drop_path_ramp.step'


def test_images_that_the_network_cannot_take_are_named():
    model, x = build(VIT)
    convert(model, x)
    with pytest.raises(RuntimeError, match='3 x 48 x 40'):
        sd_resnet.convert(model, 0.2, input_size=(3, 48, 40))
    assert len(converted_blocks(model)) == 6  # still


@pytest.mark.parametrize('mode', ['batch', 'subset', 'row'])
@pytest.mark.parametrize('name', [VIT, CONVNEXT, 'swin_tiny_patch4_window7_224'])
def test_checkpointing_replays_the_draws_however_many_forward_passes_precede(name, mode):
    """Gradients would be silently wrong."""
    model, x = build(name)
    convert(model, x, mode=mode)

    def gradients(checkpointing):
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model.train().zero_grad()
        (model(x).square().mean() + model(x.flip(0)).square().mean()).backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_ranks_that_share_decisions_replay_them_too(monkeypatch):
    """The generator that ranks share is private, and checkpointing does not restore it."""
    seeds = []
    monkeypatch.setattr(ranks, 'many_ranks', lambda: True)
    monkeypatch.setattr(ranks.dist, 'broadcast_object_list', lambda seed, src: seeds.append((seed[0], src)))

    def gradients(checkpointing):
        model, x = build(VIT)
        convert(model, x, mode='batch')
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(3)
        model.train()
        (model(x).square().mean() + model(x.flip(0)).square().mean()).backward()
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(seeds) == 2  # once per model
    assert seeds[0] == seeds[1]
    assert seeds[0][1] == 0


def test_ranks_that_share_decisions_draw_new_ones_where_the_seed_is_the_same(monkeypatch):
    """Decisions of an earlier step would be taken for those of a second forward pass."""
    monkeypatch.setattr(ranks, 'many_ranks', lambda: True)
    monkeypatch.setattr(ranks.dist, 'broadcast_object_list', lambda seed, src: None)
    model, x = build(VIT)
    convert(model, x, rate=0.5, mode='batch')
    rows = [recorded(block) for block in converted_blocks(model).values()]
    seen = set()
    for _ in range(8):
        before = [len(r) for r in rows]
        step(model, x, seed=3)
        seen.add(tuple(len(r) - b for r, b in zip(rows, before)))
    assert len(seen) > 4


@pytest.mark.parametrize('kind', ['own', 'converted', 'ramp'])
def test_what_is_refused_under_vmap_is_refused_before_ranks_wait_for_each_other(kind, monkeypatch):
    """One rank that asks the others for a seed, and alone, waits for ever."""
    monkeypatch.setattr(ranks, 'many_ranks', lambda: True)
    monkeypatch.setattr(ranks.SharedGenerator, 'get', lambda self: pytest.fail('the other ranks were asked'))
    if kind == 'own':
        model, x = timm.create_model('sd_resnet20_cifar', drop_path_rate=0.5).train(), torch.randn(2, 3, 32, 32)
    else:
        model, x = build(VIT)
        convert(model, x, rate=0.5, mode='batch', ramp=('late', 2) if kind == 'ramp' else None)
        model.train()
    with pytest.raises(RuntimeError, match=r"must be 'row' under torch\.func\.vmap, got 'batch'"):
        torch.func.vmap(lambda image: model(image[None]), randomness='error')(x)


def test_ranks_that_decide_for_themselves_are_refused_with_synchronised_norms(monkeypatch):
    """They would wait for each other for ever."""
    monkeypatch.setattr(ranks, 'many_ranks', lambda: True)
    model, x = build('resnetv2_18', norm_layer='batchnorm2d')
    convert(model, x, mode='batch', sync=False)
    block = next(iter(converted_blocks(nn.SyncBatchNorm.convert_sync_batchnorm(model)).values()))
    with pytest.raises(RuntimeError, match='drop_path_sync=True'):
        block.train()(torch.randn(2, 64, 8, 8))


@pytest.mark.parametrize('mode', ['batch', 'subset', 'row'])
@pytest.mark.parametrize('copied', [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), 'saved', 'ema'])
def test_copies_drop_for_themselves(copied, mode):
    """A copy with shared blocks, draws or branches would train the original."""
    model, x = build(VIT)
    convert(model, x, mode=mode, ramp=('early', 100))
    if copied == 'saved':
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = ModelEmaV3(model).module if copied == 'ema' else copied(model)
    assert list(converted_blocks(twin)) == list(converted_blocks(model))
    assert same(step(twin, x), step(model, x))
    own = {id(m) for m in model.modules()}
    for block in converted_blocks(twin).values():
        assert id(block.block_drop_path) not in own
        assert block.block_drop_path in list(block.modules())
        assert block.draws.ramp is twin.drop_path_ramp is not model.drop_path_ramp
    hooks = [hook for m in twin.modules() for hook in m._forward_pre_hooks.values() if isinstance(hook, Take)]
    assert {hook.drop_path for hook in hooks} == set(branch_drop_paths(twin).values())
    assert len(hooks) == (0 if mode == 'batch' else 12)
    if mode != 'batch':
        assert set(twin.by_branch) == set(branch_drop_paths(twin).values())
    before = {name: (drop_path.p_l, drop_path.branch) for name, drop_path in branch_drop_paths(model).items()}
    step(twin, x)  # a step further in the ramp
    assert before == {name: (drop_path.p_l, drop_path.branch) for name, drop_path in branch_drop_paths(model).items()}
    sd_resnet.unconvert(twin)
    assert all(isinstance(block.drop_path1, DropPath | nn.Identity) for block in twin.blocks)


@pytest.mark.parametrize('mode', ['batch', 'subset'])
def test_features_only_backbones_drop(mode):
    for name in (VIT, CONVNEXT):
        model, x = build(name, features_only=True)
        plain = copy.deepcopy(model)
        convert(model, x, mode=mode)
        assert all(torch.equal(a, b) for a, b in zip(model.eval()(x), plain.eval()(x)))
        by_branch = mode == 'subset'
        rows = recorded_branches(model) if by_branch else [recorded(b) for b in converted_blocks(model).values()]
        model.train()
        for _ in range(5):
            model(x)
        assert rows
        if by_branch:
            assert rows == [[3] * 5] * len(rows)
        else:
            assert 0 < sum(map(sum, rows)) < 5 * 5 * len(rows)


def test_drop_prob_can_be_assigned_as_in_timm():
    model, x = build(VIT)
    convert(model, x)
    for module in model.modules():
        if isinstance(module, DropPath):
            module.drop_prob = 0.8
    rows = recorded_branches(model)
    model.train()(x)
    assert rows == [[1]] * 12


@pytest.mark.parametrize(('name', 'rows'), [('tf_efficientnetv2_b0', 5), (VIT, 1)])
def test_a_single_row_does_not_reach_a_batch_norm(name, rows, recorded):
    """Which would raise on a map of one pixel, or take a single image for a batch; no row, or one, is alive of 5."""
    model, x = build(name)
    plain = copy.deepcopy(model)
    convert(model, x, rate=0.9)
    seen = recorded_branches(model)
    for _ in range(3):
        step(model, x)
    assert {k for each in seen for k in each} == {rows}
    assert {int((mask > 0).sum()) for masks in recorded.values() for mask in masks} == {0, 1}
    recorded.clear()
    model.zero_grad()
    plain.load_state_dict(model.state_dict())  # norm statistics
    assert_a_step_is_timms(quiet(model.double()), quiet(plain.double()), x.double(), recorded)


@pytest.mark.parametrize('name', [VIT, CONVNEXT])
def test_mixed_precision_keeps_the_types_of_the_undropped_network(name):
    model, x = build(name)
    plain = copy.deepcopy(model)
    convert(model, x)
    with torch.autocast('cpu', torch.bfloat16):
        out, expected = model.train()(x), plain.train()(x)
    assert out.dtype == expected.dtype
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_split_batch_norm_is_refused_in_subset_mode():
    from timm.layers import convert_splitbn_model

    model, x = build('resnetv2_18', norm_layer='batchnorm2d')
    convert(model, x)
    with pytest.raises(ValueError, match='split BatchNorm'):
        convert_splitbn_model(model).train()(x)


def test_an_argument_for_each_image_is_named():
    """Some are there only when the network is called or trained, and not when it is converted."""
    model, x = build('vit_tiny_patch16_dinov3_qkvb', patch_drop_rate=0.5)
    convert(model, x)
    with pytest.raises(RuntimeError, match=r"3 of 5 images: .* of each image, say: drop_path_mode='batch'"):
        model.train()(x)
    convert(model, x, mode='batch')
    model(x)
    model, x = build(VIT)
    convert(model, x)
    with pytest.raises(RuntimeError, match="drop_path_mode='batch' or 'row'"):
        model.train()(x, attn_mask=torch.zeros(5, 1, *[model.pos_embed.shape[1]] * 2))


def test_an_argument_of_as_many_rows_as_there_are_images_is_none_for_each_image():
    """Rotary positions of 4 patches, in a batch of 4 images."""
    model, x = build('vit_tiny_patch16_dinov3_qkvb')
    convert(model, x)
    rows = recorded_branches(model)
    model.train()(x[:4])
    assert {k for each in rows for k in each} <= {2, 3}  # 0.6 of 4


def test_scripted_training_falls_back_to_timms_drop_path():
    model, x = build(VIT)
    convert(model, x)
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted.eval()(x), model.eval()(x))
    scripted.train()
    assert not torch.equal(scripted(x), scripted(x))


def test_tracing_does_not_freeze_a_draw():
    from timm.models import get_notrace_modules

    model, x = build(CONVNEXT)
    convert(model, x)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return type(module) in get_notrace_modules() or super().is_leaf_module(module, name)

    graph = torch.fx.GraphModule(model, Tracer().trace(model.train()))
    assert not torch.equal(graph(x), graph(x))
    assert torch.equal(torch.fx.GraphModule(model, Tracer().trace(model.eval()))(x), model(x))
    with pytest.raises(RuntimeError, match='cannot be traced'):
        torch.fx.symbolic_trace(model.stages[0].blocks[0].train())


@pytest.fixture
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures('_fresh_compiler')
@pytest.mark.parametrize('checkpointing', [False, True])
@pytest.mark.parametrize('name', [VIT, CONVNEXT])
def test_subset_mode_compiles_to_one_graph_with_the_losses_of_eager_training(name, checkpointing):
    model, x = build(name)
    convert(model, x)
    model.set_grad_checkpointing(checkpointing)
    twin = copy.deepcopy(model)
    graphs = []

    def backend(graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiled = torch.compile(twin, backend=backend, fullgraph=True)
    for seed in range(3):
        expected, found = step(model, x, seed), None
        torch.manual_seed(seed)
        twin.train().zero_grad()
        out = compiled(x)
        out.square().mean().backward()
        found = [out.detach(), *(p.grad for p in twin.parameters())]
        for a, b in zip(found, expected):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.usefixtures('_fresh_compiler')
@pytest.mark.parametrize('name', [VIT, CONVNEXT])
def test_batch_mode_compiles_to_a_bounded_number_of_graphs(name, caplog):
    model, x = build(name)
    convert(model, x, mode='batch')
    twin = copy.deepcopy(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(twin, backend=backend)
    counts = []
    for seed in range(30):
        expected = step(model, x, seed)
        torch.manual_seed(seed)
        twin.train().zero_grad()
        out = compiled(x)
        out.square().mean().backward()
        torch.testing.assert_close(out.detach(), expected[0], rtol=1e-3, atol=1e-5)
        counts.append(len(graphs))
    assert counts[-1] == counts[14], counts
    assert 'recompile_limit' not in caplog.text
    assert _symbolic_dims(graphs) == set()  # where several stages run the same code, they would be symbols
    compiled(x[:3])
    assert _symbolic_dims(graphs) <= {0}


def _symbolic_dims(graphs):
    """Those of the inputs, tensors, whose length is no plain number."""
    inputs = [node.meta['example_value'] for g in graphs for node in g.graph.nodes if node.op == 'placeholder']
    tensors = [value for value in inputs if isinstance(value, torch.Tensor)]
    return {d for tensor in tensors for d, n in enumerate(tensor.shape) if type(n) is not int}
