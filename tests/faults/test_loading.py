"""Weights that go in and out by whatever call: the test-time function must come along, or an error say why not.

Faults 1 to 6 of the first edition, where these tests were seen red (commit 495752d).
"""

import copy
import operator

import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
from timm.layers import convert_splitbn_model
from timm.models import load_checkpoint
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import weight_norm

import sd_resnet

from ..conftest import NARROW, images, make
from .observed import VIT

PLAIN = 'resnet18'
PROBS = tuple(1 - 0.5 * l / 8 for l in range(1, 9))  # of the first edition's `sd_resnet18`


def block_names(model):
    return [name for name, module in model.named_modules() if hasattr(module, 'conv2') and hasattr(module, 'bn2')]


def last_norm(model, name):
    block = model.get_submodule(name)
    return getattr(block, 'bn3', block.bn2)


def evaluate(model, x):
    with torch.no_grad():
        return model.eval()(x)


def first_edition(model, probs=PROBS):
    """What the first edition saved of a network whose branches it multiplied by `probs` in evaluation."""
    return {
        **{k: v.clone() for k, v in model.state_dict().items()},
        **{f'{n}.drop_path.survival_prob': torch.tensor(p) for n, p in zip(block_names(model), probs) if p < 1},
    }


def shortcut_and_share_of_branch(model, probs=PROBS):
    """timm's network that computes what such a state dict means."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in zip(block_names(model), probs):
            norm = last_norm(model, name)
            norm.weight.mul_(p)
            norm.bias.mul_(p)
    return model


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def plain_network(seed=1):
    torch.manual_seed(seed)
    return make(PLAIN)


# Faults 1 and 2: merged, filtered, distributed, in place


def updated(model, state, folder):
    merged = model.state_dict()
    merged.update(state)
    model.load_state_dict(merged)


def filtered(model, state, folder):
    own = model.state_dict()
    model.load_state_dict({k: v for k, v in state.items() if k in own and v.shape == own[k].shape}, strict=False)


def whole(model, state, folder):
    model.load_state_dict(state)


def assigned(model, state, folder):
    model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True)


def by_distributed_call(model, state, folder):
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True))


def merged_by_distributed_call(model, state, folder):
    merged = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    merged.update(state)
    set_model_state_dict(model, merged, options=StateDictOptions(full_state_dict=True))


def copied_in_place(model, state, folder):
    own = model.state_dict()
    for key, value in state.items():
        own[key].copy_(value)


def parameters_and_buffers_copied(model, state, folder):
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert own.keys() == state.keys()
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(state[key])


def distributed_checkpoint_in_place(model, state, folder):
    dcp.save(dict(state), checkpoint_id=folder)
    own = model.state_dict()
    dcp.load(own, checkpoint_id=folder)


def module_by_module(model, state, folder):
    for name, module in model.named_modules():
        own = {k.removeprefix(f'{name}.'): v for k, v in state.items() if k.rpartition('.')[0] == name}
        if own and not list(module.children()):
            module.load_state_dict(own)


def through_a_parent(model, state, folder):
    nn.ModuleDict({'backbone': model}).load_state_dict({f'backbone.{k}': v for k, v in state.items()})


WAYS = [
    updated,
    filtered,
    whole,
    assigned,
    by_distributed_call,
    merged_by_distributed_call,
    copied_in_place,
    parameters_and_buffers_copied,
    distributed_checkpoint_in_place,
    module_by_module,
    through_a_parent,
]


@pytest.mark.filterwarnings('ignore')  # torch.distributed's, about a single process
@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
def test_timms_weights_compute_the_same_by_whatever_call_they_are_loaded(way, tmp_path):
    """Fault 1: whoever merges a plain checkpoint into ours gets another function, and "All keys matched"."""
    plain, x = plain_network(), images(2)
    model = make('sd_resnet18', drop_path_rate=0.5)
    way(model, plain.state_dict(), tmp_path)
    assert torch.equal(evaluate(model, x), evaluate(plain, x))


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('way', WAYS, ids=lambda way: way.__name__)
def test_our_weights_compute_the_same_in_timms_network(way, tmp_path):
    """Fault 2: whoever takes our weights to timm's network, key by key, gets another function."""
    torch.manual_seed(1)
    model, x = make('sd_resnet18', drop_path_rate=0.5), images(2)
    plain = plain_network(seed=2)
    way(plain, model.state_dict(), tmp_path)
    assert torch.equal(evaluate(plain, x), evaluate(model, x))


