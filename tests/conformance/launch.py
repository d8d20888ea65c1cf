"""One rank of timm's unmodified train.py on a CPU, several runs after another: `python launch.py TRAIN.PY RUNS OUT`.

timm passes device_ids=[cpu] to DistributedDataParallel, which refuses that: it is dropped here, and nothing else is
changed. What a test wants to know is recorded on the way. RUNS is JSON, a list of {"argv", "port", "stand_in"}.
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))  # beside this file
from ranks import digest, put_stand_ins

seen: dict = {}


def install(stand_in):
    """Hooks for one run."""
    from timm.utils import ModelEmaV3

    from sd_resnet.converted_block import Draws
    from sd_resnet.resnet_base import StochasticDepthNet

    ddp_init, ema_init, draw = DistributedDataParallel.__init__, ModelEmaV3.__init__, StochasticDepthNet._draw_per_batch
    draw_alone = Draws.draw

    def on_cpu(self, module, device_ids=None, *args, **kwargs):
        if next(module.parameters()).device.type == 'cpu':
            device_ids = None
        if stand_in:
            put_stand_ins(module)
        seen['model'] = module
        ddp_init(self, module, device_ids, *args, **kwargs)

    def with_ema(self, *args, **kwargs):
        ema_init(self, *args, **kwargs)
        seen['ema'] = self

    @torch.compiler.disable
    def recorded(self):
        decisions = draw(self)
        seen['decisions'].append(decisions)
        return list(decisions)

    @torch.compiler.disable
    def recorded_alone(self, block, x):
        p_l, decision = draw_alone(self, block, x)
        if isinstance(decision, bool):
            seen['decisions'].append(decision)
        return p_l, decision

    DistributedDataParallel.__init__, ModelEmaV3.__init__ = on_cpu, with_ema
    StochasticDepthNet._draw_per_batch, Draws.draw = recorded, recorded_alone

    def remove():
        DistributedDataParallel.__init__, ModelEmaV3.__init__ = ddp_init, ema_init
        StochasticDepthNet._draw_per_batch, Draws.draw = draw, draw_alone

    return remove


def main(script, runs, out):
    torch.set_num_threads(1)
    results = []
    sys.path.insert(0, str(Path(script).parent))  # a script's own folder comes first: the clone's timm
    for run in json.loads(Path(runs).read_text()):
        os.environ['MASTER_PORT'] = str(run['port'])
        torch._dynamo.reset()
        seen.clear()
        seen['decisions'] = []
        remove = install(run['stand_in'])
        sys.argv = [script, *run['argv']]
        try:
            runpy.run_path(script, run_name='__main__')
        finally:
            remove()
        if dist.is_initialized():
            dist.destroy_process_group()
        result = {'decisions': seen['decisions'], 'parameters': digest(seen['model'].parameters())}
        if 'ema' in seen:
            result['ema'] = digest(seen['ema'].module.parameters())
        results.append(result)
        Path(out).write_text(json.dumps(results))


if __name__ == '__main__':
    main(*sys.argv[1:])
