"""Subset mode, branch by branch: each drop path drops for itself, as timm's, and only the rows that survive are run.

For one small model of each class of timm that has a drop path. With fixed seeds; statistical bounds are 4.5 standard
errors, over some 2,000 questions.
"""

import copy
import inspect
import math
import re
import sys

import pytest
import timm
import torch
from timm.layers import DropPath
from timm.models import model_entrypoint
from torch import nn
from torch.utils._pytree import tree_leaves

import sd_resnet
from sd_resnet.converted.blocks import BlockDropPath
from sd_resnet.converted.by_branch import PutBack
from sd_resnet.converted.convert import converted_blocks

from ..families import COMPLETE, CONVERTED, ON_META, REFUSED
from .conftest import assert_a_step_is_timms, branch_drop_paths, converted, entries, quiet


@pytest.fixture(scope='module', params=CONVERTED)
def case(request):
    return converted(request.param)


@pytest.mark.skipif(not COMPLETE, reason='this timm does not know all names of the table yet')
def test_the_table_holds_a_model_of_each_class():
    """A family that is not in the table is never tried."""
    modules = {name: sys.modules.get(f'timm.models.{name}') for name in timm.list_modules()}
    sources = {name: inspect.getsource(module) for name, module in modules.items() if module}
    tried = {model_entrypoint(name).__module__.rpartition('.')[2] for name in {**CONVERTED, **REFUSED}}
    alike = {'mobilevit', 'res2net', 'vision_transformer_hybrid', 'vitamin'}  # of classes that other files have
    assert {name for name, source in sources.items() if 'drop_path_rate' in source} - tried - alike == set()


# What does not drop branch by branch, and why: parts of messages
BY_BLOCK = {
    'hgnetv2_b0': 'begins with an operation that is no module',  # blocks of one drop path: at the same odds
    'vit_base_patch16_xp_224': 'ParallelScalingBlock fails',
}
BY_ROW = {
    'coat_tiny': 'begins with an operation that is no module',
    'xcit_nano_12_p8_224': 'begins with an operation that is no module',
}


def test_what_drops_how(case):
    """All by branch, but for those listed: where that grows, work is computed that was saved before."""
    ways = set(case.conversion.drop_paths.values())
    assert 'branch' in ways or case.name in {**BY_BLOCK, **BY_ROW}
    others = ways - {'branch'}
    assert bool(others) == (case.name in {**BY_BLOCK, **BY_ROW})
    assert all(why.startswith('block: ') and BY_BLOCK[case.name] in why for why in others if case.name in BY_BLOCK)
    assert all(why.startswith('row: ') and BY_ROW[case.name] in why for why in others if case.name in BY_ROW)
    slots = {name for name, module in case.plain.named_modules() if isinstance(module, DropPath)}
    assert slots <= {*case.conversion.drop_paths, *case.conversion.left_alone}
    blocks = converted_blocks(case.model)
    assert list(case.conversion.survival_probs) == [name for name in case.conversion.survival_probs if name in blocks]
    assert set(case.conversion.survival_probs) == set(blocks)
    assert set(case.conversion.survival_probs.values()) == {0.5}


@pytest.mark.parametrize('name', ON_META)
def test_a_large_network_drops_by_branch(name):
    options, size = ON_META[name]
    with torch.device('meta'):
        model = timm.create_model(name, drop_path_rate=0.3, **options)
    conversion = sd_resnet.convert(model, 0.5, 'uniform', input_size=(3, size, size))
    assert set(conversion.drop_paths.values()) == {'branch'}
    assert all('never used' in why for why in conversion.left_alone.values())


def test_evaluation_and_state_dict_are_timms_and_unconvert_leaves_no_trace(case):
    """Else pretrained weights would not load, or compute something else."""
    model, plain, x = copy.deepcopy(case.model), copy.deepcopy(case.plain), case.x
    ours, theirs = model.state_dict(), plain.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    with torch.no_grad():
        expected = tree_leaves(plain.eval()(x))
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(model.eval()(x)), expected))
        sd_resnet.unconvert(model)
        assert all(torch.equal(a, b) for a, b in zip(tree_leaves(model.eval()(x)), expected))
    assert list(model.state_dict()) == list(theirs)
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    for own, other in zip(model.modules(), plain.modules()):
        assert type(own) is type(other)
        for hooks in ('_forward_pre_hooks', '_forward_hooks', '_load_state_dict_pre_hooks', '_backward_hooks'):
            assert len(getattr(own, hooks)) == len(getattr(other, hooks))
        assert set(vars(own)) == set(vars(other))
        assert getattr(own, 'drop_prob', None) == getattr(other, 'drop_prob', None)


def test_a_step_is_timms_with_the_same_rows_masked(case, recorded):
    """Loss and gradients of every branch are those of timm's own modules; a block that drops as one drops nothing."""
    model, plain = quiet(copy.deepcopy(case.model).double()), quiet(copy.deepcopy(case.plain).double())
    for module in model.modules():
        if isinstance(module, BlockDropPath):
            module.configure(1.0, 'subset')
    assert_a_step_is_timms(model, plain, case.x.double(), recorded, 1e-5)
    assert set(recorded) == set(branch_drop_paths(model).values())


