"""transformers: timm's networks as backbones of detectors, as classifiers, and under its Trainer."""

import pytest
import torch

pytest.importorskip('transformers', reason='transformers is not installed')
pytest.importorskip('accelerate', reason='accelerate, which the Trainer needs, is not installed')

from transformers import is_torch_available

if not is_torch_available():
    pytest.skip('this transformers needs a newer torch', allow_module_level=True)

from transformers import (
    DetrConfig,
    DetrModel,
    TimmBackbone,
    TimmBackboneConfig,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    Trainer,
    TrainingArguments,
)

from .pairs import (
    CLASSES,
    DROPPING,
    NETS,
    RATE,
    assert_dropped,
    assert_same_weights,
    evaluate,
    images,
    labels,
    timm_net,
    train,
)

BACKBONES = ['resnet18', 'convnext_atto']  # transformers: "currently not possible for transformer architectures"


def backbone(name, out_indices, weights=None, freeze=False, **kwargs):
    torch.manual_seed(0)
    config = TimmBackboneConfig(backbone=name, out_indices=list(out_indices), freeze_batch_norm_2d=freeze)
    model = TimmBackbone(config, **NETS[name.removeprefix('sd_')], **kwargs)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def backbones(name, out_indices=(0, 1, 2, 3), rate=0.0, freeze=False, **kwargs):
    """timm's and ours with the weights of timm's."""
    theirs = backbone(name, out_indices, freeze=freeze)
    return theirs, backbone(f'sd_{name}', out_indices, theirs.state_dict(), freeze, drop_path_rate=rate, **kwargs)


def features(model):
    """As logits, so that what trains a classifier trains a backbone."""
    return lambda x: torch.stack([f.mean((1, 2, 3)) for f in model(x).feature_maps], 1).repeat(1, CLASSES)


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (2,), (-1,)])
def test_a_backbone_has_timms_names_channels_and_features(name, out_indices):
    """A detector's checkpoint names the backbone's weights."""
    theirs, ours = backbones(name, out_indices, RATE)
    assert_same_weights(ours, theirs)
    assert ours.channels == theirs.channels
    assert ours.stage_names == theirs.stage_names
    for feature, expected in zip(evaluate(ours).feature_maps, evaluate(theirs).feature_maps, strict=True):
        assert torch.equal(feature, expected)


def test_a_backbone_gives_hidden_states_as_timms():
    """transformers sets the names of the layers whose output it wants on timm's extractor."""
    theirs, ours = backbones('resnet18', (1, 3), RATE)
    with torch.no_grad():
        outs = [model.eval()(images(2), output_hidden_states=True) for model in (theirs, ours)]
    for key in ('feature_maps', 'hidden_states'):
        for feature, expected in zip(outs[1][key], outs[0][key], strict=True):
            assert torch.equal(feature, expected)


@pytest.mark.parametrize('name', BACKBONES)
@pytest.mark.parametrize('freeze', [False, True], ids=['', 'frozen BatchNorm'])
def test_a_backbone_trains_as_timms(name, freeze):
    theirs, ours = backbones(name, freeze=freeze)
    assert train(ours, forward=features(ours)) == train(theirs, forward=features(theirs))
    assert_same_weights(ours, theirs)


@pytest.mark.parametrize(('name', 'mode'), [(name, mode) for name, mode in DROPPING if name in BACKBONES])
@pytest.mark.parametrize('freeze', [False, True], ids=['', 'frozen BatchNorm'])
def test_a_backbone_drops(name, mode, freeze):
    theirs, ours = backbones(name, rate=RATE, freeze=freeze, drop_path_mode=mode)
    assert_dropped(train(ours, forward=features(ours)), train(theirs, forward=features(theirs)), ours)


def detector(name):
    torch.manual_seed(0)
    layers = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=32, d_model=32)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, num_queries=4, dropout=0.0)
    return DetrModel(
        DetrConfig(backbone_config=TimmBackboneConfig(backbone=name, out_indices=[1, 4]), **layers, **heads)
    )


