"""The operations that skip work: their values and gradients against plain indexing, and what they keep for backward."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from sd_resnet.core import private_api
from sd_resnet.core.draws import Window
from sd_resnet.core.skipping import fork, fork_in_graph, join, join_in_graph, relu_in_graph, skip
from sd_resnet.resnets.blocks import gathered_again

again = pytest.mark.skipif(private_api._top_hooks is None, reason='this torch does not tell which hooks are active')

WINDOWS = [(0, 3), (2, 3), (3, 3), (4, 4), (4, 1), (1, 5)]  # (start, rows) of 5; half of them wrap


def test_skip_passes_the_gradient_and_gives_zero_gradients():
    conv = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    frozen = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    x = torch.randn(2, 3, requires_grad=True)
    skip(x, [*conv.parameters(), frozen]).mul(3).sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))
    assert all(p.grad is not None and not p.grad.any() for p in conv.parameters())
    assert conv.weight.grad.stride() == conv.weight.stride()
    assert frozen.grad is None


def test_an_inplace_operation_after_skip_is_noticed_by_whoever_keeps_its_input():
    x = torch.randn(3, requires_grad=True)
    squared = x.exp()
    skip(squared, []).mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        squared.sum().backward()


def _block(x, window, f, relu=False):
    """relu(x + f(x)) on the window's rows, x elsewhere."""
    x, taken = fork(x, window, replaced=True)
    return join(x, taken + f(taken), window, None, relu)


def _projecting_block(x, window, f, relu=False):
    """relu(3 x + 1.5 f(x)) on the window's rows, relu(3 x) elsewhere."""
    if isinstance(window.start, torch.Tensor):
        x, taken = fork_in_graph(x, window)
        out = join_in_graph(x * 3, f(taken), window, 1.5)
        return out.relu() if relu else out
    x, taken = fork(x, window)
    return join(x * 3, f(taken), window, 1.5, relu)


def _plain_block(x, index, f, relu):
    y = x[index] + f(x[index])
    return x.index_copy(0, index, y.relu() if relu else y)


def _plain_projecting_block(x, index, f, relu):
    y = (x * 3).index_add(0, index, f(x[index]), alpha=1.5)
    return y.relu() if relu else y


