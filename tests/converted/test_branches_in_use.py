"""Branches where somebody does more with a network than to train it: calls a part, hooks, copies, transforms, replaces.

And networks whose branch cannot be taken.
"""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from timm.layers import DropPath, set_reentrant_ckpt, use_reentrant_ckpt
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook

import sd_resnet
from sd_resnet.converted.by_branch import BranchFailed
from sd_resnet.converted.convert import converted_blocks
from sd_resnet.core.draws import Draw, Window

from ..families import build
from .conftest import assert_a_step_is_timms, branch_drop_paths, converted, entries, loss, quiet

VIT, CONVNEXT, SWIN, REGNET = 'test_vit', 'test_convnext', 'swin_tiny_patch4_window7_224', 'regnetx_002'
each = pytest.mark.parametrize('name', [VIT, CONVNEXT, SWIN, REGNET])


def step(model, x, seed=1):
    """Logits and gradients of a training step."""
    torch.manual_seed(seed)
    quiet(model).zero_grad()
    out = model(x)
    loss(out).backward()
    return [out.detach(), *(p.grad for p in model.parameters())]


def assert_same(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def assert_nothing_is_open(model):
    assert all(each.branch is None and each.in_force is None for each in branch_drop_paths(model).values())


def assert_entries_alone_are_timms(case):
    """Each module in which a branch begins, called by somebody, gives what it gives in the plain network."""
    names = {module: name for name, module in case.model.named_modules()}
    found = {names[module] for begun in entries(case.model).values() for module, _ in begun}
    seen, plain = {}, quiet(copy.deepcopy(case.plain))
    for name in found:
        module = plain.get_submodule(name)
        module.register_forward_hook(
            lambda m, args, kwargs, out, name=name: seen.update({name: (args, kwargs, out)}), with_kwargs=True
        )
    with torch.no_grad():
        plain.eval()(case.x)
        quiet(case.model)
        for name, (args, kwargs, out) in seen.items():
            assert torch.equal(case.model.get_submodule(name)(*args, **kwargs), out)
    assert found == set(seen)


@each
def test_an_entry_called_alone_takes_all_rows(name):
    """Probes and visualisers call a part of a network that trains."""
    case = converted(name)
    assert_entries_alone_are_timms(case)
    step(case.model, case.x)
    assert_entries_alone_are_timms(case)
    assert_nothing_is_open(case.model)


@pytest.mark.parametrize('shape', [(7, 3), (7, 4, 3), (7, 3, 4, 4)])
def test_a_drop_path_called_alone_is_timms(shape):
    case = converted(VIT)
    x = torch.randn(shape)
    for drop_path in branch_drop_paths(case.model).values():
        for mode in (True, False):
            torch.manual_seed(2)
            expected = DropPath(0.5).train(mode)(x)
            torch.manual_seed(2)
            assert torch.equal(drop_path.train(mode)(x), expected)
    assert_nothing_is_open(case.model)


@each
@pytest.mark.parametrize('error', [RuntimeError, KeyError, KeyboardInterrupt])
def test_a_pass_that_fails_half_way_leaves_nothing_open(name, error):
    """A notebook's user interrupts, and goes on."""
    case = converted(name)
    twin = copy.deepcopy(case.model)
    begun = [found[0][0] for found in entries(case.model).values() if found]

    def fail(module, args, out):
        raise error('half-way')

    handle = begun[len(begun) // 2].register_forward_hook(fail)
    with pytest.raises(BranchFailed if error is RuntimeError else error, match='half-way'):
        step(case.model, case.x)
    handle.remove()
    assert_nothing_is_open(case.model)
    assert_entries_alone_are_timms(case)
    assert_same(step(case.model, case.x), step(twin, case.x), rtol=0, atol=0)


def _watch(module, seen):
    """Record the rows that each kind of hook is given, of what goes in and comes out."""

    def rows(values):
        return values.shape[0] if isinstance(values, torch.Tensor) else values[0].shape[0]

    module.register_forward_pre_hook(lambda m, args: seen.update(before=rows(args)))
    module.register_forward_hook(lambda m, args, out: seen.update(after=(rows(args), rows(out))))
    module.register_full_backward_pre_hook(lambda m, out: seen.update(back=rows(out)))
    module.register_full_backward_hook(lambda m, into, out: seen.update(through=(rows(into), rows(out))))


@pytest.mark.parametrize('when', ['before', 'after'])
@each
def test_hooks_of_others_see_what_is_computed(name, when):
    """Activations and gradients are logged so; k = 3 rows of 5."""
    model, x = build(name, rate=0.3)
    twin = copy.deepcopy(model)
    sd_resnet.convert(twin, 0.4, 'uniform', input_size=tuple(x.shape[1:]))
    names = {module: name for name, module in twin.named_modules()}
    drop_path, ((entry, _), *_) = list(entries(twin).items())[-1]
    block = next(block for block in converted_blocks(twin).values() if drop_path in block.drop_paths())
    seen = {names[module]: {} for module in (entry, block, drop_path)}
    if when == 'after':
        sd_resnet.convert(model, 0.4, 'uniform', input_size=tuple(x.shape[1:]))
    for watched in seen:
        _watch(model.get_submodule(watched), seen[watched])
    if when == 'before':
        sd_resnet.convert(model, 0.4, 'uniform', input_size=tuple(x.shape[1:]))
    assert_same(step(model, x), step(twin, x))
    first = 3 if when == 'after' else 5  # hooks run in the order in which they were registered
    assert seen[names[entry]] == dict(before=first, after=(3, 3), back=3, through=(3, 3))
    assert seen[names[block]] == dict(before=5, after=(5, 5), back=5, through=(5, 5))
    if when == 'after':  # a drop path that was there before is another module
        assert seen[names[drop_path]] == dict(before=3, after=(3, 5), back=5, through=(3, 5))


def test_hooks_on_all_modules_see_whole_mini_batches_leave_drop_paths():
    """What a drop path gives is not written before somebody uses it, whoever that is."""
    case = converted(VIT, 0.4)
    expected, given = step(case.model, case.x), []

    def look(module, args, out):
        if module in branch_drop_paths(case.model).values():
            given.append((tuple(out.shape), (out.flatten(1) != 0).any(1).sum().item()))

    handle = register_module_forward_hook(look)
    try:
        assert_same(step(case.model, case.x), expected)
    finally:
        handle.remove()
    assert given == [((5, *given[0][0][1:]), 3)] * len(branch_drop_paths(case.model))


@each
def test_functional_transforms_give_autograds_gradients(name):
    """Meta-learning and influence functions call `torch.func`."""
    case = converted(name)
    model, x = quiet(case.model.double()), case.x.double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    tangents = {name: torch.randn_like(p) for name, p in parameters.items()}

    def f(parameters):
        torch.manual_seed(1)
        return loss(functional_call(model, parameters, (x,)))

    _, *wanted = step(model, x)
    found = grad(f)(parameters)
    assert_same(found.values(), wanted)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no forward mode
        _, slope = jvp(f, (parameters,), (tangents,))
    torch.testing.assert_close(slope, sum((found[name] * tangents[name]).sum() for name in found))
    with pytest.raises(
        RuntimeError, match=r"drop_path_mode must be 'row' under torch.func.vmap, got 'subset'"
    ) as raised:
        vmap(lambda image: model(image[None]), randomness='different')(x)
    assert '\n' not in str(raised.value)
    assert_nothing_is_open(model)
    assert_same(step(model, x)[1:], wanted)


@pytest.fixture
def _one_rank():
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not hasattr(dist.fsdp, 'fully_shard'), reason='FSDP2 is not public in this torch')
@pytest.mark.usefixtures('_one_rank')
@each
def test_a_sharded_network_drops_the_same_rows(name):
    case = converted(name)
    expected = step(case.model, case.x)
    for block in converted_blocks(case.model).values():
        dist.fsdp.fully_shard(block, mesh=dist.init_device_mesh('cpu', (1,)))
    sharded = dist.fsdp.fully_shard(case.model, mesh=dist.init_device_mesh('cpu', (1,)))
    out, *gradients = step(sharded, case.x)
    assert_same([out, *(gradient.full_tensor() for gradient in gradients)], expected)


@pytest.mark.parametrize('reentrant', [True, False])
@each
def test_checkpointing_computes_the_same_rows_again(name, reentrant):
    """Gradients would be silently wrong; two forward passes precede the backward pass."""
    case = converted(name)
    x = case.x.requires_grad_()
    both = lambda model: lambda x: torch.cat([model(x), model(x.flip(0))])  # noqa: E731

    def gradients():
        torch.manual_seed(3)
        quiet(case.model).zero_grad()
        loss(both(case.model)(x)).backward()
        return [p.grad for p in case.model.parameters()]

    expected, before = gradients(), use_reentrant_ckpt()
    case.model.set_grad_checkpointing(True)
    set_reentrant_ckpt(reentrant)
    try:
        assert_same(gradients(), expected, rtol=1e-4, atol=1e-6)
    finally:
        set_reentrant_ckpt(before)
    assert_nothing_is_open(case.model)


@pytest.mark.parametrize(
    ('name', 'replaced', 'drops'),
    [
        (VIT, 'blocks.1.norm1', True),
        (CONVNEXT, 'stages.1.blocks.0.conv_dw', True),
        (SWIN, 'layers.0.blocks.1.norm2', True),
        (VIT, 'blocks.1.drop_path2', False),
        (CONVNEXT, 'stages.1.blocks.0.drop_path', False),
        (SWIN, 'layers.0.blocks.1.drop_path1', False),
    ],
)
def test_a_part_that_is_replaced_after_conversion(name, replaced, drops, recorded):
    """Without its entry a branch is masked, as timm's; without its drop path it never drops."""
    case = converted(name)
    for network in (case.model, case.plain):
        holder, _, attribute = replaced.rpartition('.')
        setattr(network.get_submodule(holder), attribute, nn.Identity())
    expected = len(branch_drop_paths(case.model))
    assert_a_step_is_timms(quiet(case.model.double()), quiet(case.plain.double()), case.x.double(), recorded)
    assert len(recorded) == expected
    assert expected == len(case.conversion.drop_paths) - (not drops)
    assert_nothing_is_open(case.model)


@pytest.mark.parametrize('name', [CONVNEXT, REGNET])
def test_channels_last_stays_so_in_a_branch(name):
    """Every convolution would otherwise pay for a copy."""
    case = converted(name, 0.4)
    expected, formats = step(case.model, case.x), []
    for module in case.model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_pre_hook(lambda m, args: formats.append((len(args[0]), args[0])))
    model, x = case.model.to(memory_format=torch.channels_last), case.x.to(memory_format=torch.channels_last)
    assert_same(step(model, x), expected, rtol=1e-3, atol=1e-5)
    rows = [each for count, each in formats if count == 3]
    assert rows
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in rows)


