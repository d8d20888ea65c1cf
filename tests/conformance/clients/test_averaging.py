"""Averages of weights: EMA, SWA with `update_bn`, teachers, and soups of networks that dropped at different rates."""

import copy

import pytest
import torch
from timm.utils import ModelEmaV3
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import sd_resnet

from .pairs import (
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
    sd_net,
    timm_net,
    train,
)

ALL = [*NAMES, CONVERTED_RESNET]
ALL_DROPPING = [*DROPPING, *((CONVERTED_RESNET, mode) for mode in MODES)]
BATCHES = [images(seed=seed) for seed in range(3)]

AVERAGES = {
    'timm': lambda model: ModelEmaV3(model, decay=0.6),
    'timm, warmed up': lambda model: ModelEmaV3(model, decay=0.9, use_warmup=True),
    'swa': lambda model: AveragedModel(model),
    'ema with buffers': lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6), use_buffers=True),
}


def train_averaged(model, average, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step in range(steps):
        losses += train(model, 1, optimizer, seed=step)
        (average.update if isinstance(average, ModelEmaV3) else average.update_parameters)(model)
    return losses


@pytest.mark.parametrize(
    ('name', 'kind'), [*(('resnet18', kind) for kind in AVERAGES), *((name, 'timm') for name in ALL[1:])]
)
def test_an_average_is_timms_where_nothing_drops(name, kind):
    theirs, ours = pair(name)
    averages = [AVERAGES[kind](model) for model in (theirs, ours)]
    assert train_averaged(ours, averages[1]) == train_averaged(theirs, averages[0])
    assert_same_weights(averages[1], averages[0])
    assert torch.equal(evaluate(averages[1].module), evaluate(averages[0].module))


@pytest.mark.parametrize(
    ('name', 'mode', 'kind'),
    [*((name, mode, 'timm') for name, mode in ALL_DROPPING), ('resnet18', 'batch', 'ema with buffers')],
)
def test_an_average_of_a_network_that_drops_is_a_network_of_timm(name, mode, kind):
    theirs, ours = pair(name, RATE, drop_path_mode=mode)
    average = AVERAGES[kind](ours)
    assert_dropped(train_averaged(ours, average), train_averaged(theirs, AVERAGES[kind](theirs)), ours)
    assert list(average.module.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(average.module.state_dict())
    assert torch.equal(evaluate(theirs), evaluate(average.module))


@pytest.mark.parametrize(('name', 'mode'), ALL_DROPPING)
def test_a_teacher_without_dropping_follows_a_student_that_drops(name, mode):
    """A loop of one's own over parameters and buffers, which are paired by their places."""
    theirs, student = pair(name, RATE, drop_path_mode=mode)
    teachers = theirs, sd_net(name, 0.0, theirs.state_dict()), sd_net(name, 0.3, theirs.state_dict())
    for step in range(2):
        train(student, 1, seed=step)
        with torch.no_grad():
            for teacher in teachers:
                for own, new in zip(teacher.parameters(), student.parameters(), strict=True):
                    own.lerp_(new, 0.4)
                for own, new in zip(teacher.buffers(), student.buffers(), strict=True):
                    own.copy_(new)
    for teacher in teachers[1:]:
        assert_same_weights(teacher, theirs)
        assert torch.equal(evaluate(teacher), evaluate(theirs))


@pytest.mark.parametrize('name', ALL)
def test_a_soup_of_different_rates_is_the_soup_of_timms_networks(name):
    """Averages of state dicts, key by key, into any of the networks."""
    base = timm_net(name).state_dict()
    rates = (0.0, 0.3, RATE)
    cooks = [sd_net(name, rate, base) for rate in rates]
    plain = []
    for cook in cooks:
        train(cook, 2)
        net = timm_net(name)
        net.load_state_dict(cook.state_dict())
        plain.append(net)
    soups = []
    for nets in (plain, cooks):
        states = [net.state_dict() for net in nets]
        mean = lambda key, states=states: sum(s[key].double() for s in states) / len(states)  # noqa: E731
        soups.append({key: mean(key).to(value.dtype) for key, value in states[0].items()})
    assert_same_weights(soups[1], soups[0])
    plain[0].load_state_dict(soups[0])
    for cook in cooks:
        cook.load_state_dict(soups[1])
        assert torch.equal(evaluate(cook), evaluate(plain[0]))


def test_statistics_of_an_average_are_timms_without_dropping():
    """`update_bn` runs in training mode: what dropped there would count in no block's statistics."""
    for name in ('resnet18', CONVERTED_RESNET):
        theirs, ours = pair(name, RATE)
        train(ours, 2)
        theirs.load_state_dict(ours.state_dict())
        plain, average = AveragedModel(theirs), AveragedModel(ours)
        update_bn(BATCHES, plain)

        dropping = copy.deepcopy(average)
        update_bn(BATCHES, dropping)
        assert not torch.equal(evaluate(dropping), evaluate(plain))
        if name == CONVERTED_RESNET:
            sd_resnet.unconvert(average.module)
        else:
            average.module.set_drop_path(rate=0)
        update_bn(BATCHES, average)
        assert_same_weights(average, plain)
        assert torch.equal(evaluate(average), evaluate(plain))
        if name == CONVERTED_RESNET:
            sd_resnet.convert(average.module, RATE, 'uniform', input_size=(3, 32, 32))
        else:
            average.module.set_drop_path(rate=RATE)
        assert torch.equal(evaluate(average), evaluate(plain))
        assert_dropped(train(average), train(plain), average)
