"""Two ranks over NCCL, each with a GPU of its own."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..training import BATCH, MODES, network
from .conftest import DEVICE, ON_CARD

pytestmark = pytest.mark.skipif(ON_CARD and torch.cuda.device_count() < 2, reason='fewer than two GPUs here')


def _train(rank, port, kind, mode, folder):
    torch.set_num_threads(1)
    if ON_CARD:
        torch.cuda.set_device(rank)
    dist.init_process_group('nccl' if ON_CARD else 'gloo', f'tcp://127.0.0.1:{port}', world_size=2, rank=rank)
    device = f'cuda:{rank}' if ON_CARD else DEVICE
    model, size = network(kind, mode)
    model = copy.deepcopy(model).to(device).train()
    parallel = DistributedDataParallel(model, device_ids=[rank] if ON_CARD else None)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    torch.manual_seed(rank)
    for _ in range(6):
        x, y = torch.randn(BATCH, 3, size, size, device=device), torch.randint(5, (BATCH,), device=device)
        nn.functional.cross_entropy(parallel(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.save([parameter.detach().cpu() for parameter in model.parameters()], f'{folder}/{rank}.pt')
    dist.destroy_process_group()


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('kind', ['sd_resnet20_cifar', 'vit'])
def test_ranks_stay_bit_equal(kind, mode, tmp_path):
    """In batch mode they drop the same blocks, in the others each its own rows; no parameter is waited for."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_train, (port, kind, mode, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f'{rank}.pt') for rank in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert all(parameter.isfinite().all() for parameter in first)
