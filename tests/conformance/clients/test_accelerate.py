"""accelerate: loading into empty networks, offloading, and its training loop."""

import pytest
import torch

pytest.importorskip('accelerate', reason='accelerate is not installed')

import accelerate
from accelerate import Accelerator
from accelerate.utils import infer_auto_device_map
from safetensors.torch import save_file
from torch.utils.data import DataLoader, TensorDataset

from .pairs import (
    DROPPING,
    NAMES,
    RATE,
    assert_dropped,
    assert_same_weights,
    evaluate,
    images,
    labels,
    pair,
    sd_net,
    timm_net,
    train,
)


@pytest.fixture(autouse=True)
def _fresh_state():
    """accelerate keeps what the first `Accelerator` of a process decided."""
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


def two_parts(model):
    """A map as for a network that is too large: what comes first in memory, the rest on the disk."""
    names = [name for name, child in model.named_children() if next(child.parameters(), None) is not None]
    own = [name for name, _ in model.named_parameters(recurse=False)]  # a ViT's position embedding
    return {**dict.fromkeys(own + names[:2], 'cpu'), **dict.fromkeys(names[2:], 'disk')}


@pytest.mark.parametrize(
    ('name', 'sharded'), [('resnet18', True), ('vit_tiny_patch16_224', False), ('convnext_atto', False)]
)
def test_a_checkpoint_of_either_is_loaded_into_the_other(tmp_path, name, sharded):
    """Whoever starts from timm's weights, and whoever gives a trained network away."""
    theirs = timm_net(name)
    ours = sd_net(name, RATE, theirs.state_dict())
    ways = (theirs, sd_net(name, RATE)), (ours, timm_net(name)), (ours, sd_net(name, 0.3))
    for number, (source, target) in enumerate(ways):
        folder = tmp_path / str(number)
        folder.mkdir()
        if sharded:
            size = sum(p.nbytes for p in source.parameters())
            Accelerator(cpu=True).save_model(source, folder, max_shard_size=f'{size // 2000}KB')
            assert len(list(folder.glob('*.safetensors'))) > 1
            checkpoint = folder
        else:
            checkpoint = folder / 'model.safetensors'
            save_file(source.state_dict(), checkpoint)
        with torch.no_grad():
            for tensor in target.state_dict().values():
                tensor.zero_()
        accelerate.load_checkpoint_in_model(target, str(checkpoint))
        assert_same_weights(target, source)
        assert torch.equal(evaluate(target), evaluate(theirs))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.filterwarnings('ignore:The following device_map keys do not match any submodules')
def test_an_empty_network_is_filled_and_dispatched(tmp_path, name):
    theirs = timm_net(name)
    torch.save(theirs.state_dict(), tmp_path / 'weights.bin')
    with accelerate.init_empty_weights(include_buffers=False):
        ours = sd_net(name, RATE)
    assert next(ours.parameters()).is_meta
    folder = tmp_path / 'offloaded'
    filled = accelerate.load_checkpoint_and_dispatch(
        ours, str(tmp_path / 'weights.bin'), two_parts(ours), offload_folder=folder, offload_buffers=True
    )
    assert list(folder.iterdir())
    assert torch.equal(evaluate(filled), evaluate(theirs))


@pytest.mark.parametrize(
    ('name', 'how'),
    [('resnet18', 'cpu_offload'), ('resnet18', 'disk_offload'), *((name, 'dispatch_model') for name in NAMES)],
)
@pytest.mark.filterwarnings('ignore:The following device_map keys do not match any submodules')
def test_an_offloaded_network_evaluates_as_timms(tmp_path, name, how):
    theirs, ours = pair(name, RATE)
    keys = list(ours.state_dict())
    for model, folder in ((theirs, tmp_path / 'theirs'), (ours, tmp_path / 'ours')):
        if how == 'cpu_offload':
            accelerate.cpu_offload(model, execution_device='cpu')
        elif how == 'disk_offload':
            accelerate.disk_offload(model, folder, execution_device='cpu')
        else:
            accelerate.dispatch_model(model, two_parts(model), main_device='cpu', offload_dir=folder)
    assert any(parameter.is_meta for parameter in ours.parameters())
    assert torch.equal(evaluate(ours), evaluate(theirs))
    assert list(ours.state_dict()) == keys


@pytest.mark.parametrize('name', NAMES)
def test_an_automatic_map_splits_between_blocks_as_timms(name):
    """A block that is not to be split is named by its class."""
    theirs, ours = pair(name, RATE)
    limit = {'cpu': sum(p.nbytes for p in ours.parameters()) // 2, 'disk': '1GB'}
    maps = []
    for model in (theirs, ours):
        blocks = [type(m).__name__ for m in model.modules() if hasattr(m, 'drop_path') or hasattr(m, 'drop_path1')]
        maps.append(infer_auto_device_map(model, limit, no_split_module_classes=list(set(blocks))))
    assert {k: v for k, v in maps[1].items() if 'drop_path' not in k} == maps[0]
    assert set(maps[1].values()) == {'cpu', 'disk'}


def dispatched(model):
    return accelerate.dispatch_model(model, {'': 'cpu'}, main_device='cpu', force_hooks=True)


@pytest.mark.parametrize('name', NAMES)
def test_a_dispatched_network_trains_as_timms(name):
    """Adapters are trained on networks that a device map has spread: each module has a hook then."""
    theirs, ours = (dispatched(model) for model in pair(name))
    assert train(ours) == train(theirs)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(('name', 'mode'), DROPPING)
def test_a_dispatched_network_drops(name, mode):
    theirs, ours = pair(name, RATE, drop_path_mode=mode)
    assert_dropped(train(dispatched(ours)), train(theirs), ours)


def run(model, precision='no', saved=None):
    """Epochs of three batches, gradients accumulated over two; saves, goes on, goes back and goes on again."""
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(TensorDataset(images(18), labels(18)), batch_size=6)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
    prepared, optimizer, loader, schedule = accelerator.prepare(model.train(), optimizer, loader, schedule)
    assert accelerator.unwrap_model(prepared) is model
    torch.manual_seed(1)

    def epoch():
        losses = []
        for x, y in loader:
            with accelerator.accumulate(prepared):
                loss = torch.nn.functional.cross_entropy(prepared(x), y)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(prepared.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    losses = epoch()
    if saved is not None:
        accelerator.save_state(saved)
        losses += epoch()
        accelerator.load_state(saved)
        losses += epoch()
    return losses


@pytest.mark.parametrize(('name', 'precision'), [*((name, 'no') for name in NAMES), ('resnet18', 'bf16')])
def test_a_prepared_network_trains_as_timms(name, precision):
    theirs, ours = pair(name)
    assert run(ours, precision) == run(theirs, precision)
    assert_same_weights(ours, theirs)
    assert torch.equal(evaluate(ours), evaluate(theirs))


@pytest.mark.parametrize(('name', 'mode'), DROPPING)
def test_a_saved_state_goes_on_with_the_same_draws(tmp_path, name, mode):
    """accelerate saves the random generators' states: a resumed run must draw what the unbroken one drew."""
    theirs, ours = pair(name, RATE, drop_path_mode=mode)
    losses = run(ours, saved=tmp_path)
    assert losses[3:6] == losses[6:]
    assert_dropped(losses[:3], run(theirs), ours)
    assert list(ours.state_dict()) == list(theirs.state_dict())
