"""Who trains by a published recipe and says nothing of the rate: it is the recipe's, and says where it comes from."""

import re

import pytest
import timm
import torch

from sd_resnet.analysis.networks import network_of
from sd_resnet.converted.published_rates import _FAMILIES, UNPUBLISHED, published

NAMES = [name for name in timm.list_models() if not name.startswith('sd_')]


@pytest.mark.parametrize(
    ('name', 'rate', 'source'),
    [
        ('convnext_tiny', 0.1, '2201.03545'),
        ('convnext_small', 0.4, '2201.03545'),
        ('convnext_xlarge', 0.5, '2201.03545'),
        ('convnextv2_tiny', 0.2, '2301.00808'),
        ('swin_base_patch4_window7_224', 0.5, '2103.14030'),
        ('swin_large_patch4_window7_224', 0.2, '22k'),
        ('swinv2_base_window12_192', 0.2, '22k'),
        ('swinv2_base_window16_256', 0.5, '2111.09883'),
        ('deit_tiny_distilled_patch16_224', 0.1, '2012.12877'),
        ('deit3_large_patch16_384', 0.45, '2204.07118'),
        ('cait_xxs24_224', 0.05, '2103.17239'),
        ('cait_s24_384', 0.1, '2103.17239'),
        ('cait_m48_448', 0.4, '2103.17239'),
        ('beit_large_patch16_384', 0.2, '2106.08254'),
        ('eva02_large_patch14_448', 0.15, '2303.11331'),
        ('xcit_small_12_p16_384', 0.05, '2106.09681'),
        ('vit_base_patch16_384', 0.1, '2106.10270'),
        ('vit_large_patch14_reg4_dinov2', 0.4, '2304.07193'),
        ('tf_efficientnet_b0', 0.2, '1905.11946'),
        ('maxvit_large_tf_512', 0.6, '2204.01697'),
        ('poolformerv2_m48', 0.4, '2111.11418'),
        # timm's own, and what other recipes trained: the paper's rate is not theirs
        ('convnext_tiny_hnf', UNPUBLISHED, 'none published'),
        ('swin_s3_tiny_224', UNPUBLISHED, 'none published'),
        ('swinv2_cr_small_224', UNPUBLISHED, 'none published'),
        ('eva02_large_patch14_clip_224', UNPUBLISHED, 'none published'),
        ('vit_base_patch16_clip_224', UNPUBLISHED, 'none published'),
        ('regnety_032', UNPUBLISHED, 'none published'),
        # nothing dropped there: a `sd_` model drops
        ('fasternet_t0', UNPUBLISHED, 'published with none: FasterNet'),
        ('levit_256', UNPUBLISHED, 'published with none: LeViT'),
    ],
)
def test_the_rate_of(name, rate, source):
    assert published(name).rate == rate
    assert source in published(name).source


def test_every_row_names_a_size_that_timm_has_and_a_paper():
    """A pattern that fits nothing would leave its rate unused without a word."""
    for family, sizes, source in _FAMILIES:
        assert re.search(r'arXiv \d{4}\.\d{5}', source), source
        rest = [name[start.end() :] for name in NAMES if (start := re.match(family, name))]
        left = set(rest)
        for size, rate in sizes.items():
            fitting = {each for each in left if re.match(size, each)}
            assert fitting, (family, size)
            assert 0 <= rate < 1
            left -= fitting


def rates(**kwargs):
    with torch.device('meta'):
        model = timm.create_model('sd_caformer_s18', **kwargs)
    return [own[0].drop_prob for own in network_of(model).drop_paths.values()]


def test_what_is_said_counts():
    """The published rate is the default alone: not of a schedule of probabilities, and 0 drops nothing."""
    assert max(rates()) == pytest.approx(0.15)
    assert rates(drop_path_schedule='uniform') == pytest.approx([0.15] * len(rates()))
    assert max(rates(drop_path_rate=0)) == 0
    assert max(rates(drop_path_rate=0.3)) == pytest.approx(0.3)
    assert max(rates(drop_path_schedule=[1.0, 0.4])) == pytest.approx(0.6)
