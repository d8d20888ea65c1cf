"""A rate that changes during training: who resumes, accumulates or recomputes must get the same sequence of rates."""

import copy

import pytest
import timm
import torch

import sd_resnet
from sd_resnet.analysis.networks import network_of
from sd_resnet.converted.convert import converted_blocks
from sd_resnet.hub.repository import prepare

from ..conftest import images, make, write_run

RESNET, VIT = 'sd_resnet20_cifar', 'test_vit'
MODES = ('batch', 'row', 'subset')


def build(name, ramp, mode='subset', rate=0.6):
    """The network, its blocks' drop paths, and images."""
    torch.manual_seed(0)
    if name == RESNET:
        model = make(
            name,
            train=True,
            drop_path_rate=rate,
            drop_path_mode=mode,
            drop_path_schedule='uniform',
            drop_path_rescale='train',
            drop_path_ramp=ramp,
        )
        return model, [block.drop_path for block in model.blocks()], images(5, 16)
    model = timm.create_model(name, num_classes=5, img_size=32)
    sd_resnet.convert(model, rate, 'uniform', mode, ramp=ramp)
    return model.train(), [block.block_drop_path for block in converted_blocks(model).values()], images(5, 32)


def rates(model, drop_paths, x, steps):
    """What every block's rate was in each step; all blocks share it here."""
    seen = []
    for _ in range(steps):
        model(x).square().mean().backward()
        assert len({d.drop_prob for d in drop_paths}) == 1
        seen.append(drop_paths[0].drop_prob)
    return seen


EXPECTED = {
    ('warmup', 4): [0, 0.15, 0.3, 0.45, 0.6, 0.6],
    ('early', 2): [0.6, 0.6, 0, 0, 0, 0],
    ('late', 2): [0, 0, 0.6, 0.6, 0.6, 0.6],
    ('decay', 4): [0.6, 0.45, 0.3, 0.15, 0, 0],
}


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', [RESNET, VIT])
@pytest.mark.parametrize('ramp', EXPECTED)
def test_the_rate_of_each_training_step(name, ramp, mode):
    model, drop_paths, x = build(name, ramp, mode)
    model.eval()(x)  # no training step
    assert rates(model.train(), drop_paths, x, 6) == pytest.approx(EXPECTED[ramp])


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', [RESNET, VIT])
def test_seeding_anew_in_every_epoch_does_not_hold_it(name, mode):
    model, drop_paths, x = build(name, ('warmup', 4), mode)
    seen = []
    for _ in range(3):
        torch.manual_seed(42)
        seen += rates(model, drop_paths, x, 2)
    assert seen == pytest.approx(EXPECTED['warmup', 4])


@pytest.mark.parametrize('mode', MODES)
def test_the_first_block_that_trains_counts(mode):
    """Early layers are often frozen, in evaluation mode."""
    model, drop_paths, x = build(VIT, ('warmup', 4), mode)
    model.blocks[0].eval()
    assert rates(model, drop_paths, x, 6) == pytest.approx(EXPECTED['warmup', 4])
    model.blocks[0].train()
    model(x)
    assert model.drop_path_ramp.steps_done == 7


@pytest.mark.parametrize('name', [RESNET, VIT])
def test_scripted_training_is_refused(name):
    """The rate of the first step would stay for ever."""
    model, _, x = build(name, ('late', 2))
    with pytest.raises(ValueError, match='drop_path_ramp must be None where a network is scripted to train'):
        torch.jit.script(model)
    torch.testing.assert_close(torch.jit.script(model.eval())(x), model(x))


@pytest.mark.parametrize('name', [RESNET, VIT])
def test_the_state_dict_has_one_key_more_and_a_resumed_run_goes_on(name):
    model, drop_paths, x = build(name, ('warmup', 4))
    plain, *_ = build(name, None)
    assert set(model.state_dict()) - set(plain.state_dict()) == {'drop_path_ramp.step'}
    assert rates(model, drop_paths, x, 3) == pytest.approx(EXPECTED['warmup', 4][:3])
    saved = copy.deepcopy(model.state_dict())
    assert saved['drop_path_ramp.step'] == 3
    resumed, resumed_drop_paths, _ = build(name, ['warmup', 4])
    resumed.load_state_dict(saved)
    assert rates(resumed, resumed_drop_paths, x, 3) == pytest.approx(EXPECTED['warmup', 4][3:])
    resumed.drop_path_ramp.steps_done = 0  # a new training
    assert rates(resumed, resumed_drop_paths, x, 6) == pytest.approx(EXPECTED['warmup', 4])
    plain.load_state_dict(saved)  # a network without a ramp takes it too
    resumed.load_state_dict(plain.state_dict())  # and the other way round: the count stays
    assert resumed.drop_path_ramp.steps_done == 6