@each
def test_mixed_precision_keeps_the_types_of_timms_network(name):
    case = converted(name)
    with torch.autocast('cpu', torch.bfloat16):
        out, expected = quiet(case.model)(case.x), quiet(case.plain)(case.x)
        loss(out.float()).backward()
    assert out.dtype == expected.dtype
    assert all(p.grad is not None and p.grad.isfinite().all() for p in case.model.parameters())


class Block(nn.Module):
    """`kind` says what is the matter with its branch, if anything."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.norm = nn.GroupNorm(1, 4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU(inplace=True)
        self.drop_path1, self.drop_path2 = DropPath(0.2), DropPath(0.3)

    def forward(self, x, context):
        if self.kind == 'shared':
            x = x + self.drop_path1(self.conv1(self.norm(x)))
            return x + self.drop_path2(self.conv2(self.norm(x)))
        branch = {
            'runs twice': lambda: self.conv1(self.conv1(x)),
            'context': lambda: self.conv1(x) * context,
            'in place': lambda: self.conv1(self.act(x)),
        }.get(self.kind, lambda: self.conv1(x))()
        x = x * self.drop_path1(branch).sigmoid() if self.kind == 'no addition' else x + self.drop_path1(branch)
        return x + self.drop_path2(self.conv2(x))


class Net(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 4, 1), nn.Linear(4, 2)
        self.blocks = nn.ModuleList([Block(kind), Block(kind)])

    def forward(self, x):
        x = self.stem(x)
        context = x.mean((2, 3), keepdim=True) if self.blocks[0].kind == 'context' else None
        for block in self.blocks:
            x = block(x, context)
        return self.head(x.mean((2, 3)))


def take(kind):
    """A network of such blocks, what `convert` says, and what it warns of."""
    plain = Net(kind)
    model = copy.deepcopy(plain)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        conversion = sd_resnet.convert(model, None, input_size=(3, 6, 6))
    return plain, model, conversion, [str(each.message) for each in caught]


ROW, LEFT = 'blocks.0.act changes its input in place', 'what it gives is not added to a shortcut'


@pytest.mark.parametrize(
    ('kind', 'first', 'second'),
    [
        ('nothing', 'branch', 'branch'),
        ('context', 'row: no module but the whole network is around all of it', 'branch'),
        ('in place', f'row: {ROW}', 'branch'),
        ('no addition', None, 'branch'),
        ('shared', 'block: blocks.0.norm runs elsewhere too', 'block: blocks.0.norm runs elsewhere too'),
        ('runs twice', 'block: blocks.0.conv1 runs elsewhere too', 'block: blocks.0.conv1 runs elsewhere too'),
    ],
)
def test_a_branch_that_cannot_be_taken_is_named_and_trained_as_timms(kind, first, second, recorded):
    """By its block, by row, or left alone; a branch taken by mistake would mix rows up, silently."""
    plain, model, conversion, warned = take(kind)
    assert list(conversion.survival_probs.items()) == [('blocks.0', 0.7), ('blocks.1', 0.7)]
    assert conversion.drop_paths.get('blocks.0.drop_path1') == first
    assert conversion.drop_paths.get('blocks.0.drop_path2') == second
    assert conversion.left_alone == ({} if first else {f'blocks.{l}.drop_path1': LEFT for l in range(2)})
    own = model.blocks[0].drop_path1
    if first is None:
        assert (type(own), own.drop_prob) == (DropPath, 0.2)
    if first is None or first.startswith('row'):
        (message,) = warned
        assert message.startswith('Net: 2 drop paths save no work: blocks.0.drop_path1 (rate 0.2)')
        assert (first or LEFT).removeprefix('row: ') in message
    else:
        assert warned == []
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    if not second.startswith('block'):
        assert_a_step_is_timms(model.double().train(), plain.double().train(), x, recorded, 1e-9)
        assert len(recorded) == len(conversion.drop_paths)
        return
    for block, own in zip(model.double().train().blocks, plain.double().eval().blocks):
        x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
        for start in range(5):
            block.draws.draw = lambda block, x, start=start: Draw(0.7, Window(start, 3, 3))
            mask = torch.tensor([(row - start) % 5 < 3 for row in range(5)]).view(-1, 1, 1, 1)
            torch.testing.assert_close(block(x, None), x + mask / 0.7 * (own(x, None) - x))


def test_what_convert_says_does_not_depend_on_chance():
    """Pages and ranks compare it; a branch that fails is tried on some rows."""
    model, x = build('vit_base_patch16_xp_224')
    said = []
    for seed in range(5):
        torch.manual_seed(seed)
        said.append(sd_resnet.convert(copy.deepcopy(model), 0.5, input_size=tuple(x.shape[1:])))
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(seed).get_state())
    assert ' fails: ' in str(said[0])
    assert said == said[:1] * 5


def test_a_module_of_two_branches_begins_each_where_every_run_is_of_one():
    """A drop path that is used twice in a pass closes two branches, each with a draw of its own."""

    class Twice(nn.Module):
        kind = 'nothing'

        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.drop_path = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), DropPath(0.4)

        def forward(self, x, context):
            return self.second(self.first(x))

        def first(self, x):
            return x + self.drop_path(self.conv1(x))

        def second(self, x):
            return x + self.drop_path(self.conv2(x))

    model = Net('nothing')
    model.blocks = nn.ModuleList([Twice()])
    conversion = sd_resnet.convert(model, None, input_size=(3, 6, 6))
    assert conversion.drop_paths == {'blocks.0.drop_path': 'branch'}
    rows = {'conv1': set(), 'conv2': set()}
    windows = set()
    block = model.train().blocks[0]
    for name, seen in rows.items():
        block.get_submodule(name).register_forward_pre_hook(lambda m, args, seen=seen: seen.add(len(args[0])))
    block.drop_path.register_forward_pre_hook(lambda m, args: windows.add(m.branch.b_l))
    for _ in range(20):
        model(torch.randn(5, 3, 6, 6))
    assert rows == {'conv1': {3}, 'conv2': {3}}
    assert len(windows) == 5  # the first row of the three
    assert_nothing_is_open(model)
