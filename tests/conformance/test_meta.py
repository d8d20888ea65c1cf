"""A training step on tensors without data: what would make a GPU wait for the host, or fail, shows without one.

Every operation of a step, forward, backward and the optimiser's, is looked at; on `meta` no value can be asked for.
"""

import contextlib
import copy
from functools import partial

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ..training import BATCH, KINDS, MODES, network

aten = torch.ops.aten
# What a step is made with
VARIANTS = {
    'plain': {},
    'checkpointing': dict(checkpointing=True),
    'ramp': dict(ramp=True),
    'autocast': dict(autocast=True),
    'channels_last': dict(channels_last=True),
    'autocast, channels_last, ramp': dict(autocast=True, channels_last=True, ramp=True),
    # Without autocast: torch leaves modes like the one here out of a recomputation
    'checkpointing, channels_last, ramp': dict(checkpointing=True, channels_last=True, ramp=True),
}
COMPILED = [(kind, mode, 'plain') for kind in KINDS[1:] for mode in MODES]
COMPILED += [
    (kind, 'subset', variant) for kind in ('sd_resnet20_cifar', 'vit') for variant in ('checkpointing', 'ramp')
]


class Watch(TorchDispatchMode):
    """Fails where an operation mixes host and device; counts what is copied from host to device.

    One of a single number is one too: a kernel takes its value with it, which a CUDA graph then keeps for ever.
    """

    copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        hosts = {each.is_cpu for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        out = func(*args, **kwargs)
        if func is aten.copy_.default and hosts == {True, False}:
            self._copied(func, args[2:] == (True,) or kwargs.get('non_blocking'))
        elif len(hosts) > 1:
            raise AssertionError(f'{func} of tensors on the host and on a device')
        elif func is aten._to_copy.default and args[0].is_cpu and not out.is_cpu:
            self._copied(func, kwargs.get('non_blocking'))
        return out

    def __enter__(self):
        self.numbers = Numbers()
        self.numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self.numbers.__exit__(*raised)

    def _copied(self, func, non_blocking):
        assert non_blocking, f'{func} to a device that waits'
        self.copies += 1


class Numbers(TorchFunctionMode):
    """Fails where a tensor on a device is made of numbers: torch makes it on the host, and waits for the copy."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, torch.asarray, torch.Tensor.new_tensor)
        assert not (made and not out.is_cpu), f'{func} of numbers on a device'
        return out


class Autocast(TorchFunctionMode):
    """What `torch.autocast` does to these operations, which passes tensors on `meta` by."""

    to = dict.fromkeys((F.conv2d, F.linear, F.scaled_dot_product_attention, torch.matmul), torch.bfloat16)
    to |= dict.fromkeys((torch.Tensor.matmul, torch.Tensor.__matmul__), torch.bfloat16)
    to |= dict.fromkeys((F.layer_norm, F.group_norm, F.softmax, F.cross_entropy, torch.Tensor.softmax), torch.float32)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if dtype := self.to.get(func):
            args, kwargs = tree_map_only(torch.Tensor, partial(self._cast, dtype), (args, kwargs))
        return func(*args, **kwargs)

    @staticmethod
    def _cast(dtype, x):
        return x.to(dtype) if x.is_floating_point() else x


class Training:
    """Steps of a network on a device without data."""

    def __init__(self, kind, mode, checkpointing=False, ramp=False, autocast=False, channels_last=False, spoil=None):
        model, size = network(kind, mode, ramp)
        self.model = copy.deepcopy(model).to('meta').train()
        self.x = torch.randn(BATCH, 3, size, size, device='meta')
        self.y = torch.zeros(BATCH, dtype=torch.long, device='meta')
        if channels_last:
            self.model, self.x = (each.to(memory_format=torch.channels_last) for each in (self.model, self.x))
        self.model.set_grad_checkpointing(checkpointing)
        self.autocast = Autocast() if autocast else contextlib.nullcontext()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
        if spoil:
            last = [module for module in self.model.modules() if isinstance(module, nn.Linear)][-1]
            last.register_forward_pre_hook(lambda module, args: (spoil(args[0]),))

    def step(self, forward=None):
        with self.autocast:
            out = (self.model if forward is None else forward)(self.x)
            loss = F.cross_entropy(out, self.y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return out


@pytest.mark.parametrize('variant', VARIANTS)
@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', KINDS)
def test_a_step_waits_for_no_device_and_copies_nothing(kind, mode, variant):
    """Three of them: a ramp starts at rate 0, and buffers are made in the first."""
    training = Training(kind, mode, **VARIANTS[variant])
    for _ in range(3):
        with Watch() as watch:
            out = training.step()
        assert watch.copies == 0
    assert out.dtype == (torch.bfloat16 if 'autocast' in VARIANTS[variant] else torch.float32)


class Compiled:
    """A compiler that changes nothing of a graph, and watches it run: while one is watched, torch compiles nothing."""

    def __init__(self, model):
        self.copies, self.graphs = [], 0
        compilers = dict(fw_compiler=self._compiler('forward'), bw_compiler=self._compiler('backward'))
        like_torchs = dict(partition_fn=min_cut_rematerialization_partition, keep_inference_input_mutations=True)
        backend = aot_autograd(**compilers, **like_torchs)
        self.forward = torch.compile(model, backend=backend)

    def _compiler(self, direction):
        def compiler(graph, inputs):
            self.graphs += 1

            def run(*args):
                with Watch() as watch:
                    out = graph(*args)
                self.copies += [direction] * watch.copies
                return out

            return make_boxed_func(run)

        return compiler


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(('kind', 'mode', 'variant'), COMPILED)
def test_a_compiled_step_copies_its_draws_at_most_and_at_once(kind, mode, variant):
    """CUDA graphs begin behind that copy, and the backward pass is one from end to end."""
    training = Training(kind, mode, **VARIANTS[variant])
    compiled = Compiled(training.model)
    for _ in range(2):
        compiled.copies.clear()
        training.step(compiled.forward)
        in_graph = mode == 'subset' and variant != 'ramp'
        assert compiled.copies == ['forward'] * in_graph
    assert compiled.graphs


@pytest.mark.parametrize('mode', ['batch', 'subset'])
@pytest.mark.parametrize('kind', ['sd_resnet20_cifar', 'vit'])
def test_the_compilers_own_way_without_a_code_generator(kind, mode):
    """As `aot_eager` runs it, unwatched."""
    training = Training(kind, mode)
    assert training.step(torch.compile(training.model, backend='aot_eager')).is_meta


# What is put before the last layer, and words of what is raised
SPOILS = {
    'item': (lambda x: x * x.sum().item(), 'item'),
    'tolist': (lambda x: x * x.sum().tolist(), 'no data'),
    'bool': (lambda x: x if x.sum() > 0 else -x, 'item'),
    'nonzero': (lambda x: x + x.nonzero().sum(), 'nonzero'),
    'to the host': (lambda x: x + x.cpu().sum(), 'no data'),
    'host tensor': (lambda x: x + torch.ones(x.shape[-1]), 'device'),
    'host number': (lambda x: x + torch.ones(()), 'on the host and on a device'),
    'waits': (lambda x: x + torch.ones(x.shape[-1]).to(x.device), 'that waits'),
    'waits in place': (lambda x: x + torch.empty_like(x).copy_(torch.ones(x.shape)), 'that waits'),
    'of numbers': (lambda x: x + torch.tensor([1.0], device=x.device), 'of numbers on a device'),
}


@pytest.mark.parametrize('spoil', SPOILS)
def test_the_watch_sees_whatever_would_wait(spoil):
    """Else the tests above would be green whatever a step does."""
    spoil, said = SPOILS[spoil]
    training = Training('sd_resnet20_cifar', 'subset', spoil=spoil)
    with pytest.raises((RuntimeError, AssertionError, NotImplementedError), match=said), Watch():
        training.step()


@pytest.mark.parametrize(('spoil', 'said'), [('host number', 'on the host and on a device'), ('waits', 'that waits')])
def test_the_watch_sees_into_compiled_graphs(spoil, said):
    training = Training('sd_resnet20_cifar', 'subset', spoil=SPOILS[spoil][0])
    with pytest.raises(AssertionError, match=said):
        training.step(Compiled(training.model).forward)


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', ['sd_resnet20_cifar', 'vit'])
def test_a_draw_is_not_captured_in_a_cuda_graph(kind, mode, monkeypatch):
    """Whoever captures a step by hand would replay one draw for ever, and see nothing of it."""
    training = Training(kind, mode)
    monkeypatch.setattr(torch.cuda, 'is_initialized', lambda: True)
    monkeypatch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
    if mode == 'row':
        training.step()
        return
    with pytest.raises(RuntimeError, match=f"must be 'row' where a CUDA graph is captured, got '{mode}'"):
        training.step()