@pytest.mark.parametrize('options', [{'drop_path_mode': 'subset'}, {'drop_path_rate': 0.9}], ids=str)
def test_the_mean_of_networks_of_different_rates_is_the_mean_of_timms(options):
    """Faults 1 and 2: an average of checkpoints, or of a teacher and a student, is taken key by key."""
    torch.manual_seed(1)
    first, second = make('sd_resnet18', drop_path_rate=0.2), make('sd_resnet18', **options)
    states = [model.state_dict() for model in (first, second)]
    mean = {k: (v + states[1][k]) / 2 if v.is_floating_point() else v for k, v in states[0].items()}
    plain, x = plain_network(), images(2)
    plain.load_state_dict(mean)
    for model in (first, second):
        model.load_state_dict(mean)
        assert torch.equal(evaluate(model, x), evaluate(plain, x))


@pytest.mark.parametrize('rescale', [None, 'train'])
@pytest.mark.parametrize('mode', ['batch', 'subset', 'row'])
def test_by_default_state_dict_and_evaluation_are_timms_bit_for_bit(mode, rescale):
    """Faults 1 and 2, at the root."""
    plain, x = plain_network(), images(2)
    options = {} if rescale is None else {'drop_path_rescale': rescale}
    model = make('sd_resnet18', drop_path_mode=mode, drop_path_rate=0.5, **options)
    assert [(k, v.shape, v.dtype) for k, v in model.state_dict().items()] == [
        (k, v.shape, v.dtype) for k, v in plain.state_dict().items()
    ]
    model.load_state_dict(plain.state_dict())
    assert torch.equal(evaluate(model, x), evaluate(plain, x))


# Fault 3: tools that put tensors in their places by name


@pytest.mark.parametrize('rescale', [None, 'test'])
def test_every_entry_of_the_state_dict_is_a_tensor_under_its_own_name(rescale):
    """Fault 3: accelerate reads `module.<name>` of each buffer, asks it for device and address, and crashed."""
    model = make('sd_resnet18', drop_path_rate=0.5, **({} if rescale is None else {'drop_path_rescale': rescale}))
    for name, saved in model.state_dict().items():
        tensor = operator.attrgetter(name)(model)
        assert isinstance(tensor, torch.Tensor), name
        assert (tensor.device, tensor.shape, tensor.dtype) == (saved.device, saved.shape, saved.dtype)
        assert tensor.data_ptr() == saved.data_ptr()
    names = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    assert names == model.state_dict().keys()


@pytest.mark.parametrize('rescale', [None, 'test'])
def test_tensors_that_are_taken_away_and_put_back_leave_the_function(rescale):
    """Fault 3: offloading swaps every tensor for one on the meta device, and back when a module runs."""
    model = make('sd_resnet18', drop_path_rate=0.5, **({} if rescale is None else {'drop_path_rescale': rescale}))
    x = images(2)
    expected = evaluate(model, x)
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is not None:
                    again = nn.Parameter if isinstance(tensor, nn.Parameter) else torch.Tensor.clone
                    setattr(module, name, again(tensor.detach().to('meta')))
                    setattr(module, name, again(tensor.detach().clone()))
    assert torch.equal(evaluate(model, x), expected)


@pytest.mark.parametrize('rescale', [None, 'test'])
@pytest.mark.parametrize('offload', [False, True], ids=['loaded', 'offloaded'])
def test_accelerate_loads_and_offloads(offload, rescale, tmp_path):
    """Fault 3: `'_Number' has no attribute 'device'`."""
    accelerate = pytest.importorskip('accelerate')
    options = {} if rescale is None else {'drop_path_rescale': rescale}
    torch.manual_seed(1)
    model, x = make('sd_resnet18', drop_path_rate=0.5, **options), images(2)
    expected = evaluate(model, x)
    if offload:
        accelerate.cpu_offload(model, execution_device=torch.device('cpu'))
        assert torch.equal(evaluate(model, x), expected)
        return
    torch.save(model.state_dict(), tmp_path / 'pytorch_model.bin')
    other = make('sd_resnet18', drop_path_rate=0.5, **options)
    accelerate.load_checkpoint_in_model(other, str(tmp_path / 'pytorch_model.bin'))
    assert torch.equal(evaluate(other, x), expected)