def test_a_detector_takes_the_weights_of_one_with_timms_network():
    """It replaces every BatchNorm by a frozen one of its own, and ends at 32 pixels of a stride of 32."""
    theirs, ours = detector('resnet18'), detector('sd_resnet18')
    for name, tensor in theirs.named_buffers():
        if name.endswith('bn2.weight'):  # else every branch starts at zero, and none could be missed
            tensor.uniform_(0.3, 0.7)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(evaluate(ours).last_hidden_state, evaluate(theirs).last_hidden_state)
    losses = []
    for model in (theirs, ours):
        forward = lambda x, model=model: model(x).last_hidden_state[..., :CLASSES].mean(1)  # noqa: E731
        losses.append(train(model, steps=2, forward=forward))
    assert_dropped(losses[1], losses[0], ours)  # at the default rate: a detector's configuration cannot name one


def classifier(name, weights=None, **model_args):
    torch.manual_seed(0)
    model_args = {**NETS[name.removeprefix('sd_')], **model_args}
    model = TimmWrapperForImageClassification(
        TimmWrapperConfig(architecture=name, num_labels=CLASSES, model_args=model_args)
    )
    if weights is not None:
        model.timm_model.load_state_dict(weights)
    return model


class Images(torch.utils.data.Dataset):
    def __init__(self):
        self.images, self.labels = images(12), labels(12)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {'pixel_values': self.images[index], 'labels': self.labels[index]}


def run(model, folder, steps=3, resume=None, **arguments):
    """The Trainer's losses."""
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=6,
        learning_rate=0.01,
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        **arguments,
    )
    trainer = Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images())
    trainer.train(resume_from_checkpoint=resume)
    assert trainer.evaluate()['eval_loss'] < 100
    return [entry['loss'] for entry in trainer.state.log_history if 'loss' in entry]


@pytest.mark.parametrize(
    ('name', 'checkpointing'), [('resnet18', True), ('vit_tiny_patch16_224', True), ('convnext_atto', False)]
)
@pytest.mark.filterwarnings('ignore:`gradient_checkpointing` is deprecated')
def test_the_trainer_trains_as_timms(tmp_path, name, checkpointing):
    weights = timm_net(name).state_dict()
    theirs, ours = classifier(name, weights), classifier(f'sd_{name}', weights, drop_path_rate=0.0)
    options = dict(gradient_checkpointing=checkpointing)
    assert run(ours, tmp_path / 'ours', **options) == run(theirs, tmp_path / 'theirs', **options)
    assert_same_weights(ours, theirs)
    assert torch.equal(evaluate(ours).logits, evaluate(theirs).logits)


@pytest.mark.parametrize(
    ('name', 'mode'), [('resnet18', 'batch'), ('vit_tiny_patch16_224', 'subset'), ('convnext_atto', 'batch')]
)
@pytest.mark.filterwarnings('ignore:`gradient_checkpointing` is deprecated')
def test_the_trainer_resumes_with_the_same_draws_and_what_it_saved_is_timms(tmp_path, name, mode):
    """A checkpoint holds the random generators' states: the resumed run draws what the unbroken one drew."""
    weights = timm_net(name).state_dict()
    schedule = {} if 'resnet' in name else {'drop_path_schedule': 'uniform'}
    options = dict(drop_path_rate=RATE, drop_path_mode=mode, **schedule)
    ours, resumed = (classifier(f'sd_{name}', weights, **options) for _ in range(2))
    losses = run(ours, tmp_path / 'ours')
    assert run(resumed, tmp_path / 'ours', resume=str(tmp_path / 'ours' / 'checkpoint-2')) == losses
    assert_same_weights(resumed, ours)
    theirs = classifier(name)
    assert_dropped(losses, run(theirs, tmp_path / 'theirs'), ours)

    ours.save_pretrained(tmp_path / 'saved')
    again = TimmWrapperForImageClassification.from_pretrained(tmp_path / 'saved')
    assert_same_weights(again, ours)
    assert torch.equal(evaluate(again).logits, evaluate(ours).logits)
    assert_dropped(run(again, tmp_path / 'again', steps=1), [], again)
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(evaluate(theirs).logits, evaluate(ours).logits)
