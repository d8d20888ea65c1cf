"""What only a GPU can tell. Where there is none everything here is skipped, and pytest prints that reason.

    pytest -n 0 tests/cuda
    SD_RESNET_TEST_DEVICE=cpu pytest -n 0 tests/cuda

The second runs the same tests on the host, to see that they are sound: there `torch.compile` makes no code, nothing can
be seen to wait, CUDA graphs are none, and NCCL is gloo.
"""

import os
from pathlib import Path

import pytest
import torch

DEVICE = os.environ.get('SD_RESNET_TEST_DEVICE', 'cuda')
ON_CARD = DEVICE == 'cuda'


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    if ON_CARD and not torch.cuda.is_available():
        reason = 'no CUDA device here; SD_RESNET_TEST_DEVICE=cpu runs it on the host (see tests/cuda/conftest.py)'
        for item in items:
            if here in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _exact_and_fresh():
    """Float32 as on the host, and a compiler that knows nothing."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