# Faults 4 and 5: test-time rescaling, with norms that are not plain and loaders that call differently


class Doubled(nn.Module):
    """Someone's own parametrization."""

    def forward(self, x):
        return 2 * x

    def right_inverse(self, x):
        return x / 2


class Shifted(nn.Module):
    """One with which a scaled weight needs more than a scaled parameter."""

    def forward(self, x):
        return x + 0.25

    def right_inverse(self, x):
        return x - 0.25


class OneWay(nn.Module):
    """One without a way back."""

    def forward(self, x):
        return x.sin() + 1


def normed(norm):
    weight_norm(norm, 'weight')


def pruned(norm):
    torch.manual_seed(3)
    prune.l1_unstructured(norm, 'weight', 0.5)


def pruned_bias(norm):
    prune.l1_unstructured(norm, 'bias', 0.5)


def doubled(norm):
    parametrize.register_parametrization(norm, 'weight', Doubled())
    parametrize.register_parametrization(norm, 'bias', Doubled())


def shifted(norm):
    parametrize.register_parametrization(norm, 'weight', Shifted())


def twice(norm):
    parametrize.register_parametrization(norm, 'weight', Doubled())
    parametrize.register_parametrization(norm, 'weight', Shifted())


NORMS = [normed, pruned, pruned_bias, doubled, shifted, twice]
REFUSABLE = [shifted, twice]  # their weights are not proportional to a parameter


def changed_norms(model, change):
    for name in block_names(model):
        change(last_norm(model, name))
    return model


def by_keyword(model, state):
    """As loaders do that call every module themselves."""
    errors, missing, unexpected = [], [], []

    def load(module, prefix=''):
        module._load_from_state_dict(
            state_dict=state,
            prefix=prefix,
            local_metadata={},
            strict=True,
            missing_keys=missing,
            unexpected_keys=unexpected,
            error_msgs=errors,
        )
        for name, child in module._modules.items():
            if child is not None:
                load(child, f'{prefix}{name}.')

    load(model)
    if errors:  # as `load_state_dict` does
        raise RuntimeError('\n'.join(errors))
    assert not missing


CALLS = {
    'strict': lambda model, state: model.load_state_dict(state),
    'not strict': lambda model, state: model.load_state_dict(state, strict=False),
    'assign': lambda model, state: model.load_state_dict({k: v.clone() for k, v in state.items()}, assign=True),
    'keyword': lambda model, state: by_keyword(model, dict(state)),
}
each_call = pytest.mark.parametrize('call', CALLS.values(), ids=CALLS)


@pytest.mark.parametrize('call', [CALLS['strict'], CALLS['keyword']], ids=['strict', 'keyword'])
@pytest.mark.parametrize('change', NORMS, ids=lambda change: change.__name__)
def test_a_last_norm_that_is_parametrised_or_pruned_is_rescaled_as_well(change, call):
    """Fault 4: under test-time rescaling its branches came out p_l times too small."""
    plain, x = changed_norms(plain_network(), change), images(2)
    model = changed_norms(make('sd_resnet18', drop_path_rescale='test', drop_path_rate=0.5), change)
    try:
        call(model, plain.state_dict())
    except RuntimeError as error:
        if change not in REFUSABLE or 'layer1.0' not in str(error):
            raise
        return
    close(evaluate(model, x), evaluate(plain, x))


@pytest.mark.parametrize('change', NORMS, ids=lambda change: change.__name__)
def test_the_rate_of_a_network_with_such_norms_can_change(change):
    """Fault 4, by the other way to rescale."""
    model, x = changed_norms(make('sd_resnet18', drop_path_rescale='test', drop_path_rate=0.5), change), images(2)
    expected = evaluate(model, x)
    for options in ({'rate': 0.2}, {'rescale': 'train'}, {'rescale': 'test', 'rate': 0.6}):
        try:
            model.set_drop_path(**options)
        except ValueError as error:
            if change not in REFUSABLE or 'drop_path_rescale' not in str(error):
                raise
        close(evaluate(model, x), expected)


