"""The smallest model of many families of timm, where that is large made smaller: name, arguments, image size."""

import timm

_VIT = dict(img_size=32, embed_dim=48, depth=3, num_heads=2)
_SWIN = dict(img_size=64, window_size=4, depths=(2, 2), embed_dim=16, num_heads=(2, 2))
_STAGES = dict(depths=(1, 1, 2, 1), embed_dims=(16, 16, 16, 16), num_heads=(2, 2, 2, 2))

CONVERTED = {
    'beit_base_patch16_224': (_VIT, 32),
    'cait_xxs24_224': (dict(_VIT, num_heads=4), 32),
    'convit_tiny': (dict(_VIT, num_heads=4, local_up_to_layer=2), 32),
    'cs3darknet_focus_s': ({}, 32),
    'davit_tiny': (dict(_STAGES, embed_dims=(16, 16, 32, 32)), 64),
    'deit3_small_patch16_224': (_VIT, 32),
    'edgenext_xx_small': ({}, 64),
    'fasternet_t0': ({}, 32),
    'fastvit_t8': ({}, 64),
    'hiera_tiny_224': (dict(img_size=64, stages=(1, 2, 2, 1), embed_dim=16), 64),
    'inception_next_atto': ({}, 64),
    'mobilenetv3_small_050': ({}, 32),
    'pvt_v2_b0': ({}, 64),
    'regnetx_002': ({}, 32),
    'resnetv2_18': ({}, 32),
    'skresnet18': (dict(channels=(8, 8, 16, 16)), 32),
    'starnet_s050': ({}, 32),
    'swiftformer_xs': ({}, 64),
    'swin_tiny_patch4_window7_224': (_SWIN, 64),
    'swinv2_tiny_window8_256': (_SWIN, 64),
    'swinv2_cr_tiny_224': (_SWIN, 64),
    'test_convnext': ({}, 32),
    'test_convnext3': ({}, 32),
    'test_mambaout': ({}, 32),
    'test_maxvit': ({}, 160),
    'test_resnet': ({}, 32),
    'test_vit': (dict(img_size=32), 32),
    'test_vit4': (dict(img_size=32), 32),
    'test_vit_relpos': (dict(img_size=32), 32),
    'tf_efficientnetv2_b0': (dict(channel_multiplier=0.25), 32),
    'twins_svt_small': (_STAGES, 64),
    'vit_tiny_patch16_dinov3_qkvb': (_VIT, 32),
    'xcit_nano_12_p8_224': (_VIT, 32),
}

REFUSED = {
    'coat_tiny': 'does not reach its output by a shortcut',
    'efficientvim_m1': 'something else than one tensor',
    'gcvit_xxtiny': 'a further argument for each image',
    'mvitv2_tiny': 'something else than one tensor',
    'rdnet_tiny': 'something else than one tensor',
    'tiny_vit_5m_224': 'does not reach its output by a shortcut',
    'tnt_s_legacy_patch16_224': 'something else than one tensor',
    'vgg11': 'no drop path',
}

for _young in ('test_maxvit', 'test_vit_relpos', 'efficientvim_m1'):  # than the oldest timm that is supported
    if not timm.is_model(_young):
        CONVERTED.pop(_young, None)
        REFUSED.pop(_young, None)
