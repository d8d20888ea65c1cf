"""torch-pruning: channels are taken out of every layer that a graph of autograd's nodes ties together."""

import pytest
import torch
from timm.models.vision_transformer import Attention

pytest.importorskip('torch_pruning', reason='torch_pruning is not installed')

import torch_pruning as tp

from .pairs import (
    CLASSES,
    CONVERTED_RESNET,
    DROPPING,
    MODES,
    NAMES,
    RATE,
    assert_dropped,
    assert_same_weights,
    evaluate,
    images,
    pair,
    train,
)

pytestmark = pytest.mark.filterwarnings('ignore:Unwrapped parameters detected')
ALL = [*NAMES, CONVERTED_RESNET]


def pruned(model, importance=None, steps=1, **options):
    """Half of all channels, but for the classes; an attention's heads are named, as the tool's own examples do."""
    heads = {}
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused_attn = False
            heads[module.qkv] = module.num_heads
    ignored = [module for module in model.modules() if getattr(module, 'out_features', None) == CLASSES]
    pruner = tp.pruner.BasePruner(
        model,
        images(2),
        importance or tp.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        iterative_steps=steps,
        ignored_layers=ignored,
        num_heads=heads,
        **options,
    )
    for _ in range(steps):
        pruner.step()
    for module in model.modules():
        if isinstance(module, Attention):
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            module.attn_dim = module.num_heads * module.head_dim
    return model


def shapes(model):
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(('name', 'training'), [('resnet18', False), *((name, True) for name in ALL)])
def test_the_same_channels_go_as_in_timms(name, training):
    """Pruned as it is in evaluation, and between epochs of a training that drops."""
    theirs, ours = pair(name, RATE)
    before = shapes(ours)
    for model in (theirs, ours):
        pruned(model.train(training), steps=2)
    assert shapes(ours) != before
    assert_same_weights(ours, theirs)
    assert torch.equal(evaluate(ours), evaluate(theirs))


@pytest.mark.parametrize('name', ALL)
def test_a_pruned_network_is_tuned_as_timms(name):
    theirs, ours = (pruned(model) for model in pair(name))
    assert train(ours) == train(theirs)
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(('name', 'mode'), [*DROPPING, *((CONVERTED_RESNET, mode) for mode in MODES)])
def test_a_pruned_network_drops_and_is_saved_whole(tmp_path, name, mode):
    """Its shapes are no model's: the module itself is pickled."""
    theirs, ours = (pruned(model) for model in pair(name, RATE, drop_path_mode=mode))
    losses, plain = train(ours), train(theirs)
    assert_dropped(losses, plain, ours)
    ours.zero_grad()
    torch.save(ours, tmp_path / 'net.pt')
    loaded = torch.load(tmp_path / 'net.pt', weights_only=False)
    assert_same_weights(loaded, ours)
    assert torch.equal(evaluate(loaded), evaluate(ours))
    assert train(loaded) == train(ours)


@pytest.mark.parametrize('name', ['resnet18', 'convnext_atto', CONVERTED_RESNET])
def test_importance_by_gradients_is_timms_where_nothing_drops(name):
    """Taylor importance accumulates gradients, then prunes."""
    importance = tp.importance.GroupTaylorImportance()
    nets = []
    for model in pair(name):
        model.train()(images()).square().mean().backward()
        nets.append(pruned(model, importance))
    assert_same_weights(nets[1], nets[0])


def test_a_single_group_is_pruned_and_its_dependencies_are_timms():
    """The low-level interface: ask for one convolution's channels, get all that must go with them."""
    theirs, ours = pair('resnet18', RATE)
    listed = []
    for model in (theirs, ours):
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=images(2))
        group = graph.get_pruning_group(model.layer1[0].conv2, tp.prune_conv_out_channels, idxs=[1, 3, 6])
        listed.append([str(dependency) for dependency, _ in group])
        assert graph.check_pruning_group(group)
        group.prune()
    assert listed[1] == listed[0]
    assert_same_weights(ours, theirs)
    assert torch.equal(evaluate(ours), evaluate(theirs))
