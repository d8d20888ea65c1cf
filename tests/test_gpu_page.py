"""Whoever plans a training by docs/gpu.md: what is counted there of a step."""

import json

import pytest
import torch

from docs import gpu
from sd_resnet.analysis.costs import network_cost

NAME, BATCH, RATE = 'sd_resnet20_cifar', 8, 0.5


@pytest.fixture(scope='module')
def records():
    torch._dynamo.reset()
    yield {record['mode']: record for record in gpu.measure(NAME, BATCH, (RATE,), seeds=2)}
    torch._dynamo.reset()


def test_batch_mode_saves_the_flops_of_its_branches(records):
    """Once in the forward pass, twice in the backward pass, of each image."""
    cost = network_cost(NAME, drop_path_rate=RATE)
    saved = sum((1 - block.survival_prob) * block.branch_flops for block in cost.blocks)
    assert records['constant depth']['flops'] - records['batch']['flops'] == pytest.approx(3 * BATCH * saved, rel=1e-9)


def test_subset_mode_reads_and_writes_more_and_saves_as_much(records):
    constant, batch, subset = (records[mode] for mode in ('constant depth', 'batch', 'subset'))
    assert subset['flops'] == pytest.approx(batch['flops'], rel=0.05)
    for how in gpu.HOW:
        assert batch[f'bytes, {how}'] < constant[f'bytes, {how}']
        assert batch[f'bytes, {how}'] < subset[f'bytes, {how}']
    for record in records.values():
        assert record['bytes, fused'] < record['bytes, eager']
        for card, (flops, memory) in gpu.CARDS.items():
            least = 1e3 * max(record['flops'] / flops, record['bytes, eager'] / memory)
            assert least <= record[f'{card}, eager'] * (1 + 1e-9)


def test_an_operation_is_counted_once_and_views_are_none():
    x = torch.empty(4, 8, dtype=torch.bfloat16, device='meta')
    with gpu.Counting() as counting:
        (x.t().t() @ torch.empty(8, 2, dtype=torch.bfloat16, device='meta')).relu_()
    assert counting.step == [('mm', 2 * 4 * 8 * 2, 2 * (32 + 16 + 8), 2 * (32 + 16 + 8)), ('relu_', 0, 2 * (8 + 8), 0)]


def test_groups_of_a_convolution_are_no_work_for_each_other():
    """torch's counter takes a depthwise convolution's backward pass for a full one."""
    conv, flops = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False, device='meta'), 2 * 5 * 8 * 36 * 9
    x = torch.empty(5, 8, 6, 6, device='meta', requires_grad=True)
    with gpu.Counting() as counting:
        conv(x).sum().backward()
    assert {each.name: each.flops for each in counting.step if each.flops} == {
        'convolution': flops,
        'convolution_backward': 2 * flops,
    }


def test_attention_is_one_kernel():
    names = {each.name for each in gpu.Training('sd_test_vit', 2).step()}
    assert '_scaled_dot_product_flash_attention_backward' in names
    assert not names & {'bmm', '_softmax', '_safe_softmax'}


def test_the_page_has_the_record():
    steps = json.loads(gpu.RECORD.read_text(encoding='utf-8'))['steps']
    assert list(dict.fromkeys(step['model'] for step in steps)) == list(gpu.MODELS)
    assert f'{gpu.BEGIN}{gpu.table(steps)}{gpu.END}' in gpu.PAGE.read_text(encoding='utf-8')