@pytest.mark.parametrize('relu', [False, True], ids=['', 'relu'])
@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last], ids=['contiguous', 'channels_last'])
@pytest.mark.parametrize(('start', 'rows'), WINDOWS)
@pytest.mark.parametrize('kind', ['identity', 'projection', 'index', 'index, last row masked', 'torch.func'])
def test_windows_agree_with_plain_indexing(kind, start, rows, layout, relu):
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64).to(memory_format=layout)
    reference = x.clone().requires_grad_()
    weight = torch.randn_like(x)
    block, plain = (_block, _plain_block) if kind == 'identity' else (_projecting_block, _plain_projecting_block)
    window, survive = Window(start, rows, rows), rows
    if 'index' in kind:
        survive = rows - ('masked' in kind)
        window = Window(torch.tensor(start), rows, torch.tensor(survive) if 'masked' in kind else rows)

    def loss(x):
        out = block(x, window, torch.sin, relu)
        return (out * weight).sum(), out

    if kind == 'torch.func':
        grad, out = torch.func.grad(loss, has_aux=True)(x)
    else:
        value, out = loss(x.requires_grad_())
        grad = torch.autograd.grad(value, x)[0]
    expected = plain(reference, (torch.arange(survive) + start) % 5, torch.sin, relu)
    (expected * weight).sum().backward()

    torch.testing.assert_close(out, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(grad, reference.grad, rtol=0, atol=1e-14)
    if kind in ('identity', 'projection'):
        assert out.is_contiguous(memory_format=layout)
        assert grad.is_contiguous(memory_format=layout)


@pytest.mark.parametrize('block', [_block, _projecting_block])
def test_windows_have_first_and_second_derivatives_backward_and_forward(block):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    window = Window(3, 2, 2)
    assert torch.autograd.gradcheck(lambda x: block(x, window, lambda r: r**3), x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: block(x, window, lambda r: r**3), x)


def test_a_masked_row_takes_nothing_from_a_branch_that_breaks():
    """Infinity times zero is no number."""
    x = torch.ones(3, 2, requires_grad=True)
    window = Window(torch.tensor(0), 2, torch.tensor(1))
    out = _projecting_block(x, window, lambda rows: rows / torch.tensor([[1.0], [0.0]]))
    assert out.isfinite().all()


def test_neither_a_shortcut_nor_a_gradient_that_others_hold_is_written_to():
    x = torch.randn(4, 2, requires_grad=True)
    for block in (_block, _projecting_block):
        out = block(x, Window(1, 2, 2), torch.sin, relu=True)
        upstream = torch.ones_like(out)
        out.backward(upstream)
        assert torch.equal(upstream, torch.ones_like(upstream))
    shortcut = torch.randn(4, 2)
    before = shortcut.clone()
    join(shortcut, torch.ones(2, 2), Window(0, 2, 2), 1.0, relu=True)
    assert torch.equal(shortcut, before)


@again
@pytest.mark.parametrize(('start', 'rows'), WINDOWS)
@pytest.mark.parametrize('replaced', [True, False])
def test_rows_that_are_gathered_again_give_the_same_gradients_and_are_not_kept(start, rows, replaced):
    conv = torch.nn.Conv2d(4, 4, 3, padding=1)
    x = torch.randn(5, 4, 3, 3, requires_grad=True)
    results, kept, window = [], [], Window(start, rows, rows)
    for again in (False, True):
        addresses = set()
        with saved_tensors_hooks(lambda t, a=addresses: (a.add(t.untyped_storage().data_ptr()), t)[1], lambda t: t):
            shortcut, taken = fork(x * 1, window, replaced)
            if again:
                with gathered_again(taken):
                    branch = conv(taken)
            else:
                branch = conv(taken)
            out = (
                join(shortcut, branch, window, None, False)
                if replaced
                else join(shortcut * 1, branch, window, 1.0, False)
            )
        kept.append(taken.untyped_storage().data_ptr() in addresses - {x.untyped_storage().data_ptr()})
        wraps = start + rows > 5
        results.append(torch.autograd.grad(out.square().sum(), [x, *conv.parameters()]))
    assert kept == [True, not wraps]  # without a wrap the rows are a view of what is kept anyway
    assert all(torch.equal(a, b) for a, b in zip(*results))


@again
def test_hooks_around_rows_that_are_gathered_again_see_what_else_is_kept():
    """A counter of bytes, an offload to the host, an activation checkpoint."""
    conv = torch.nn.Conv2d(4, 4, 1)
    seen = []
    with saved_tensors_hooks(lambda t: seen.append(t) or t.clone(), lambda t: t):
        _, taken = fork(torch.randn(3, 4, 1, 1, requires_grad=True) * 1, Window(2, 2, 2))
        with gathered_again(taken), torch.autocast('cpu', torch.bfloat16):
            conv(taken.bfloat16()).sum().backward()
    assert [t.dtype for t in seen if t.shape == conv.weight.shape] == [torch.bfloat16]
    assert conv.weight.grad.any()


@again
def test_a_weight_that_is_changed_before_backward_is_noticed():
    conv = torch.nn.Conv2d(1, 1, 1)
    shortcut, taken = fork(torch.randn(3, 1, 1, 1, requires_grad=True) * 1, Window(2, 2, 2))
    with gathered_again(taken):
        out = join(shortcut * 1, conv(taken), Window(2, 2, 2), 1.0, False)
    with torch.no_grad():
        conv.weight.mul_(2)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.sum().backward()


def test_a_compiled_relu_passes_the_gradients_of_torchs():
    x = torch.tensor([-1.0, 0.0, 2.0, 3.0], requires_grad=True)
    grad = torch.tensor([1.0, 2.0, torch.inf, -3.0])
    out, expected = relu_in_graph(x), x.relu()
    torch.testing.assert_close(out, expected)
    ours, theirs = torch.autograd.grad(out, x, grad), torch.autograd.grad(expected, x, grad)
    assert torch.equal(*ours, *theirs)
