"""torch.distributed.checkpoint, which loads in place, and FSDP2 on one rank."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from .pairs import (
    CONVERTED_RESNET,
    DROPPING,
    MODES,
    NAMES,
    RATE,
    assert_dropped,
    assert_same_weights,
    evaluate,
    pair,
    sd_net,
    timm_net,
    train,
)

pytestmark = pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')
ALL = [*NAMES, CONVERTED_RESNET]
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def blank(model):
    """Values that no checkpoint holds."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.fill_(3)
    return model


def by_load(model, folder):
    """The usual lines: the state dict's own tensors are filled, which is all that happens to the model."""
    dcp.load({'model': model.state_dict()}, checkpoint_id=folder)


def by_load_and_set(model, folder):
    state = {'model': get_model_state_dict(model)}
    dcp.load(state, checkpoint_id=folder)
    set_model_state_dict(model, state['model'])


def by_copy(model, folder):
    """A file made of the checkpoint, and a loop of one's own."""
    dcp_to_torch_save(folder, folder / 'whole.pt')
    own = model.state_dict()
    with torch.no_grad():
        for key, value in torch.load(folder / 'whole.pt')['model'].items():
            own[key].copy_(value)


def by_full_state_dict(model, folder):
    dcp_to_torch_save(folder, folder / 'whole.pt')
    set_model_state_dict(model, torch.load(folder / 'whole.pt')['model'], options=FULL)


def by_partial_update(model, folder):
    dcp_to_torch_save(folder, folder / 'whole.pt')
    state = model.state_dict()
    state.update(torch.load(folder / 'whole.pt')['model'])
    model.load_state_dict(state)


@pytest.mark.parametrize(
    ('name', 'load'),
    [
        *(('resnet18', load) for load in (by_load_and_set, by_copy, by_full_state_dict, by_partial_update)),
        *((name, by_load) for name in ALL),
    ],
)
def test_any_checkpoint_goes_into_any_network(tmp_path, name, load):
    """timm's into ours, ours into timm's, and from one rate to another."""
    theirs = timm_net(name)
    ours = sd_net(name, RATE, theirs.state_dict())
    expected = evaluate(theirs)
    for number, (source, target) in enumerate(
        [(theirs, sd_net(name, RATE)), (ours, timm_net(name)), (ours, sd_net(name, 0.3))]
    ):
        folder = tmp_path / str(number)
        dcp.save({'model': source.state_dict()}, checkpoint_id=folder)
        load(blank(target), folder)
        assert_same_weights(target, source)
        assert torch.equal(evaluate(target), expected)


@pytest.mark.parametrize('name', NAMES)
def test_a_run_begun_with_timms_network_goes_on_with_ours(tmp_path, name):
    """Weights and the optimizer's state; parameters are paired by their names."""

    def sgd(model):
        return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    theirs = timm_net(name)
    optimizer = sgd(theirs)
    train(theirs, optimizer=optimizer)
    weights, moments = get_state_dict(theirs, optimizer)
    dcp.save({'model': weights, 'optimizer': moments}, checkpoint_id=tmp_path)
    plain = train(theirs, optimizer=optimizer)
    for rate in (0.0, RATE):
        ours = sd_net(name, rate)
        own = sgd(ours)
        weights, moments = get_state_dict(ours, own)
        state = {'model': weights, 'optimizer': moments}
        dcp.load(state, checkpoint_id=tmp_path)
        set_state_dict(ours, own, model_state_dict=state['model'], optim_state_dict=state['optimizer'])
        losses = train(ours, optimizer=own)
        if rate:
            assert_dropped(losses, plain, ours)
        else:
            assert losses == plain
            assert_same_weights(ours, theirs)


@pytest.fixture(scope='module')
def mesh():
    pytest.importorskip('torch.distributed.fsdp', reason='this torch has no distributed package')
    if not hasattr(dist.fsdp, 'fully_shard'):
        pytest.skip('FSDP2 is not public in this torch')
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh('cpu', (1,))
    dist.destroy_process_group()


def shard(model, mesh):
    """As networks are usually sharded, block by block, then the rest; computes in bfloat16 where a CPU can."""
    has_batchnorm = any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    policy = dist.fsdp.MixedPrecisionPolicy(param_dtype=None if has_batchnorm else torch.bfloat16)
    for module in list(model.modules()):
        if hasattr(module, 'drop_path') or hasattr(module, 'drop_path1'):
            dist.fsdp.fully_shard(module, mesh=mesh, mp_policy=policy)
    return dist.fsdp.fully_shard(model, mesh=mesh, mp_policy=policy)


def train_sharded(model):
    return train(model, forward=lambda x: model(x).float())


def whole(model):
    return get_model_state_dict(model, options=FULL)


@pytest.mark.parametrize('name', ALL)
def test_a_sharded_network_trains_as_timms(mesh, name):
    theirs, ours = (shard(model, mesh) for model in pair(name))
    assert train_sharded(ours) == train_sharded(theirs)
    assert_same_weights(whole(ours), whole(theirs))
    assert torch.equal(evaluate(ours), evaluate(theirs))


@pytest.mark.parametrize(('name', 'mode'), [*DROPPING, *((CONVERTED_RESNET, mode) for mode in MODES)])
def test_a_sharded_network_drops_and_is_saved_for_timms(mesh, tmp_path, name, mode):
    theirs, ours = (shard(model, mesh) for model in pair(name, RATE, drop_path_mode=mode))
    losses = train_sharded(ours)
    assert all(parameter.grad is not None for parameter in ours.parameters())
    assert_dropped(losses, train_sharded(theirs), ours)
    dcp.save({'model': ours.state_dict()}, checkpoint_id=tmp_path)
    by_load(blank(theirs), tmp_path)
    assert_same_weights(whole(theirs), whole(ours))
    assert torch.equal(evaluate(theirs), evaluate(ours))
    plain = timm_net(name)
    by_load(plain, tmp_path)
    assert_same_weights(plain, whole(ours))


@pytest.mark.parametrize('name', NAMES)
def test_a_network_without_data_is_sharded_then_filled(mesh, name):
    """How large networks begin: nothing is allocated before each rank knows its part."""
    theirs = timm_net(name)
    with torch.device('meta'):
        ours = sd_net(name, RATE)
    shard(ours, mesh).to_empty(device='cpu')
    set_model_state_dict(ours, theirs.state_dict(), options=FULL)
    shard(theirs, mesh)
    assert torch.equal(evaluate(ours), evaluate(theirs))
    assert_dropped(train_sharded(ours), train_sharded(theirs), ours)
