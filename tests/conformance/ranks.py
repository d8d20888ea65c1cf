"""What the ranks of `pair.py` are asked to do: trainings, sharded and not, and checkpoints. Nothing of pytest here."""

import hashlib
import warnings

import timm
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.fsdp
from timm.layers import DropPath
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.nn.parallel import DistributedDataParallel

import sd_resnet  # noqa: F401

from .pair import join

STEPS = 6
SHARDS = hasattr(torch.distributed.fsdp, 'fully_shard')  # from torch 2.6, and not on a CPU before
RATE = 0.7
SIZES = {
    'resnet18': dict(channels=(8, 8, 16, 16), zero_init_last=False),
    'resnet20_cifar': dict(channels=(4, 8, 8), zero_init_last=False),
    'vit_tiny_patch16_224': dict(img_size=32, embed_dim=32, depth=4, num_heads=2),
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


def create(name, **kwargs):
    """The same network on every rank, at a uniform rate where it is one of ours."""
    torch.manual_seed(0)
    if name.startswith('sd_'):
        kwargs = dict(drop_path_rate=RATE, drop_path_schedule='uniform') | kwargs
    model = timm.create_model(name, num_classes=10, **SIZES[name.removeprefix('sd_')], **kwargs)
    if dist.is_initialized():
        torch.manual_seed(dist.get_rank() + 1)  # as timm's train.py: every rank draws from a seed of its own
    return model


def drop_paths_of(model):
    return [module for module in model.modules() if isinstance(module, DropPath)]


def blocks_of(model):
    return [module for module in model.modules() if any(isinstance(child, DropPath) for child in module.children())]


def watch(model):
    """The numbers of the blocks that were not dropped, in a list that grows with every step.

    Seen from outside, by this rank's gradients, which are zero where a block was dropped: nothing is known here of how
    a network draws, and compiled graphs stay whole. Of sharded weights no rank has gradients of its own; there the
    branch's first layer tells that it runs.
    """
    ran = []
    for index, block in enumerate(blocks_of(model)):
        layers = (module for module in block.modules() if module is not block)
        layer = next(module for module in layers if list(module.parameters(recurse=False)))
        if hasattr(layer.weight, 'full_tensor'):
            layer.register_forward_pre_hook(lambda layer, args, index=index: ran.append(index))
        else:
            layer.weight.register_hook(lambda gradient, index=index: ran.append(index) if gradient.any() else None)
    return ran


def images():
    return torch.randn(3, 3, 32, 32)


def fit(model, wrapped, accumulate=False, amp=False, extra=False, ema=None):
    """A few steps; which blocks ran in each, the last block's p_l there, and what became of the parameters.

    `extra`: rank 0 looks at another mini-batch before each step, which is no business of the other's.
    """
    ran, steps, p_l, last = watch(model), [], [], drop_paths_of(model)[-1]
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)

    def backward():
        with torch.autocast('cpu', torch.bfloat16, enabled=amp):
            out = wrapped(images())
        sum(o.float().square().mean() for o in (out if isinstance(out, list) else [out])).backward()

    for _ in range(STEPS):
        if extra and dist.get_rank() == 0:
            with torch.no_grad():
                model(images())
        ran.clear()
        optimizer.zero_grad()
        if accumulate:
            with wrapped.no_sync():
                backward()
        backward()
        steps.append(ran[:])
        p_l.append(last.p_l)
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        if ema is not None:
            ema.update(model)
    return dict(blocks=len(blocks_of(model)), ran=steps, p_l=p_l, parameters=digest(whole(model.parameters())))


def train(
    name, checkpointing=False, compiled=False, stand_in=False, accumulate=False, amp=False, extra=False, **kwargs
):
    model = create(name, **kwargs)
    if checkpointing:
        (model.model if kwargs.get('features_only') else model).set_grad_checkpointing()
    if stand_in:
        put_stand_ins(model)
    ema = ModelEmaV3(model, decay=0.5)
    ddp = DistributedDataParallel(torch.compile(model, backend='eager') if compiled else model)
    return fit(model, ddp, accumulate, amp, extra, ema) | dict(ema=digest(ema.module.parameters()))


def train_with_a_newcomer(name, store, **kwargs):
    """Rank 1 fails and a newcomer takes its place, in a new process group: torchrun's elastic training."""
    model, rank = create(name, **kwargs), dist.get_rank()
    before = fit(model, DistributedDataParallel(model))
    dist.destroy_process_group()
    join(store, rank)
    if rank == 1:
        model = create(name, **kwargs)
    return [before, fit(model, DistributedDataParallel(model))]


def refusals(name):
    """Real SyncBatchNorm modules: the draw comes before the first of them runs.

    A stage alone shares no draw, nor does a pass without gradients, which one rank may make alone.
    """
    messages = []
    for sync in (False, True):
        model = nn.SyncBatchNorm.convert_sync_batchnorm(create(name, drop_path_sync=sync)).train()
        alone = [(model.layer1, 8), (model.layer1[0], 8)]
        blind = torch.no_grad()(model.forward)  # as of a mean teacher, which stays in training mode
        for call, channels in [(blind, 3), *alone] if sync else [(model, 3), (model.forward_features, 3), *alone]:
            try:
                call(torch.randn(2, channels, 32, 32))
            except RuntimeError as error:
                messages.append(str(error))
    return messages


def whole(tensors):
    """Sharded tensors as whole ones."""
    return [tensor.full_tensor() if hasattr(tensor, 'full_tensor') else tensor for tensor in tensors]


def shard(model, blocks=True):
    """In place, where there are ranks."""
    if not dist.is_initialized() or not SHARDS:
        return model
    fully_shard = torch.distributed.fsdp.fully_shard
    mesh = dist.init_device_mesh('cpu', (dist.get_world_size(),))
    for block in blocks_of(model) if blocks else []:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train_sharded(name, blocks, **kwargs):
    model = shard(create(name, **kwargs), blocks)
    before = digest(whole(model.parameters()))
    result = fit(model, model)
    assert result['parameters'] != before
    return result


@torch.no_grad()
def logits(model):
    """A digest of what it computes in evaluation."""
    return digest([model.eval()(torch.linspace(-2, 2, 2 * 3 * 32 * 32).view(2, 3, 32, 32))])


def save_distributed(folder, name, **kwargs):
    """Train and save, each rank its shards; what it computes."""
    model = shard(create(name, **kwargs))
    torch.manual_seed(1)  # the same images on every rank: the statistics of BatchNorm are in no shard
    fit(model, model)
    dcp.save(model.state_dict(), checkpoint_id=folder)
    return logits(model)


def load_distributed(folder, name, **kwargs):
    """Load in place, as `dcp.load` does; what it computes."""
    model = shard(create(name, **kwargs))
    dcp.load(model.state_dict(), checkpoint_id=folder)
    return logits(model)


def load_whole(path, name, broadcast, **kwargs):
    """A whole state dict into shards, from every rank's copy or from rank 0's; what it computes."""
    model = shard(create(name, **kwargs))
    state_dict = torch.load(path, weights_only=True) if not broadcast or dist.get_rank() == 0 else {}
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
    set_model_state_dict(model, state_dict, options=options)
    return logits(model)