def test_what_cannot_be_rescaled_is_refused_by_name():
    """Fault 4: a parametrization without a way back."""
    state = changed_norms(plain_network(), lambda norm: None).state_dict()
    model = make('sd_resnet18', drop_path_rescale='test', drop_path_rate=0.5)
    parametrize.register_parametrization(model.layer3[1].bn2, 'weight', OneWay(), unsafe=True)
    state['layer3.1.bn2.parametrizations.weight.original'] = state.pop('layer3.1.bn2.weight')
    with pytest.raises((RuntimeError, ValueError), match=r'layer3\.1'):
        model.load_state_dict(state)


@each_call
def test_split_norms_are_rescaled_in_all_their_parts(call):
    """Fault 4: the statistics of augmented images have norms of their own, which training uses."""
    plain = convert_splitbn_model(plain_network(), 2)
    model = convert_splitbn_model(make('sd_resnet18', drop_path_rescale='test', drop_path_rate=0.5), 2)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if 'aux_bn' in name:
                parameter.add_(0.1)
    call(model, plain.state_dict())
    plain, model, x = plain.double(), model.double(), images(4, dtype=torch.float64)
    close(evaluate(model, x), evaluate(plain, x))
    model.set_drop_path(rate=0)
    close(model.train()(x), plain.train()(x))


@each_call
@pytest.mark.parametrize('options', [{}, {'drop_path_rescale': 'test'}], ids=['default', 'test'])
def test_plain_weights_load_by_every_call(options, call):
    """Fault 5: a loader that names the arguments crashed."""
    plain, x = plain_network(), images(2)
    model = make('sd_resnet18', drop_path_rate=0.5, **options)
    state = plain.state_dict()
    call(model, state)
    close(evaluate(model, x), evaluate(plain, x))
    assert state.keys() == plain.state_dict().keys()  # the caller's dictionary is the caller's


@pytest.mark.parametrize('build', ['converted', 'ramp'])
def test_converted_networks_and_ramps_load_by_keyword(build):
    """Fault 5, where the network or a ramp has a loading of its own."""
    plain, x = plain_network(), images(2)
    if build == 'converted':
        model = plain_network(seed=2)
        sd_resnet.convert(model, 0.4, 'uniform', input_size=(3, 32, 32))
    else:
        model = make('sd_resnet18', drop_path_rate=0.5, drop_path_ramp=('warmup', 4), drop_path_rescale='train')
    state = dict(plain.state_dict())
    errors = []
    for name, module in model.named_modules():
        prefix = f'{name}.' if name else ''
        module._load_from_state_dict(
            state_dict=state,
            prefix=prefix,
            local_metadata={},
            strict=False,
            missing_keys=[],
            unexpected_keys=[],
            error_msgs=errors,
        )
    assert not errors
    assert torch.equal(evaluate(model, x), evaluate(plain, x))


# State dicts of the first edition


def own(**options):
    return lambda: make('sd_resnet18', **{'drop_path_rate': 0.3, **options})


def converted_resnet():
    torch.manual_seed(5)
    model = make(PLAIN)
    sd_resnet.convert(model, 0.2, input_size=(3, 32, 32))
    return model


TARGETS = {
    'default': own(),
    'without dropping': own(drop_path_rate=0),
    'with a ramp': own(drop_path_ramp=('warmup', 5), drop_path_rescale='train'),
    'test': own(drop_path_rescale='test'),
    'test, of the same rates': own(drop_path_rescale='test', drop_path_rate=0.5),
    'test, without dropping': own(drop_path_rescale='test', drop_path_rate=0),
    'converted': converted_resnet,
}


