"""What several test files need: small networks with weights and statistics that a mistake would show in."""

import pytest
import timm
import torch

import sd_resnet  # noqa: F401

torch.set_num_threads(1)  # the networks are small, and other work may run beside

IMAGENET = [
    'resnet18',
    'resnet34',
    'resnet50',
    'resnet101',
    'resnet152',
    'resnet50d',
    'resnet101d',
    'resnet152d',
    'wide_resnet50_2',
    'resnext50_32x4d',
]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


NARROW = {'channels': (16, 24, 32, 48)}  # of the stages: the same blocks, quicker


def make(name, train=False, dtype=None, full=False, **kwargs):
    """A network whose branches do not start at zero, with BatchNorm statistics and weights of no special value.

    ImageNet's are narrow unless `full`.
    """
    narrow = {} if full or 'cifar' in name else NARROW
    model = timm.create_model(name, **{'num_classes': 10, 'zero_init_last': False, **narrow, **kwargs})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.8, 1.2)
                module.weight.uniform_(0.3, 0.7)
                module.bias.normal_(0, 0.1)
    return model.to(dtype).train(train) if dtype else model.train(train)


def images(batch=4, size=32, dtype=None):
    return torch.randn(batch, 3, size, size, dtype=dtype)


def count_calls(blocks):
    """Record for each block the number of rows of every forward call of its branch, and of backward calls."""
    forward, backward = [[] for _ in blocks], [[] for _ in blocks]
    for index, block in enumerate(blocks):
        block.conv1.register_forward_hook(lambda m, i, o, index=index: forward[index].append(o.shape[0]))
        block.conv1.register_full_backward_hook(lambda m, i, o, index=index: backward[index].append(o[0].shape[0]))
    return forward, backward