def _emptied(block):
    """Nothing is left of a block but its branches, each of which is its entries and its drop path."""
    begun = {
        drop_path: found for drop_path, found in entries(block).items() if found and drop_path in block.drop_paths()
    }
    for module in block.modules():
        for key in [key for key, hook in module._forward_hooks.items() if isinstance(hook, PutBack)]:
            del module._forward_hooks[key]
    for module in {module for found in begun.values() for module, _ in found}:
        module.forward = lambda *args, **kwargs: {**dict(enumerate(args)), **kwargs}

    def forward(x):
        outs = []
        for drop_path, found in begun.items():
            for module, position in found:
                given = module(*[x] * (position + 1)) if isinstance(position, int) else module(x, **{position: x})
            outs.append(x + drop_path(given[position]))
        return torch.stack(outs)

    block.plain_forward = forward
    return block.train()


def test_rows_survive_with_p_l_and_branches_independently(case):
    """(sample, branch) survives with p_l, and with the same sample of another branch of the block with p_l squared.

    In the block with the most branches, of whose code only hooks and drop paths are left, for speed.
    """
    model = copy.deepcopy(case.model)
    by_branch = {drop_path for drop_path, found in entries(model).items() if found}
    if not by_branch:
        assert case.name in {**BY_BLOCK, **BY_ROW}
        return
    block = max(converted_blocks(model).values(), key=lambda block: len(by_branch.intersection(block.drop_paths())))
    passes, x = 2000, torch.ones(5, 1)
    with torch.no_grad():
        block = _emptied(block)
        outs = torch.stack([block(x) for _ in range(passes)]).squeeze(-1)  # (passes, branches, N)
    assert outs.unique().tolist() == [1, 3]  # 1 + 1 / p_l
    alive = (outs == 3).double()
    assert ((alive.mean(0) - 0.5).abs() < 4.5 * math.sqrt(0.25 / passes)).all()
    assert set(alive.sum(-1).unique().tolist()) == {2, 3}
    joint = torch.einsum('tan,tbm->abnm', alive, alive) / passes
    for a in range(alive.shape[1]):
        for b in range(a):
            assert ((joint[a, b] - 0.25).abs() < 4.5 * math.sqrt(0.25 * 0.75 / passes)).all()


# Positions, of no images; and a projection that runs between a branch's entry and its end
NOT_OF_ROWS = r'meta_mlp|cpb_mlp|rel_pos|^blocks.1.shortcut'
# Projections, positions, what makes the next stage, and (of FastViT) what has a shortcut without a drop path
NOT_OF_A_BRANCH = r'downsample|shortcut|token_mixer.mixer|^blocks.\d.proj$|pos_embd|^stages.\d.global_block'
# Of NextViT, TinyViT and DaViT: what stands between the branches
NOT_OF_A_BRANCH += r'|projection.conv|patch_embed|local_conv|cpe\d'
# Of EdgeNeXt and VoVNet, HGNet: what is joined to the block's own input is computed for all rows
NOT_OF_A_BRANCH += r'|\.convs\.|conv_mid|\.layers\.\d\.conv'


def test_a_branch_is_computed_for_its_rows_only(case):
    """k = 0.6 * 5 = 3 rows of 5, or as many for each image, whatever layer of a branch one looks at."""
    model = quiet(copy.deepcopy(case.model))
    drop_paths = list(branch_drop_paths(model).values())
    for drop_path in drop_paths:
        drop_path.drop_prob = 0.4
    names = {module: name for name, module in model.named_modules()}
    inside = tuple(f'{name}.' for name in converted_blocks(model))
    found = {True: {}, False: {}}  # in training, in evaluation

    def look(module, args):
        if args and isinstance(args[0], torch.Tensor):
            begun = [drop_path for drop_path in drop_paths if drop_path.branch is not None]
            found[model.training].setdefault(module, []).append((args[0].shape[0], begun))

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_pre_hook(look)
    with torch.no_grad():
        model(case.x)
        model.eval()(case.x)
    counted, not_begun, missed = set(), set(), set()
    for module, calls in found[True].items():
        for (rows, begun), (whole, _) in zip(calls, found[False][module], strict=True):
            if begun and rows * 5 == whole * 3:
                counted.update(begun)
            elif begun and list(module.parameters()):
                missed.add(names[module])
            elif isinstance(module, (nn.Linear, nn.Conv2d)) and names[module].startswith(inside):
                not_begun.add(names[module])
    assert counted == {drop_path for drop_path, found in entries(model).items() if found}
    assert [name for name in missed if not re.search(NOT_OF_ROWS, name)] == []
    if case.name not in {**BY_BLOCK, **BY_ROW}:
        assert [name for name in not_begun if not re.search(NOT_OF_A_BRANCH, name)] == []
