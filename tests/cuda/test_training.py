"""Training steps on a GPU: every mode, with whatever people train with."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from ..conftest import count_calls
from ..converted.conftest import assert_a_step_is_timms, converted, recorded  # noqa: F401
from ..training import ANY, BATCH, KINDS, MODES, OWN, network
from .conftest import DEVICE, ON_CARD

INDUCTOR = {'backend': 'inductor' if ON_CARD else 'aot_eager'}
GRAPHS = {'mode': 'reduce-overhead'} if ON_CARD else INDUCTOR

# What a step is made with
EAGER = {
    'plain': {},
    'bfloat16': dict(autocast=torch.bfloat16),
    'float16': dict(autocast=torch.float16),
    'channels_last': dict(channels_last=True),
    'checkpointing': dict(checkpointing=True),
    'ramp': dict(ramp=True),
    'all': dict(autocast=torch.bfloat16, channels_last=True, checkpointing=True, ramp=True),
}
MANY = dict(autocast=torch.bfloat16, channels_last=True, checkpointing=True)
COMPILED = {
    'compiled': dict(compiled=INDUCTOR),
    'compiled, many': dict(compiled=INDUCTOR, **MANY),
    'CUDA graphs': dict(compiled=GRAPHS),
    'CUDA graphs, many': dict(compiled=GRAPHS, **MANY),
}


class Training:
    """Steps of a network."""

    def __init__(
        self,
        kind,
        mode,
        device=DEVICE,
        dtype=torch.float32,
        autocast=None,
        channels_last=False,
        checkpointing=False,
        ramp=False,
        compiled=None,
    ):
        model, size = network(kind, mode, ramp)
        torch.manual_seed(0)
        x, y = torch.randn(BATCH, 3, size, size, dtype=dtype), torch.randint(5, (BATCH,))
        self.model, self.x, self.y = copy.deepcopy(model).to(device, dtype).train(), x.to(device), y.to(device)
        if channels_last:
            self.model, self.x = (each.to(memory_format=torch.channels_last) for each in (self.model, self.x))
        self.model.set_grad_checkpointing(checkpointing)
        self.autocast = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
        self.forward = torch.compile(self.model, **compiled) if compiled else self.model
        self.optimizer = torch.optim.SGD(self.model.parameters(), 1e-3, momentum=0.9)

    def step(self):
        self.optimizer.zero_grad()  # to None: gradients that a CUDA graph has written are gone when it runs again
        torch.compiler.cudagraph_mark_step_begin()
        with self.autocast:
            loss = nn.functional.cross_entropy(self.forward(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        return loss.detach().clone()

    def gradients(self, seed):
        """Of a step from this seed: loss, and gradients."""
        self.model.zero_grad()
        torch.manual_seed(seed)
        torch.compiler.cudagraph_mark_step_begin()
        loss = nn.functional.cross_entropy(self.forward(self.x), self.y)
        loss.backward()
        return [loss.detach().clone(), *(p.grad.clone() for p in self.model.parameters())]


def _check(kind, mode, options):
    training = Training(kind, mode, **options)
    losses = [training.step() for _ in range(4)]
    assert all(parameter.grad is not None for parameter in training.model.parameters())
    values = [*losses, *training.model.parameters(), *training.model.buffers()]
    assert all(value.isfinite().all() for value in values)
    assert {value.device.type for value in values} == {DEVICE}


@pytest.mark.parametrize('how', EAGER)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', KINDS)
def test_a_step_is_finite_and_reaches_every_parameter(kind, mode, how):
    _check(kind, mode, EAGER[how])


@pytest.mark.parametrize('how', COMPILED)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', ['sd_resnet20_cifar', 'vit', 'convnext'])
def test_a_compiled_step_is_finite_and_reaches_every_parameter(kind, mode, how):
    _check(kind, mode, COMPILED[how])


@contextlib.contextmanager
def no_waiting():
    """An error where the host waits for the device."""
    if not ON_CARD:
        yield
        return
    torch.cuda.set_sync_debug_mode('error')
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('how', EAGER)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', KINDS)
def test_the_host_never_waits(kind, mode, how):
    """A host that waits once in each block leaves the card idle in between."""
    training = Training(kind, mode, **EAGER[how])
    training.step()  # what is made once may wait
    with no_waiting():
        for _ in range(3):
            training.step()


@pytest.mark.parametrize('mode', ['batch', 'subset'])
@pytest.mark.parametrize('kind', KINDS)
def test_a_seed_gives_the_step_that_it_gives_on_the_host(kind, mode):
    """Draws are the host's; in double precision, which tells a wrong row from rounding."""
    there, here = (Training(kind, mode, device, torch.float64) for device in (DEVICE, 'cpu'))
    for seed in range(4):
        for found, expected in zip(there.gradients(seed), here.gradients(seed)):
            torch.testing.assert_close(found.cpu(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('name', ANY.values())
def test_a_converted_step_is_timms_with_the_same_rows(name, recorded):  # noqa: F811
    case = converted(name)
    model, plain = (copy.deepcopy(each).to(DEVICE, torch.float64).train() for each in (case.model, case.plain))
    for module in [*model.modules(), *plain.modules()]:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # of fewer rows it would see others
    assert_a_step_is_timms(model, plain, case.x.to(DEVICE, torch.float64), recorded)
    assert recorded


@pytest.mark.parametrize('mode', ['batch', 'subset'])
@pytest.mark.parametrize('kind', OWN)
def test_what_is_dropped_does_not_run(kind, mode):
    training, most = Training(kind, mode), {'batch': {0, BATCH}, 'subset': {3}}[mode]
    forward, backward = count_calls(list(training.model.blocks()))
    for _ in range(4):
        training.step()
        rows = {sum(calls) for calls in forward}
        assert rows <= most
        assert [sum(calls) for calls in backward] == [sum(calls) for calls in forward]
        for calls in (*forward, *backward):
            calls.clear()


@pytest.mark.parametrize('graphs', [False, True], ids=['compiled', 'CUDA graphs'])
@pytest.mark.parametrize('mode', ['batch', 'subset'])
@pytest.mark.parametrize('kind', ['sd_resnet20_cifar', 'vit', 'convnext'])
def test_a_seed_gives_the_compiled_step_that_it_gives_eagerly(kind, mode, graphs):
    """In a CUDA graph the draws of the first step would be those of all others, were they a part of it."""
    compiled, eager = Training(kind, mode, compiled=GRAPHS if graphs else INDUCTOR), Training(kind, mode)
    for seed in range(6):
        found, expected = compiled.gradients(seed), eager.gradients(seed)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
        for a, b in zip(found[1:], expected[1:]):
            assert (a - b).abs().max() <= 1e-2 * max(b.abs().max(), 1e-4)


@pytest.mark.parametrize('mode', ['subset', 'row'])
@pytest.mark.parametrize('kind', ['sd_resnet20_cifar', 'vit', 'convnext'])
def test_cuda_graphs_take_the_whole_step_and_draw_anew(kind, mode):
    """Without them torch says so once, and the step is a compiled one like others."""
    counters = torch._dynamo.utils.counters['inductor']
    counters.clear()
    training = Training(kind, mode, compiled=GRAPHS)
    training.optimizer = torch.optim.SGD(training.model.parameters(), 0.0)
    losses = torch.stack([training.step() for _ in range(8)])
    assert len(losses.unique()) > 2
    if ON_CARD and getattr(torch._inductor.config, 'graph_partition', mode == 'row'):
        assert counters['cudagraph_skips'] == 0


@pytest.mark.skipif(not ON_CARD, reason='only a GPU captures; tests/conformance/test_meta.py has what is refused')
@pytest.mark.parametrize('mode', MODES)
def test_a_step_captured_by_hand_draws_anew_or_is_refused(mode):
    training = Training('sd_resnet20_cifar', mode)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream), torch.no_grad():
        training.model(training.x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    refused = pytest.raises(RuntimeError, match='where a CUDA graph is captured')
    with torch.no_grad(), contextlib.nullcontext() if mode == 'row' else refused, torch.cuda.graph(graph):
        out = training.model(training.x)
    if mode == 'row':
        outs = []
        for _ in range(4):
            graph.replay()
            outs.append(out.sum().item())
        assert len(set(outs)) > 1
