"""One of two gloo ranks, started by test_distributed.py: `python ranks.py STORE RANK OUT`. Writes what it saw there."""

import datetime
import hashlib
import json
import sys
import traceback
import warnings

import timm
import torch
import torch.distributed as dist
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sd_resnet.convert import converted_blocks

STEPS = 6
NETS = {
    'sd_resnet18': dict(channels=(8, 8, 16, 16), zero_init_last=False),
    'sd_resnet20_cifar': dict(channels=(4, 8, 8), zero_init_last=False),
    'sd_vit_tiny_patch16_224': dict(img_size=32, embed_dim=32, depth=4, num_heads=2, drop_path_schedule='uniform'),
}


class StandIn(nn.BatchNorm2d):
    """Waits for the other ranks as SyncBatchNorm does, which refuses CPU tensors: statistics by all-reduce."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        with warnings.catch_warnings():  # deprecated from torch 2.15
            warnings.simplefilter('ignore')
            from torch.distributed.nn.functional import all_reduce

            moments = torch.stack([x.mean((0, 2, 3)), x.square().mean((0, 2, 3))])
            mean, square = all_reduce(moments) / dist.get_world_size()
        shape = (1, -1, 1, 1)
        normal = (x - mean.view(shape)) * torch.rsqrt(square - mean.square() + self.eps).view(shape)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(square - mean.square(), self.momentum)
        return normal * self.weight.view(shape) + self.bias.view(shape)


def put_stand_ins(model):
    """In place, so that names and values stay."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.__class__ = StandIn


def digest(tensors):
    return hashlib.sha256(b''.join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def create(name='sd_resnet18', **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10, drop_path_rate=0.7, **NETS[name], **kwargs)
    torch.manual_seed(dist.get_rank() + 1)  # as timm's train.py: every rank draws from a seed of its own
    return model


def record(net):
    """The decisions of every step, as they are drawn; a converted network's blocks draw one by one."""
    decisions = []
    if blocks := list(converted_blocks(net).values()):
        draws, draw_one = blocks[0].draws, blocks[0].draws.draw

        def recorded_one(block, x):
            p_l, decision = draw_one(block, x)
            decisions.append([decision])
            return p_l, decision

        draws.draw = recorded_one
        return decisions
    draw = net._draw_per_batch

    @torch.compiler.disable
    def recorded():
        decisions.append(draw())
        return list(decisions[-1])

    net._draw_per_batch = recorded
    return decisions


def train(
    name='sd_resnet18',
    accumulate=False,
    amp=False,
    checkpointing=False,
    compiled=False,
    stand_in=False,
    features=False,
    **kwargs,
):
    model = create(name, features_only=True, **kwargs) if features else create(name, **kwargs)
    net = model.model if features else model
    decisions = record(net)
    if checkpointing:
        net.set_grad_checkpointing()
    if stand_in:
        put_stand_ins(model)
    ema = ModelEmaV3(model, decay=0.5)
    ddp = DistributedDataParallel(torch.compile(model, backend='eager') if compiled else model)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def backward():
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            out = ddp(torch.randn(3, 3, 32, 32))
        sum(o.float().square().mean() for o in (out if features else [out])).backward()

    for _ in range(STEPS):
        optimizer.zero_grad()
        if accumulate:
            with ddp.no_sync():
                backward()
        backward()
        optimizer.step()
        ema.update(model)
    return dict(
        decisions=decisions, parameters=digest(model.parameters()), ema=digest(ema.module.parameters()), steps=STEPS
    )


def refusal():
    """Real SyncBatchNorm modules: the draw comes before the first of them runs."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(create(drop_path_sync=False)).train()
    messages = []
    for call in (model, model.forward_features, model.layer1, model.layer1[0]):
        try:
            call(torch.randn(2, 3 if call in (model, model.forward_features) else 64, 32, 32))
        except RuntimeError as error:
            messages.append(str(error))
    return dict(messages=messages)


def sharded(blocks, mode):
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh('cpu', (dist.get_world_size(),))
    model = create(drop_path_mode=mode)
    decisions = record(model)
    if blocks:
        for block in model.blocks():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    before = digest([p.full_tensor() for p in model.parameters()])
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.randn(3, 3, 32, 32)).square().mean().backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
    after = digest([p.full_tensor() for p in model.parameters()])
    assert before != after
    return dict(decisions=decisions, parameters=after)


SCENARIOS = {
    **{
        f'{name} {mode} {flag}'.strip(): (
            lambda name=name, mode=mode, flag=flag: train(name, drop_path_mode=mode, **({flag: True} if flag else {}))
        )
        for name in ('sd_resnet18', 'sd_resnet20_cifar')
        for mode in ('batch', 'row', 'subset')
        for flag in ('', 'accumulate', 'amp', 'checkpointing', 'compiled', 'features')
    },
    **{
        f'converted {mode} {flag}'.strip(): (
            lambda mode=mode, flag=flag: train(
                'sd_vit_tiny_patch16_224', drop_path_mode=mode, checkpointing=flag == 'checkpointing'
            )
        )
        for mode in ('batch', 'subset')
        for flag in ('', 'checkpointing')
    },
    'unsynchronised': lambda: train(drop_path_sync=False),
    'stand-in': lambda: train(stand_in=True),
    'stand-in accumulate': lambda: train(stand_in=True, accumulate=True),
    'stand-in subset': lambda: train(stand_in=True, drop_path_mode='subset'),
    'refusal': refusal,
    **{
        f'fully_shard {"blocks" if blocks else "whole"} {mode}': (lambda b=blocks, m=mode: sharded(b, m))
        for blocks in (True, False)
        for mode in ('batch', 'row', 'subset')
    },
}


def main(store, rank, out):
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group('gloo', init_method=f'file://{store}', rank=int(rank), world_size=2, timeout=timeout)
    results = {}
    for scenario, run in SCENARIOS.items():
        torch._dynamo.reset()
        try:
            results[scenario] = run()
        except Exception:
            results[scenario] = dict(error=traceback.format_exc())
        with open(out, 'w') as file:
            json.dump(results, file)
    dist.destroy_process_group()


if __name__ == '__main__':
    main(*sys.argv[1:])
