"""The table a user plans a training by: FLOPs, parameters, expected depth and share."""

from dataclasses import replace

import pytest
import timm
import torch

import sd_resnet
from sd_resnet.analysis.costs import cost_table, model_cost, network_cost

from ..faults.observed import Residual, Tiny


@pytest.mark.parametrize(('name', 'share'), [('sd_resnet50', 0.763), ('sd_resnet101', 0.758), ('sd_resnet152', 0.755)])
def test_expected_share_of_flops_at_224_pixels(name, share):
    assert round(network_cost(name).expected_share, 3) == share


def test_counts_agree_with_the_layers_shapes():
    cost = network_cost('sd_resnet50', image_size=64)
    with torch.device('meta'):
        model = timm.create_model('resnet50')
    assert cost.parameters == sum(p.numel() for p in model.parameters())
    first = cost.blocks[0]
    assert first.shortcut_flops == 2 * 64 * 256 * 16 * 16
    assert first.branch_flops == 2 * 16 * 16 * (64 * 64 + 9 * 64 * 64 + 64 * 256)
    assert cost.blocks[1].shortcut_flops == 0
    assert [b.name for b in cost.blocks][:4] == ['layer1.0', 'layer1.1', 'layer1.2', 'layer2.0']
    assert cost.expected_depth == 11.75


@pytest.mark.parametrize('mode', ['subset', 'batch', 'row'])
def test_what_a_drop_saves_is_told_from_what_is_always_computed(mode):
    """Of converted networks too; own and converted ones of the same layers have the same costs."""
    with torch.device('meta'):
        model = timm.create_model('resnet50')
    sd_resnet.convert(model, 0.5, 'linear', mode)
    cost, own = model_cost(model, 64), network_cost('sd_resnet50', 64)
    assert cost == replace(own, architecture='resnet50')


class Positional(Residual):
    """Its convolution in front of the branch is computed for all rows."""

    def __init__(self):
        super().__init__()
        self.position = torch.nn.Conv2d(8, 8, 3, padding=1, groups=8)

    def forward(self, x):
        return super().forward(x + self.position(x))


def test_what_lies_in_a_block_beside_its_branch_is_always_computed():
    """A network of somebody's own: no drop saves its positional convolution."""
    model = Tiny(Positional)
    sd_resnet.convert(model, 0.4, 'uniform', input_size=(3, 32, 32))
    cost = model_cost(model)
    assert cost.image_size == 32
    assert [(b.branch_flops, b.shortcut_flops) for b in cost.blocks] == [(2 * 16 * 9 * 64, 2 * 16 * 9 * 8)] * 3
    assert cost.architecture == 'Tiny'


def test_rate_and_schedule_change_probabilities_alone():
    cost = network_cost('sd_resnet20_cifar', drop_path_rate=0.2, schedule='uniform')
    assert {b.survival_prob for b in cost.blocks} == {0.8}
    assert cost.flops == network_cost('sd_resnet20_cifar', drop_path_rate=0).flops
    assert network_cost('sd_resnet20_cifar', drop_path_rate=0).expected_share == 1


def test_the_table_has_a_row_per_block_and_the_sums():
    table = cost_table(network_cost('sd_resnet50'))
    assert sum(line.startswith('layer') for line in table.splitlines()) == 16
    for text in ('25,557,032', '8,178.4', 'expected depth            11.75', 'expected share of FLOPs   0.763'):
        assert text in table


def test_another_model_is_refused():
    with pytest.raises(ValueError, match=r"model must be sd_resnet50, .*, got 'resnet50'"):
        network_cost('resnet50')
