"""Which modules are residual blocks: one taken for a block by mistake would drop what a network cannot do without."""

import pytest
import torch
from timm.layers import DropPath
from torch import nn

import sd_resnet
from sd_resnet.analysis.costs import count_flops
from sd_resnet.converted.trial import copy_without_data, find_slots
from sd_resnet.converted.units import find_units


def search(model, input_size):
    """The units, and the reasons by the names of drop paths."""
    found, left = find_units(copy_without_data(model), input_size, list(find_slots(model)))
    return found, {slot.path: reason for slot, reason in left.items()}


class Block(nn.Module):
    """`kind` says what it does with its input and its branch."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.other = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.drop_path = DropPath(0.3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        branch = self.conv(x) if self.kind == 'drop path not used' else self.drop_path(self.conv(x))
        return {
            'shortcut': lambda: x + branch,
            'scaled shortcut': lambda: x * self.scale + branch,
            'position first': lambda: (x + self.other(x)) + branch,
            'turned': lambda: (x.permute(0, 2, 3, 1) + branch.permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
            'relu': lambda: (x + branch).relu(),
            'relu module': lambda: self.act(x + branch),
            'scaled relu': lambda: (x * self.scale + branch).relu(),
            'in place': lambda: x.add_(branch),
            'drop path not used': lambda: x + branch,
            'no shortcut': lambda: branch,
            'projection': lambda: self.other(x) + branch,
            'norm after': lambda: self.norm(x + branch),
            'gate': lambda: x * self.other(x).sigmoid() + branch,
            'silu': lambda: nn.functional.silu(x + branch),
            'pooled': lambda: nn.functional.max_pool2d(x + branch, 2),
            'two': lambda: (x, branch),
        }[self.kind]()


class Net(nn.Module):
    def __init__(self, kind, act=nn.Identity):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), act())
        self.block = Block(kind)

    def forward(self, x):
        return self.block(self.stem(x))


@pytest.mark.parametrize('kind', ['shortcut', 'scaled shortcut', 'position first', 'turned'])
def test_blocks_with_a_shortcut_are_found(kind):
    (block,), left = search(Net(kind), (3, 8, 8))
    assert (block.name, block.activation, left) == ('block', None, {})
    assert [(slot.path, slot.rate) for slot in block.slots] == [('block.drop_path', 0.3)]
    assert block.identity == (kind in ('shortcut', 'turned'))


@pytest.mark.parametrize(
    ('kind', 'reason'),
    [
        ('drop path not used', 'never used'),
        ('no shortcut', 'by a shortcut'),
        ('norm after', 'by a shortcut'),
        ('gate', 'by a shortcut'),
        ('silu', 'by a shortcut'),
        ('pooled', 'changes the shape from 4 x 8 x 8 to 4 x 4 x 4'),
        ('two', 'something else than one tensor'),
        ('in place', 'changes its input in place'),
        ('scaled relu', 'its input does not come out of one'),
    ],
)
def test_others_are_left_alone_with_the_reason(kind, reason):
    found, left = search(Net(kind), (3, 8, 8))
    assert not found
    assert reason in left['block.drop_path']


@pytest.mark.parametrize(('kind', 'activation'), [('relu', ''), ('relu module', 'act'), ('scaled relu', '')])
def test_a_relu_at_the_end_is_seen(kind, activation):
    (block,), _ = search(Net(kind, nn.ReLU), (3, 8, 8))
    assert block.activation == activation
    assert block.identity == (kind != 'scaled relu')


def test_a_shortcut_of_modules_is_a_projection():
    """Batch mode runs it where it drops the rest."""
    (block,), left = search(Net('projection'), (3, 8, 8))
    assert (block.name, block.projection, block.identity, left) == ('block', ('other',), True, {})


def test_nothing_is_touched():
    net = Net('shortcut').train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    torch.manual_seed(0)
    state = torch.get_rng_state()
    search(net, (3, 8, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training
    assert isinstance(net.block.drop_path, DropPath)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_networks_of_any_type_are_tried(dtype):
    """timm builds them so with `dtype=`; FLOPs are counted on a copy of the same kind."""
    (block,), _ = search(Net('shortcut').to(dtype), (3, 8, 8))
    assert block.name == 'block'
    counted = count_flops(Net('shortcut').to(dtype), (3, 8, 8))
    assert counted == count_flops(Net('shortcut'), (3, 8, 8))
    assert counted[''] > 0


@pytest.mark.parametrize('context', [torch.no_grad, torch.inference_mode])
def test_a_network_is_tried_where_no_gradients_are_wanted(context):
    """The shortcut is found in autograd's graph."""
    with context():
        (block,), _ = search(Net('shortcut'), (3, 8, 8))
        assert torch.is_grad_enabled() is False
    assert block.name == 'block'


def test_what_is_no_network_of_images_is_named():
    with pytest.raises(
        RuntimeError, match=r'Block could not be tried on images of 3 x 8 x 8, .* whole network is needed'
    ):
        sd_resnet.convert(Block('shortcut'), input_size=(3, 8, 8))