@each_call
@pytest.mark.parametrize('target', TARGETS.values(), ids=TARGETS)
def test_a_checkpoint_of_the_first_edition_computes_the_same_in_every_network(target, call):
    """Faults 1 to 5: it states what its branches are multiplied by, and nobody may overlook that."""
    plain, x = plain_network(), images(2)
    expected = evaluate(shortcut_and_share_of_branch(plain), x)
    state = first_edition(plain)
    keys = [*state]
    model = target()
    call(model, state)
    close(evaluate(model, x), expected)
    assert [*state] == keys
    # and what that network saves computes the same once more
    again = target()
    again.load_state_dict(model.state_dict())
    assert torch.equal(evaluate(again, x), evaluate(model, x))


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.', 'module._orig_mod.'])
@pytest.mark.parametrize('name', ['sd_resnet18', 'own, test'])
def test_a_checkpoint_file_of_the_first_edition_computes_the_same(name, prefix, tmp_path):
    """Faults 1 and 6: by timm's `checkpoint_path`, saved from a wrapper or not."""
    plain, x = plain_network(), images(2)
    state = first_edition(plain)
    torch.save({'state_dict': {f'{prefix}{k}': v for k, v in state.items()}}, tmp_path / 'old.pth.tar')
    options = {'drop_path_rescale': 'test', 'drop_path_rate': 0.2} if 'test' in name else {}
    model = timm.create_model(
        'sd_resnet18', num_classes=10, checkpoint_path=str(tmp_path / 'old.pth.tar'), **NARROW, **options
    )
    close(evaluate(model, x), evaluate(shortcut_and_share_of_branch(plain), x))


def test_a_file_of_the_first_edition_computes_the_same_as_pretrained_weights(tmp_path):
    """Fault 1: by timm's `pretrained=True`."""
    plain, x = plain_network(), images(2)
    file = tmp_path / 'old.pth'
    torch.save(first_edition(plain), file)
    options = dict(pretrained=True, pretrained_cfg_overlay={'file': str(file), 'num_classes': 10}, num_classes=10)
    model = timm.create_model('sd_resnet18', **options, **NARROW)
    close(evaluate(model, x), evaluate(shortcut_and_share_of_branch(plain), x))


@pytest.mark.parametrize('target', ['default', 'test', 'converted'])
def test_bottlenecks_of_the_first_edition_compute_the_same(target):
    """Fault 1, where the third norm is the last."""
    torch.manual_seed(1)
    plain, x = make('resnet50'), images(2)
    probs = tuple(1 - 0.5 * l / 16 for l in range(1, 17))
    if target == 'converted':
        model = make('resnet50')
        sd_resnet.convert(model, 0.2, input_size=(3, 32, 32))
    else:
        model = make(
            'sd_resnet50', drop_path_rate=0.3, **({} if target == 'default' else {'drop_path_rescale': target})
        )
    model.load_state_dict(first_edition(plain, probs))
    close(evaluate(model, x), evaluate(shortcut_and_share_of_branch(plain, probs), x))


@pytest.mark.parametrize('target', ['default', 'converted'])
def test_a_checkpoint_of_the_first_edition_loads_by_distributed_calls(target):
    """Faults 1 and 3."""
    plain, x = plain_network(), images(2)
    model = TARGETS[target]()
    set_model_state_dict(model, first_edition(plain), options=StateDictOptions(full_state_dict=True, strict=False))
    close(evaluate(model, x), evaluate(shortcut_and_share_of_branch(plain), x))


def test_a_converted_block_keeps_its_fold_after_it_is_converted_back():
    """Faults 1 and 2: timm's network with the weights computes the same."""
    plain, x = plain_network(), images(2)
    model = converted_resnet()
    model.load_state_dict(first_edition(plain))
    sd_resnet.unconvert(model)
    close(evaluate(model, x), evaluate(shortcut_and_share_of_branch(plain), x))
    assert model.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize('target', ['default', 'test', 'converted'])
@pytest.mark.parametrize('change', [normed, pruned], ids=lambda change: change.__name__)
def test_a_checkpoint_of_the_first_edition_is_folded_into_changed_norms(change, target):
    """Fault 4."""
    plain, x = changed_norms(plain_network(), change), images(2)
    state = first_edition(plain)
    expected = plain_network()
    expected.load_state_dict(
        {
            **{k: v for k, v in state.items() if k in expected.state_dict()},
            **{
                f'{name}.bn2.{key}': getattr(plain.get_submodule(name).bn2, key).detach() * p
                for name, p in zip(block_names(plain), PROBS)
                for key in ('weight', 'bias')
            },
        }
    )
    model = changed_norms(TARGETS[target](), change)
    model.load_state_dict(state)
    close(evaluate(model, x), evaluate(expected, x))