@pytest.mark.parametrize('name', [RESNET, VIT])
def test_the_number_and_not_the_tensor_decides(name):
    """No step may wait for a device; an average or `to_empty` may leave anything in the buffer."""
    model, drop_paths, x = build(name, ('late', 2))
    model.drop_path_ramp.step.fill_(1000)
    assert rates(model, drop_paths, x, 3) == pytest.approx([0, 0, 0.6])
    assert int(model.drop_path_ramp.step) == 3


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('name', [RESNET, VIT])
def test_checkpointing_counts_once_and_recomputes_with_the_rate_of_its_step(name, mode):
    """Two forward passes at two rates, then one backward pass."""

    def gradients(checkpointing):
        model, drop_paths, x = build(name, ('warmup', 3), mode)
        for module in model.modules():  # their running statistics are moved twice
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = 0.0
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(5)
        sum(model(x).square().mean() for _ in range(4)).backward()
        assert model.drop_path_ramp.steps_done == 4
        assert drop_paths[0].drop_prob == pytest.approx(0.6)
        return [p.grad for p in model.parameters()]

    for a, b in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize('name', [RESNET, VIT])
def test_features_count_as_steps_too(name):
    """timm's feature distillation calls these instead of the model."""
    model, _, x = build(name, ('warmup', 4))
    model.forward_features(x)
    model.forward_intermediates(x)
    assert model.drop_path_ramp.steps_done == 2


@pytest.mark.parametrize('mode', ['batch', 'subset'])
@pytest.mark.parametrize('name', [RESNET, VIT])
def test_a_decay_starts_with_less_work_and_ends_with_all_of_it(name, mode):
    """Whoever wants time back early must get it, and a network that trains whole in the end."""
    model, _, x = build(name, ('decay', 20), mode)
    seen = []
    network_of(model).on_forward(lambda shares: seen.append(sum(shares) / len(shares)))
    rates(model, [model.drop_path_ramp._drop_paths[0]], x, 22)
    assert sum(seen[:8]) / 8 < 0.8
    assert seen[20:] == [1, 1]


def test_it_is_refused_with_test_time_rescaling():
    with pytest.raises(ValueError, match="drop_path_ramp needs drop_path_rescale='train'"):
        timm.create_model(RESNET, drop_path_rescale='test', drop_path_ramp=('warmup', 4))
    model, *_ = build(RESNET, ('warmup', 4))
    with pytest.raises(ValueError, match='drop_path_ramp'):
        model.set_drop_path(rescale='test')


@pytest.mark.parametrize('ramp', ['warmup', ('warmup',), ('warmup', 0), ('warmup', 2.5), ('up', 3), ('late', True)])
def test_errors_say_what_is_allowed(ramp):
    with pytest.raises(
        ValueError, match=r"drop_path_ramp must be None or \(kind, steps\), a kind of 'warmup', .*'late', 'decay'"
    ):
        timm.create_model(RESNET, drop_path_rescale='train', drop_path_ramp=ramp)


def test_set_drop_path_changes_what_the_ramp_leads_to():
    model, drop_paths, x = build(RESNET, ('warmup', 4))
    rates(model, drop_paths, x, 2)
    model.set_drop_path(rate=0.2)
    model.set_drop_path(mode='subset')  # and nothing else: the rate that is led to stays, not the one in force
    assert rates(model, drop_paths, x, 3) == pytest.approx([0.1, 0.15, 0.2])


@pytest.mark.parametrize('name', [RESNET, VIT])
def test_rates_cannot_be_assigned_where_it_sets_them(name):
    """Else the assignment would be undone, in silence, at the ramp's next step."""
    _, drop_paths, _ = build(name, ('late', 2))
    with pytest.raises(AttributeError, match=r'drop_prob cannot be assigned \(got 0.3\): drop_path_ramp sets it'):
        drop_paths[0].drop_prob = 0.3


def test_a_folded_network_has_none():
    model = make('sd_resnet18', drop_path_rescale='train', drop_path_ramp=('late', 5))
    assert set(sd_resnet.to_resnet(model).state_dict()) == set(make('resnet18').state_dict())


def test_a_published_network_has_none(tmp_path):
    """Its training is over, and a key that the Hub's configuration does not explain would be refused as damage."""
    run = write_run(tmp_path / 'run', RESNET, drop_path_rescale='train', drop_path_ramp=['warmup', 4])
    out = prepare(run, tmp_path / 'out', 'me/mine', license='mit')
    model = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert model.drop_path_ramp is None
    assert model.drop_path_rescale == 'train'


@pytest.mark.parametrize(('name', 'mode'), [(RESNET, 'subset'), (VIT, 'subset'), (VIT, 'batch')])
def test_it_compiles(name, mode):
    """A rate that changes is a float that changes, which a compiler makes a symbol; the rates stay eager code's."""
    torch._dynamo.reset()
    model, drop_paths, x = build(name, ('late', 2), mode)
    graphs = []
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    seen = []
    for _ in range(4):
        compiled(x).square().mean().backward()
        seen.append(drop_paths[0].drop_prob)
    assert seen == pytest.approx([0, 0, 0.6, 0.6])
    assert model.drop_path_ramp.steps_done == 4
    assert graphs
