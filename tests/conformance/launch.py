"""timm's unmodified train.py as a scenario of `pair.py`, in the process group that is there.

timm passes device_ids=[cpu] to DistributedDataParallel, which refuses that: it is dropped here, and nothing else is
changed. What a test wants to know is recorded on the way.
"""

import os
import runpy
import signal
import sys
import threading
import time
from unittest.mock import patch

import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch.nn.parallel import DistributedDataParallel

from .ranks import digest, put_stand_ins, watch


def train_script(script, argv, stand_in=False, dies_after=None):
    """This rank's blocks that ran, and what became of its parameters.

    `dies_after`: a file; rank 1 is killed once it is there.
    """
    rank, seen = dist.get_rank(), {}
    ddp_init, ema_init = DistributedDataParallel.__init__, ModelEmaV3.__init__

    def on_cpu(self, module, device_ids=None, *args, **kwargs):
        if next(module.parameters()).device.type == 'cpu':
            device_ids = None
        if stand_in:
            put_stand_ins(module)
        seen['model'], seen['ran'] = module, watch(module)
        ddp_init(self, module, device_ids, *args, **kwargs)

    def with_ema(self, *args, **kwargs):
        ema_init(self, *args, **kwargs)
        seen['ema'] = self

    if dies_after is not None and rank == 1:
        threading.Thread(target=_die, args=(dies_after,), daemon=True).start()
    with (
        patch.object(DistributedDataParallel, '__init__', on_cpu),
        patch.object(ModelEmaV3, '__init__', with_ema),
        patch.object(dist, 'init_process_group'),  # a group is there already, and stays
        patch.object(dist, 'destroy_process_group'),
        patch.object(sys, 'argv', [str(script), *map(str, argv)]),
        patch.dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2'),
    ):
        runpy.run_path(str(script), run_name='__main__')
    result = dict(ran=seen['ran'], parameters=digest(seen['model'].parameters()))
    return result | ({'ema': digest(seen['ema'].module.parameters())} if 'ema' in seen else {})


def _die(file):
    while not file.exists():
        time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGKILL)
