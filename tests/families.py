"""One small model of each class of timm that has a drop path, and how tests build it.

Made smaller where it is large and its builder takes the arguments: name, arguments, image size.
"""

import timm
import torch
from packaging.version import Version

_VIT = dict(img_size=32, embed_dim=48, depth=3, num_heads=2)
_SHALLOW = dict(_VIT, depth=2)
_SWIN = dict(img_size=64, window_size=4, depths=(2, 2), embed_dim=16, num_heads=(2, 2))
_STAGES = dict(depths=(1, 1, 2, 1), embed_dims=(16, 16, 16, 16), num_heads=(2, 2, 2, 2))
_WIDER = dict(_STAGES, embed_dims=(16, 16, 32, 32))
_XCEPTION = [dict(in_chs=64, out_chs=64, stride=stride) for stride in (1, 2)]
_XCEPTION += [dict(in_chs=64, out_chs=(64, 96, 96), stride=1, no_skip=True, start_with_relu=False)]

CONVERTED = {
    'beit_base_patch16_224': (_VIT, 32),
    'cait_xxs24_224': (dict(_VIT, num_heads=4), 32),
    'coat_tiny': (dict(img_size=64, embed_dims=(16,) * 4, serial_depths=(1,) * 4, parallel_depth=2), 64),
    'convit_tiny': (dict(_VIT, num_heads=4, local_up_to_layer=2), 32),
    'cpubone_nano': ({}, 64),
    'crossvit_tiny_240': (dict(embed_dim=(24, 48), depth=((1, 2, 0),), num_heads=(2, 2)), 240),
    'cs3darknet_focus_s': ({}, 32),
    'csatv2': (dict(dims=(16, 24, 32, 48), depths=(1, 1, 2, 2), transformer_depths=(0, 0, 1, 1)), 64),
    'cspnext_tiny': ({}, 32),
    'davit_tiny': (_WIDER, 64),
    'deepseek_vit_412m': (dict(_SHALLOW, img_size=42), 42),
    'deepseek_vit_412m_enc': (dict(_SHALLOW, img_size=42, out_features=48), 42),
    'deit_tiny_distilled_patch16_224': (_VIT, 32),
    'edgenext_xx_small': ({}, 64),
    'efficientformer_l1': (dict(depths=(1, 1, 1, 2), embed_dims=(16, 16, 32, 32)), 224),
    'efficientformerv2_s0': (dict(img_size=64, depths=(1, 1, 2, 2), embed_dims=(16, 16, 32, 32)), 64),
    'ese_vovnet39b': ({}, 32),
    'fasternet_t0': ({}, 32),
    'fastvit_t8': ({}, 64),
    'focalnet_tiny_srf': ({}, 64),
    'gcvit_xxtiny': (dict(img_size=64), 64),
    'gmlp_ti16_224': (dict(img_size=32), 32),
    'hgnetv2_b0': ({}, 32),
    'hiera_tiny_224': (dict(img_size=64, stages=(1, 2, 2, 1), embed_dim=16), 64),
    'iformer_t': (dict(dims=(16, 16, 32, 32), depths=(1, 1, 6, 3), attn_groups=(0, 0, 1, 1)), 64),
    'inception_next_atto': ({}, 64),
    'levit_128s': (dict(img_size=64, embed_dim=(32, 32, 64), depth=(1, 1, 1), num_heads=(2, 2, 2)), 64),
    'lowformer_b0': (dict(depth_list=(0, 1, 1, 1, 2)), 64),
    'mobilenetv3_small_050': ({}, 32),
    'mobilenetv5_base': (dict(channel_multiplier=0.1), 64),
    'mvitv2_tiny': ({}, 64),
    'naflexvit_base_patch16_gap': (dict(embed_dim=48, depth=2, num_heads=2), 32),
    'nest_tiny': (dict(img_size=32), 32),
    'nextvit_small': (dict(depths=(1, 1, 5, 1)), 64),
    'pit_ti_224': (dict(img_size=64), 64),
    'poolformer_s12': ({}, 32),
    'pvt_v2_b0': ({}, 64),
    'qwen3_vit_88m': (_SHALLOW, 32),
    'qwen3_vit_88m_enc': (dict(_SHALLOW, out_features=48), 32),
    'regnetx_002': ({}, 32),
    'resnetv2_18': ({}, 32),
    'rexnet_100': (dict(width_mult=0.25), 32),
    'sam2_hiera_tiny': (dict(stages=(1, 1, 2, 1), global_att_blocks=(3,), embed_dim=16), 64),
    'samvit_base_patch16_224': (dict(_VIT, img_size=64), 64),
    'sequencer2d_s': (dict(layers=(1,) * 4, embed_dims=(16,) * 4, hidden_sizes=(8,) * 4, img_size=56), 56),
    'skresnet18': (dict(channels=(8, 8, 16, 16)), 32),
    'starnet_s050': ({}, 32),
    'swiftformer_xs': ({}, 64),
    'swin_tiny_patch4_window7_224': (_SWIN, 64),
    'swinv2_cr_tiny_224': (_SWIN, 64),
    'swinv2_tiny_window8_256': (_SWIN, 64),
    'test_byobnet': ({}, 32),
    'test_convnext': ({}, 32),
    'test_mambaout': ({}, 32),
    'test_maxvit': ({}, 160),
    'test_nfnet': ({}, 32),
    'test_resnet': ({}, 32),
    'test_vit': (dict(img_size=32), 32),
    'test_vit_relpos': (dict(img_size=32), 32),
    'tf_efficientnetv2_b0': (dict(channel_multiplier=0.25), 32),
    'tiny_vit_5m_224': (dict(_WIDER, window_sizes=(4, 4, 4, 2)), 64),
    'tresnet_m': (dict(layers=(1, 1, 1, 1), width_factor=0.25), 64),
    'twins_svt_small': (_STAGES, 64),
    'visformer_tiny': (dict(img_size=64, embed_dim=48, depth=(1, 1, 1), num_heads=2), 64),
    'vit_base_patch16_xp_224': (_VIT, 32),  # beside its class's, as its attention and MLP drop together
    'vit_tiny_patch16_dinov3_qkvb': (_VIT, 32),
    'volo_d1_224': (dict(img_size=64), 64),
    'xception41': (dict(block_cfg=_XCEPTION), 32),
    'xcit_nano_12_p8_224': (_VIT, 32),
}

