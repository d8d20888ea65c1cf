"""A wrong probability trains another network than the paper's, and nobody would see it."""

import math

import pytest

from sd_resnet import expected_depth, survival_probs


def test_linear_is_the_papers_equation_4():
    assert survival_probs(4) == (0.875, 0.75, 0.625, 0.5)
    assert survival_probs(54)[0] == 1 - 1 / 54 * 0.5
    assert survival_probs(3, 0.3) == pytest.approx((0.9, 0.8, 0.7))
    assert survival_probs(1) == (0.5,)


@pytest.mark.parametrize(('depth', 'expected'), [(16, 11.75), (54, 40.25)])
def test_expected_depth_is_what_the_paper_states(depth, expected):
    assert expected_depth(survival_probs(depth)) == pytest.approx(expected, abs=1e-12)


def test_uniform():
    assert survival_probs(3, 0.25, 'uniform') == (0.75, 0.75, 0.75)


def test_timm_rule_starts_at_one_as_timms_resnet_does():
    assert survival_probs(5, 0.4, 'timm') == pytest.approx((1.0, 0.9, 0.8, 0.7, 0.6))
    assert survival_probs(1, 0.4, 'timm') == (1.0,)


def test_explicit_probabilities_are_taken_as_they_are():
    assert survival_probs(3, schedule=[1, 0.5, 0.9]) == (1.0, 0.5, 0.9)
    assert survival_probs(2, schedule=(0.9, 0.1)) == (0.9, 0.1)


def test_a_pair_has_equal_steps_between_first_and_last():
    assert survival_probs(5, schedule=[1, 0.5]) == (1.0, 0.875, 0.75, 0.625, 0.5)
    assert survival_probs(17, schedule=(0.9, 0.3))[-1] == 0.3


@pytest.mark.parametrize('schedule', ['linear', 'uniform', 'timm', [0.9, 0.5, 0.2], (1, 0.5)])
def test_rate_zero_drops_nothing_whatever_the_schedule(schedule):
    assert survival_probs(3, 0, schedule) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize('rate', [-0.1, 1, 1.5, math.nan, 'x', True, [0.5]])
def test_a_rate_that_is_not_a_rate_is_refused_by_name_and_value(rate):
    with pytest.raises(ValueError, match=r'drop_path_rate must be in \[0, 1\), got'):
        survival_probs(4, rate)


@pytest.mark.parametrize(
    'schedule',
    ['cosine', '', [0.5], [0.5, 0.5, 0.5], [0.5] * 5, [1, 1, 1, 0], [1, 1, 1, 1.1], [1, math.nan], None, 3, ['a'] * 4],
)
def test_a_schedule_that_is_none_is_refused_by_name_and_value(schedule):
    with pytest.raises(ValueError, match=r"drop_path_schedule must be one of 'linear', 'uniform', 'timm', or a seq"):
        survival_probs(4, schedule=schedule)


def test_probabilities_and_a_rate_together_are_refused():
    with pytest.raises(ValueError, match=r'drop_path_rate must be None or 0 where drop_path_schedule is a sequence'):
        survival_probs(3, 0.5, [1, 0.7, 0.5])


@pytest.mark.parametrize('depth', [0, -1, 2.0])
def test_a_network_without_blocks_is_refused(depth):
    with pytest.raises(ValueError, match='depth must be'):
        survival_probs(depth)
