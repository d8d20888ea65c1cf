"""One of two gloo ranks, started by test_training.py: `python -m tests.faults.ranks STORE RANK OUT`.

In every scenario rank 0 alone makes an extra pass in the third step. Written is, for each step, which blocks dropped.
"""

import contextlib
import copy
import datetime
import json
import sys
import traceback

import torch
import torch.distributed as dist

from .observed import NETWORKS, observe

STEPS = 8
EXTRAS = ('no_grad', 'inference_mode', 'evaluation', 'copy')
SCENARIOS = [f'{kind} {extra}' for extra in EXTRAS for kind in NETWORKS]


def extra_pass(extra, model, x):
    if extra == 'copy':
        model = copy.deepcopy(model)
    contexts = {'no_grad': torch.no_grad, 'inference_mode': torch.inference_mode}
    training = model.training
    with contexts.get(extra, torch.no_grad)():
        if extra == 'evaluation':
            model.eval()
        model(x)
        if extra == 'evaluation':
            model.train(training)


def scenario(kind, extra):
    torch.manual_seed(0)  # the same weights
    case = NETWORKS[kind]('batch')
    torch.manual_seed(dist.get_rank() + 1)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    dropped = []
    for index in range(STEPS):
        if index == 2 and dist.get_rank() == 0:
            extra_pass(extra, case.model, x)
            case.train()
        step = observe(case, x)
        step.out.sum().backward()
        dropped.append([bool((drawn == 0).all()) for drawn in step.factors.values()])
    return {'dropped': dropped}


def main(store, rank, out):
    torch.set_num_threads(1)
    files = dist.FileStore(store, 2)
    results = {}
    for name in SCENARIOS:
        # A process group each: what hangs or fails in one leaves the others alone
        dist.init_process_group(
            'gloo',
            store=dist.PrefixStore(name, files),
            rank=int(rank),
            world_size=2,
            timeout=datetime.timedelta(seconds=30),
        )
        try:
            results[name] = scenario(*name.split())
        except Exception:
            results[name] = {'error': traceback.format_exc()[-2000:]}
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
    with open(out, 'w') as file:
        json.dump(results, file)


if __name__ == '__main__':
    main(*sys.argv[1:])