# Too large to be trained here, and not to be made smaller: what becomes of their drop paths is seen without data
ON_META = {'mobilenetv5_300m_enc': (dict(channel_multiplier=0.1), 64)}

REFUSED = {
    'efficientvim_m1': 'begins with an operation that is no module',
    'gemma4_vit_167m': 'Gemma4Block fails',
    'gemma4_vit_167m_enc': 'Gemma4Block fails',
    'rdnet_tiny': 'not added to a shortcut',
    'resnest14d': 'not added to a shortcut',
    'tnt_s_legacy_patch16_224': 'its rows are not images',
    'vgg11': 'no drop path',
}

COMPLETE = Version(timm.__version__) >= Version('1.0.31')  # else some names are not known yet
for _names in (CONVERTED, ON_META, REFUSED):
    for _name in [name for name in _names if not timm.is_model(name)]:
        del _names[_name]
if not COMPLETE:
    # GCViT's windows took the queries of other images of the mini-batch, so that a part of it was another function;
    # Gemma 4 read values, which a trial run does not have
    CONVERTED.pop('gcvit_xxtiny', None)
    for _name in ('gemma4_vit_167m', 'gemma4_vit_167m_enc'):
        REFUSED.pop(_name, None)


def build(name, rate=0.0, **kwargs):
    """A network without dropout, whose branches do not start at zero, and images for it."""
    options, size = CONVERTED[name]
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, drop_path_rate=rate, **options, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 1e-3:  # zero-initialised norms, layer scales and gains
                parameter.uniform_(0.2, 0.6)
    return model, torch.randn(5, 3, size, size)
