"""`torch.compile(model)` as timm calls it: the same losses as eager, and a bounded number of graphs.

Here breaks, for whoever compiles: silent recompilation until torch's limit, after which blocks run uncompiled.
"""

import copy
import functools

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sd_resnet import convert
from sd_resnet.converted import blocks
from sd_resnet.core import compiling
from sd_resnet.core.draws import UNIT, draw_windows
from sd_resnet.resnets import network
from sd_resnet.resnets.resnet_cifar import StochasticCifarResNet

from ..conftest import decide, images, make

MODES = ('batch', 'row', 'subset')
LIMIT_FAILS = 'fail_on_recompile_limit_hit'
# Named, for importing timm.optim raises it to a million
LIMIT = 'recompile_limit' if hasattr(torch._dynamo.config, 'recompile_limit') else 'cache_size_limit'
limited = pytest.mark.skipif(
    not hasattr(torch._dynamo.config, LIMIT_FAILS), reason='this torch cannot be told to fail at its recompile limit'
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Counted:
    """A compiled model (by torch's compiler without its code generator), and the graphs that it has."""

    def __init__(self, model, **options):
        self.graphs = []
        self.model = model
        self.compiled = torch.compile(model, backend=self._backend, **options)

    def _backend(self, graph, example_inputs):
        self.graphs.append(graph)
        return graph.forward

    def train(self, x, steps, until=lambda: False):
        self.model.train()
        for _ in range(steps):
            self.compiled(x).float().sum().backward()
            if until():
                break
        return len(self.graphs)

    def evaluate(self, x):
        self.model.eval()
        with torch.no_grad():
            self.compiled(x)
        return len(self.graphs)


def _losses(model, forward, x, y):
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.005)  # larger steps blow rounding differences up
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(forward(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', ['sd_resnet18', 'sd_resnet20_cifar', 'tiny, with generated code'])
def test_compiled_training_has_the_losses_of_eager_training(kind, mode):
    """With torch's code generator on three blocks only: it takes a C++ compiler half a minute.

    In float64 elsewhere: compiled batch mode computes in channels_last, whose float32 rounding grows a thousandfold in
    some steps where BatchNorm sees six values.
    """
    dtype = torch.float32 if 'tiny' in kind else torch.float64
    # Half of 6 rows: a whole number, so that BatchNorm sees no further row in the compiled graph
    options = dict(drop_path_mode=mode, drop_path_schedule='uniform', drop_path_rate=0.5)

    def create():
        if 'tiny' in kind:
            return StochasticCifarResNet(1, channels=(4, 8, 8), zero_init_last=False, **options).train()
        return make(kind, train=True, dtype=dtype, **options)

    model, twin = create(), create()
    twin.load_state_dict(model.state_dict())
    x, y = images(6, 16 if 'tiny' in kind else 32, dtype=dtype), torch.randint(10, (6,))
    compiled = _losses(twin, torch.compile(twin, backend='inductor' if 'tiny' in kind else 'aot_eager'), x, y)
    assert compiled == pytest.approx(_losses(model, model, x, y), rel=1e-4)


def test_batch_mode_has_one_graph_per_piece_of_work_and_never_another():
    """Stem, kept blocks, projections of dropped blocks, head (22 in the full width); one more for evaluation."""
    counted = Counted(make('sd_resnet50', train=True))
    seen = [set() for _ in range(16)]
    draw = counted.model.draw

    def recorded(x):
        decisions = draw(x)
        for outcomes, decision in zip(seen, decisions or ()):
            outcomes.add(decision.b_l)
        return decisions

    counted.model.draw = recorded
    x = images(2)
    counted.train(x, 1000, until=lambda: all(len(outcomes) == 2 for outcomes in seen))
    assert all(len(outcomes) == 2 for outcomes in seen)
    expected = 1 + 16 + sum(block.downsample is not None for block in counted.model.blocks()) + 1
    assert len(counted.graphs) == expected
    assert counted.train(x, 100) == expected
    assert counted.evaluate(x) == expected + 1
    assert counted.train(x, 100) == expected + 1
    assert counted.evaluate(x) == expected + 1


@limited
@pytest.mark.parametrize(('name', 'second'), [('sd_resnet50', 'size'), ('sd_resnet20_cifar', 'precision')])
def test_batch_mode_stays_below_the_recompile_limit_with_a_second(name, second):
    """Beside a last, smaller batch, and evaluation in between."""
    counted = Counted(make(name, train=True, drop_path_rate=0.2))
    with torch._dynamo.config.patch({LIMIT_FAILS: True, LIMIT: 8}):
        for again in (False, True):
            amp = torch.autocast('cpu', torch.bfloat16, enabled=again and second == 'precision')
            for batch in (4, 3):
                x = images(batch, 64 if again and second == 'size' else 32)
                with amp:
                    counted.train(x, 5)
                    counted.evaluate(x)


@limited
def test_blocks_that_always_survive_among_others_stay_below_the_recompile_limit():
    schedule = [1, 0.5] * 8  # the same block class in many shapes
    counted = Counted(make('sd_resnet50', train=True, drop_path_schedule=schedule, drop_path_rate=None))
    with torch._dynamo.config.patch({LIMIT_FAILS: True, LIMIT: 8}):
        for shape in ((3, 32), (2, 32), (3, 64)):
            counted.train(images(*shape), 5)
            counted.evaluate(images(*shape))


def test_branches_of_many_shapes_have_static_shapes_each():
    """The compiler knows a function's past inputs by its name: under a shared one, other shapes make symbols of all."""
    counted = Counted(make('sd_resnet50', train=True))
    counted.train(images(2), 20)
    inputs = [node.meta['example_value'] for g in counted.graphs for node in g.graph.nodes if node.op == 'placeholder']
    assert len(inputs) > 100
    assert all(isinstance(value, torch.Tensor) for value in inputs)  # neither a number that changes
    assert all(type(length) is int for value in inputs for length in value.shape)


@pytest.mark.parametrize(('taken', 'outputs'), [(False, 1), (True, 2)])
def test_a_stem_feature_that_nobody_takes_has_no_gradient(taken, outputs):
    """It is the largest; as an output of a graph it would get one, of zeros, and keep a mask for it."""
    model = make('sd_resnet50', train=True)
    counted = Counted(model)
    if taken:
        model.forward = lambda x: model.forward_intermediates(x, intermediates_only=True)[0]
        torch.compile(model, backend=counted._backend)(images(2))
    else:
        counted.train(images(2), 1)
    assert len(counted.graphs[0](*_placeholders(counted.graphs[0]))) == outputs


def _placeholders(graph):
    return [
        torch.empty_like(node.meta['example_value'], device='meta').fill_(0)
        for node in graph.graph.nodes
        if node.op == 'placeholder'
    ]


@pytest.mark.parametrize('schedule', ['uniform', 'linear'])  # the second has windows of all rows in its first blocks
def test_compiled_subset_mode_keeps_no_boolean_mask(schedule):
    """On a CPU one takes 20 times as long to write as the activation that it is of."""
    assert _masks(drop_path_mode='subset', drop_path_schedule=schedule) == []


def _masks(**settings):
    """Shapes of the Boolean tensors, larger than one number a row, that a compiled training pass keeps for backward."""
    compiled = torch.compile(make('sd_resnet50', train=True, **settings), backend='aot_eager_decomp_partition')
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        compiled(images(8)).sum().backward()  # of two, most windows would be the whole batch
    assert len(kept) > 100
    return [tensor.shape for tensor in kept if tensor.dtype == torch.bool and tensor.numel() > 8]


class OnCuda(torch.Tensor):
    is_cuda = True


def _conversions(counted):
    """Changes of memory format in the graphs."""
    nodes = [node for graph in counted.graphs for node in graph.graph.nodes]
    return sum('contiguous' in str(node.target) or 'memory_format' in node.kwargs for node in nodes)


def test_only_training_in_batch_mode_changes_the_memory_format():
    """Whoever reads an exported graph, or the strides of a feature, would meet channels_last unasked."""
    x = images(2)
    counted = Counted(make('sd_resnet18'))
    counted.evaluate(x)
    assert _conversions(counted) == 0
    counted.train(x, 1)
    assert _conversions(counted) == 1
    undropped = Counted(make('sd_resnet18', drop_path_rate=0))
    undropped.train(x, 1)
    assert _conversions(undropped) == 0
    features = Counted(make('sd_resnet18', features_only=True, num_classes=None))
    with torch.no_grad():
        assert all(feature.is_contiguous() for feature in features.compiled(x))


@pytest.mark.parametrize('mode', ['row', 'subset'])
def test_per_sample_modes_have_one_training_graph(mode):
    counted = Counted(make('sd_resnet50', train=True, drop_path_mode=mode), fullgraph=True)
    x = images(4)
    assert counted.train(x, 20) == 1
    assert counted.evaluate(x) == 2
    assert counted.train(x, 20) == 2


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('rescale', ['test', 'train'])
def test_evaluation_is_one_graph(mode, rescale):
    model = make('sd_resnet18', drop_path_mode=mode, drop_path_rescale=rescale)
    counted = Counted(model, fullgraph=True)
    x = images(2)
    assert counted.evaluate(x) == 1
    with torch.no_grad():
        torch.testing.assert_close(counted.compiled(x), model(x))


def test_draws_of_the_same_odds_in_one_graph_are_apart():
    """As of blocks that draw for themselves: a compiler makes one of two calls that look alike."""

    def told_apart(x):
        for _ in range(3):
            (window,) = draw_windows([UNIT * 2 // 5], x.shape[0], x.device)
            x = x * 64 + 8 * window.start + window.alive
        return x

    compiled, x = torch.compile(told_apart, backend='aot_eager_decomp_partition'), torch.ones(8, requires_grad=True)
    for seed in range(4):
        torch.manual_seed(seed)
        out = compiled(x)
        torch.manual_seed(seed)
        assert torch.equal(out, told_apart(x))


@pytest.mark.parametrize('randomness', ['error', 'different', 'same'])
def test_one_draw_for_all_samples_is_refused_in_a_compiled_vmap(randomness):
    """As in an eager one: a graph would give all samples the same window, and say nothing."""

    def drawing(x):
        (window,) = draw_windows([UNIT * 2 // 5], x.shape[0], x.device)
        return x + window.start

    compiled = torch.compile(lambda x: torch.func.vmap(drawing, randomness=randomness)(x), backend='eager')
    with pytest.raises(RuntimeError, match=r"must be 'row' under torch\.func\.vmap"):
        compiled(torch.ones(3, 8))


def drawing(x):
    (window,) = draw_windows([UNIT * 2 // 5], x.shape[0], x.device)
    return x.sin() * (window.start + 1)


@pytest.mark.parametrize('backend', ['aot_eager_decomp_partition', 'inductor'])
def test_a_backward_pass_meets_the_draw_of_its_forward_pass(backend):
    """Also where it computes a checkpointed region again; a new draw would give another function's gradients."""
    for checkpointed in (False, True):
        torch._dynamo.reset()
        region = functools.partial(checkpoint, drawing, use_reentrant=False) if checkpointed else drawing
        compiled = torch.compile(region, backend=backend)
        for seed in range(6):
            torch.manual_seed(seed)
            x = (torch.rand(8) + 0.1).requires_grad_()
            out = compiled(x)
            out.sum().backward()
            torch.testing.assert_close(x.grad, (out / x.sin() * x.cos()).detach(), rtol=1e-4, atol=1e-4)


def test_a_graph_that_is_captured_by_hand_is_refused_when_it_is_compiled_already(monkeypatch):
    """Replays would read their draw from freed memory of the host, and say nothing."""
    compiled = torch.compile(drawing, backend='eager')
    compiled(torch.ones(8))
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    with pytest.raises(RuntimeError, match='where a CUDA graph is captured'):
        compiled(torch.ones(8))


def test_without_dropping_training_is_one_graph():
    assert Counted(make('sd_resnet18', train=True, drop_path_rate=0), fullgraph=True).train(images(2), 3) == 1


@pytest.mark.parametrize('kind', ['own', 'converted'])
def test_frames_outside_the_compiler_are_not_shown_to_it_at_every_call(kind, monkeypatch):
    """Else it looks at each anew: some 74 times in a step of ResNet-50, which on a GPU saves generators' states."""
    if kind == 'own':
        model = make('sd_resnet20_cifar', train=True, drop_path_rate=0.5)
        x = images(4, 16)
    else:
        model = timm.create_model('vit_tiny_patch16_224', depth=2, embed_dim=48, num_heads=3, img_size=32).train()
        convert(model, 0.5, 'uniform', 'batch')
        x = images(4, 32)
    counted = Counted(model)
    shown, check = [], torch._dynamo.trace_rules.check

    def recorded(code, *args, **kwargs):
        shown.append(code.co_name)
        return check(code, *args, **kwargs)

    monkeypatch.setattr(torch._dynamo.trace_rules, 'check', recorded)
    counted.train(x, 30)  # each block was kept, and dropped
    assert shown
    shown.clear()
    counted.train(x, 5)
    assert not shown


def test_dropped_blocks_do_no_work_when_compiled():
    model = make('sd_resnet18', train=True, zero_init_last=False)
    counted = Counted(model)
    before = [block.bn2.running_mean.clone() for block in model.blocks()]
    decisions = [True, False] * 4
    decide(model, decisions)
    counted.train(images(2), 1)
    moved = [not torch.equal(b, block.bn2.running_mean) for b, block in zip(before, model.blocks())]
    assert moved == decisions
    for block, decision in zip(model.blocks(), decisions):
        assert block.conv1.weight.grad.any() == decision


@pytest.mark.parametrize('mode', MODES)
def test_checkpointing_compiles_and_gives_the_same_gradients(mode):
    model = make('sd_resnet18', train=True, drop_path_mode=mode, dtype=torch.float64)
    x, gradients = images(4, dtype=torch.float64), []
    for checkpointing in (False, True):
        torch._dynamo.reset()
        model.set_grad_checkpointing(checkpointing)
        model.zero_grad()
        torch.manual_seed(5)
        torch.compile(model, backend='aot_eager')(x).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for first, second in zip(*gradients):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-9)


def test_a_compiled_block_or_stage_alone_draws_for_itself():
    model = make('sd_resnet18', train=True, drop_path_schedule='uniform')
    for module, x in ((model.layer1, torch.randn(2, 64, 8, 8)), (model.layer1[0], torch.randn(2, 64, 8, 8))):
        compiled = torch.compile(module, backend='eager')
        outputs = [compiled(x.clone()) for _ in range(40)]
        distinct = {tuple(o.flatten()[:4].tolist()) for o in outputs}
        assert len(distinct) > 1


def test_blocks_that_are_compiled_one_by_one_give_the_gradients_of_eager_ones():
    """Where the compiler breaks a graph, one part of a block runs compiled and another does not."""
    model = make('sd_resnet20_cifar', train=True, drop_path_mode='subset', dtype=torch.float64)
    twin = copy.deepcopy(model)
    for block in twin.blocks():
        block.compile(backend='eager')
    x = images(6, 16, dtype=torch.float64)
    for seed in range(3):
        for net in (model, twin):
            net.zero_grad()
            torch.manual_seed(seed)
            net(x).square().sum().backward()
        for first, second in zip(model.parameters(), twin.parameters()):
            torch.testing.assert_close(first.grad, second.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('training', [True, False])
@pytest.mark.parametrize('mode', ['row', 'subset'])
def test_features_are_one_graph(mode, training):
    """Detectors compile their backbone whole; as the outermost module it must not be called by a property."""
    model = make('sd_resnet20_cifar', features_only=True, drop_path_mode=mode).train(training)
    compiled = torch.compile(model, backend='eager', fullgraph=True)
    assert len(compiled(images(2, size=32))) == 4


@pytest.mark.skipif(
    not hasattr(torch._C._dynamo.eval_frame, 'get_eval_frame_callback'),
    reason='this torch does not tell which compiler is at work',
)
@pytest.mark.parametrize('converted', [False, True])
@pytest.mark.parametrize(('compile_mode', 'warned'), [('reduce-overhead', True), ('default', False)])
def test_batch_mode_under_cuda_graphs_says_what_they_cost(converted, compile_mode, warned, monkeypatch):
    """Whoever asks for them would see memory and time grow with every new outcome of the draws, and not know why."""
    seen = []
    monkeypatch.setattr(compiling.warnings, 'warn', lambda message, *_, **__: seen.append(str(message)))
    told = compiling.warn_of_cuda_graphs
    for module in (network, blocks):  # as if the images were on a GPU
        monkeypatch.setattr(module, 'warn_of_cuda_graphs', lambda x: told(OnCuda()))
    model = make('sd_resnet20_cifar', train=True)
    if converted:
        model = timm.create_model('vit_tiny_patch16_224', depth=2, embed_dim=48, num_heads=3, img_size=32).train()
        convert(model, 0.5, mode='batch')
    compiled = torch.compile(model, mode=compile_mode)
    compiled(images(2))
    assert bool([message for message in seen if 'CUDA graphs' in message]) == warned