@pytest.mark.parametrize('target', ['default', 'test', 'converted'])
@pytest.mark.parametrize(
    'value',
    [torch.tensor(0.0), torch.tensor(1.5), torch.tensor(-0.5), torch.tensor(float('nan')), torch.tensor([0.5, 0.5])],
    ids=['zero', 'above one', 'negative', 'nan', 'two'],
)
def test_what_is_no_probability_is_refused(value, target):
    """Fault 1: a mean over state dicts, or a broken file. Nothing may be multiplied by it in silence."""
    state = first_edition(plain_network())
    state['layer2.1.drop_path.survival_prob'] = value
    for strict in (True, False):
        with pytest.raises((RuntimeError, ValueError), match=r'layer2\.1.*survival'):
            TARGETS[target]().load_state_dict(state, strict=strict)


@pytest.mark.parametrize('target', ['default', 'test', 'converted'])
def test_a_probability_without_its_norm_is_not_taken_for_the_whole(target):
    """Fault 1: a part of a checkpoint is named as such, and none of the model's own weights is scaled by it."""
    state = first_edition(plain_network())
    del state['layer2.1.bn2.weight']
    with pytest.raises(RuntimeError, match=r'layer2\.1'):
        TARGETS[target]().load_state_dict(state)
    model = TARGETS[target]()
    before = model.layer2[1].bn2.weight.detach().clone()
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except RuntimeError as error:
        if 'layer2.1.drop_path.survival_prob' not in str(error):
            raise
    else:
        assert 'layer2.1.bn2.weight' in missing
        assert torch.equal(model.layer2[1].bn2.weight, before)


def test_a_probability_whose_block_ends_in_attention_is_refused():
    """Fault 1: the norm is not the last of the branch there, so its weights cannot hold the probability."""
    attention = {'block_args': {'attn_layer': 'se'}}
    plain = make(PLAIN, **attention)
    model = make('sd_resnet18', drop_path_rescale='train', **attention)
    model.load_state_dict(plain.state_dict())
    with pytest.raises((RuntimeError, ValueError), match=r'layer1\.0'):
        model.load_state_dict(first_edition(plain))


@pytest.mark.parametrize('loader', ['into timm', 'into a converted vit'])
def test_networks_without_those_blocks_refuse_the_probabilities(loader):
    """Fault 2: an unexpected key is named, by timm's network and by ours."""
    if loader == 'into timm':
        target, state = plain_network(), first_edition(plain_network())
    else:
        target = timm.create_model('sd_vit_tiny_patch16_224', drop_path_rate=0.4, **VIT)
        state = {**target.state_dict(), 'blocks.1.drop_path.survival_prob': torch.tensor(0.5)}
    with pytest.raises((RuntimeError, ValueError), match='survival_prob'):
        target.load_state_dict(state)


# Fault 6: right in the first edition, and to be kept


@pytest.mark.parametrize('options', [{}, {'drop_path_rescale': 'test'}], ids=['default', 'test'])
@pytest.mark.parametrize('wrap', ['parallel', 'compiled'])
def test_checkpoints_of_wrappers_load(wrap, options, tmp_path):
    """Fault 6: `module.` and `_orig_mod.`, into a wrapper again and by timm's loader."""

    def wrapper(model):
        return nn.DataParallel(model) if wrap == 'parallel' else torch.compile(model, backend='eager')

    torch.manual_seed(1)
    x = images(2)
    source = make('sd_resnet18', drop_path_rate=0.5, **options)
    expected = evaluate(source, x)
    state = wrapper(source).state_dict()
    target = make('sd_resnet18', drop_path_rate=0.2, **options)
    wrapper(target).load_state_dict(state)
    close(evaluate(target, x), expected)
    torch.save(state, tmp_path / 'wrapped.pth')
    target = make('sd_resnet18', drop_path_rate=0.1, **options)
    load_checkpoint(target, str(tmp_path / 'wrapped.pth'))
    close(evaluate(target, x), expected)
    plain = plain_network()
    target = make('sd_resnet18', drop_path_rate=0.2, **options)
    wrapper(target).load_state_dict(wrapper(plain).state_dict())
    close(evaluate(target, x), evaluate(plain, x))
