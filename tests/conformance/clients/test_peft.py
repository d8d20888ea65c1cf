"""peft: low-rank adapters inside of blocks that skip, and trainable copies of norms and classifiers."""

import pytest
import torch

pytest.importorskip('transformers', reason='transformers, which peft needs, is not installed')

from transformers import is_torch_available

if not is_torch_available():
    pytest.skip('the transformers that peft needs, needs a newer torch', allow_module_level=True)
pytest.importorskip('peft', reason='peft is not installed')

import peft

from .pairs import (
    DROPPING,
    NAMES,
    NETS,
    RATE,
    assert_dropped,
    assert_same_weights,
    evaluate,
    images,
    pair,
    sd_net,
    timm_net,
    train,
)

TARGETS = {
    'resnet18': dict(target_modules=r'layer\d\.\d\.conv[12]', modules_to_save=['fc', 'bn1', 'bn2', 'downsample.1']),
    'vit_tiny_patch16_224': dict(
        target_modules=r'blocks\.\d\.(attn\.qkv|attn\.proj|mlp\.fc\d)', modules_to_save=['head']
    ),
    'convnext_atto': dict(target_modules=r'stages\.\d\.blocks\.\d\.mlp\.fc\d', modules_to_save=['head.fc']),
}
assert TARGETS.keys() == NETS.keys()


def adapted(model, name, **options):
    torch.manual_seed(2)
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=8, **TARGETS[name], **options))


@pytest.mark.parametrize(('name', 'dora'), [*((name, False) for name in NAMES), ('resnet18', True)])
def test_adapters_are_trained_as_in_timms(name, dora):
    theirs, ours = (adapted(model, name, use_dora=dora) for model in pair(name))
    assert train(ours) == train(theirs)
    assert_same_weights(ours, theirs)
    assert_same_weights(peft.get_peft_model_state_dict(ours), peft.get_peft_model_state_dict(theirs))
    assert torch.equal(evaluate(ours), evaluate(theirs))


@pytest.mark.parametrize(('name', 'mode'), DROPPING)
def test_adapters_drop_with_their_blocks(name, mode):
    """A dropped block's adapters get zero gradients, and what is frozen gets none."""
    theirs, ours = (adapted(model, name) for model in pair(name, RATE, drop_path_mode=mode))
    losses = train(ours, steps=5)
    assert_dropped(losses, train(theirs, steps=5), ours)
    filled = []
    for _ in range(5):
        ours.zero_grad()
        ours(images()).square().mean().backward()
        for key, parameter in ours.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, key
        filled += [bool(p.grad.any()) for key, p in ours.named_parameters() if 'lora_B' in key]
    assert any(filled)
    assert mode == 'subset' or not all(filled)


@pytest.mark.parametrize(('name', 'mode'), DROPPING)
def test_saved_adapters_go_onto_another_rate_and_onto_timms(tmp_path, name, mode):
    """With the norms' statistics, which are saved as part of the trainable copies."""
    ours = adapted(sd_net(name, RATE, timm_net(name).state_dict(), drop_path_mode=mode), name)
    train(ours)
    ours.save_pretrained(tmp_path)
    theirs, other = pair(name, 0.3, drop_path_mode=mode)
    loaded = [peft.PeftModel.from_pretrained(base, tmp_path, is_trainable=True) for base in (theirs, other)]
    for model in loaded:
        assert torch.equal(evaluate(model), evaluate(ours))
    losses, plain = (train(model) for model in reversed(loaded))
    assert_dropped(losses, plain, other)


@pytest.mark.parametrize(('name', 'mode'), DROPPING)
def test_merged_adapters_leave_a_plain_state_dict(name, mode):
    theirs, ours = pair(name, RATE, drop_path_mode=mode)
    before = evaluate(theirs)
    ours = adapted(ours, name)
    with ours.disable_adapter():
        assert torch.equal(evaluate(ours), before)
    train(ours)
    out = evaluate(ours)
    assert not torch.equal(out, before)
    merged = ours.merge_and_unload()
    assert list(merged.state_dict()) == list(theirs.state_dict())
    torch.testing.assert_close(evaluate(merged), out, rtol=1e-4, atol=1e-4)
    theirs.load_state_dict(merged.state_dict())
    assert torch.equal(evaluate(theirs), evaluate(merged))
    merged.requires_grad_(True)
    assert_dropped(train(merged), train(theirs), merged)
