"""The drop path rate that each family of timm's architectures was published with.

That of training on ImageNet-1k without further data where there is one, looked up in what the authors have published:
paper, training configuration or instructions. Where that is not known, or no size fits, it is `UNPUBLISHED`.
"""

import re
from typing import NamedTuple

UNPUBLISHED = 0.1

# Family, as a name of timm begins; highest rate by what comes next in the name, the first that fits; source. Where the
# rate was 0, it is known that nothing dropped.
_FAMILIES: tuple[tuple[str, dict[str, float], str], ...] = (
    (
        'convnext_',
        {'tiny$': 0.1, 'small$': 0.4, 'base$': 0.5, 'large$': 0.5, 'xlarge$': 0.5},
        'ConvNeXt, arXiv 2201.03545, table 5; facebookresearch/ConvNeXt, TRAINING.md',
    ),
    (
        'convnextv2_',
        {'tiny': 0.2, 'atto|base': 0.1},
        'ConvNeXt V2, arXiv 2301.00808; facebookresearch/ConvNeXt-V2, TRAINING.md (fine-tuning)',
    ),
    (
        'swin_',
        {'tiny': 0.2, 'small': 0.3, 'base': 0.5, 'large': 0.2},
        'Swin, arXiv 2103.14030; microsoft/Swin-Transformer, configs/swin (large: ImageNet-22k)',
    ),
    (
        'swinv2_',
        {'tiny': 0.2, 'small': 0.3, 'base_window(8|16)': 0.5, 'base|large': 0.2},
        'Swin V2, arXiv 2111.09883; microsoft/Swin-Transformer, configs/swinv2 (window 12: ImageNet-22k)',
    ),
    ('deit_', {'': 0.1}, 'DeiT, arXiv 2012.12877, table 9; facebookresearch/deit, main.py'),
    (
        'deit3_',
        {'small': 0.05, 'base': 0.2, 'large': 0.45, 'huge': 0.6},
        'DeiT III, arXiv 2204.07118; facebookresearch/deit, README_revenge.md (800 epochs)',
    ),
    (
        'beit_',
        {'base': 0.1, 'large': 0.2},
        'BEiT, arXiv 2106.08254; microsoft/unilm, beit/get_started_for_image_classification.md',
    ),
    (
        'beitv2_',
        {'base': 0.1, 'large': 0.25},
        'BEiT v2, arXiv 2208.06366; microsoft/unilm, beit2/get_started_for_image_classification.md',
    ),
    (
        'eva02_',
        {r'(tiny|small|base)_patch14_\d': 0.1, r'large_patch14_\d': 0.15},
        'EVA-02, arXiv 2303.11331; baaivision/EVA, EVA-02/asuka/README.md (fine-tuning)',
    ),
    ('eva_giant_', {r'patch14_\d': 0.4}, 'EVA, arXiv 2211.07636; baaivision/EVA, EVA-01/eva/README.md (fine-tuning)'),
    (
        'cait_',
        {'xxs24|xs24': 0.05, 'xxs36|s24': 0.1, 's36': 0.2, 'm36': 0.3, 'm48': 0.4},
        'CaiT, arXiv 2103.17239, table 3; BR-IDL/PaddleViT, image_classification/CaiT/configs',
    ),
    (
        'xcit_',
        {'small_12': 0.05, 'small_24': 0.1, 'medium_24': 0.15},
        'XCiT, arXiv 2106.09681; facebookresearch/xcit, README.md and detection/configs',
    ),
    ('pvt_v2_', {'b[012]': 0.1, 'b[345]': 0.3}, 'PVT v2, arXiv 2106.13797; whai362/PVT, classification/configs/pvt_v2'),
    ('twins_', {'svt_base': 0.3}, 'Twins, arXiv 2104.13840; Meituan-AutoML/Twins, README.md'),
    (
        'maxvit_',
        {'tiny_tf': 0.2, 'small_tf': 0.3, 'base_tf': 0.4, 'large_tf': 0.6},
        'MaxViT, arXiv 2204.01697; google-research/maxvit, maxvit/models/hp/vision_i1k.py',
    ),
    (
        'coatnet_',
        {'0_224': 0.2, '1_224': 0.3, '2_224': 0.5, '3_224': 0.7},
        'CoAtNet, arXiv 2106.04803, table of hyper-parameters (ImageNet-1k)',
    ),
    (
        '(tf_)?efficientnet_',
        {'b[0-8]|l2|cc_|el$|em$|es$|lite': 0.2},
        'EfficientNet, arXiv 1905.11946, section 5.2; tensorflow/tpu, models/official/efficientnet',
    ),
    ('(tf_)?efficientnetv2_', {'': 0.2}, 'EfficientNetV2, arXiv 2104.00298; google/automl, efficientnetv2/hparams.py'),
    ('(dm_)?nfnet_f', {'': 0.25}, 'NFNet, arXiv 2102.06171; deepmind/deepmind-research, nfnets/experiment_nfnets.py'),
    (
        'nf_regnet_',
        {'': 0.1},
        'NF-RegNet, arXiv 2101.08692; deepmind/deepmind-research, nfnets/experiment_nf_regnets.py',
    ),
    (
        'poolformer(v2)?_',
        {'s12|s24': 0.1, 's36': 0.2, 'm36': 0.3, 'm48': 0.4},
        'PoolFormer, arXiv 2111.11418; sail-sg/poolformer, README.md, and sail-sg/metaformer, scripts',
    ),
    (
        'caformer_',
        {'s18': 0.15, 's36': 0.3, 'm36': 0.4, 'b36': 0.6},
        'MetaFormer baselines, arXiv 2210.13452; sail-sg/metaformer, scripts/caformer',
    ),
    (
        'convformer_',
        {'s18': 0.2, 's36': 0.3, 'm36': 0.4, 'b36': 0.6},
        'MetaFormer baselines, arXiv 2210.13452; sail-sg/metaformer, scripts/convformer',
    ),
    (
        'mvitv2_',
        {'tiny|small$': 0.1, 'base$': 0.3, 'large$': 0.5},
        'MViTv2, arXiv 2112.01526; facebookresearch/mvit, configs',
    ),
    (
        'davit_',
        {'tiny$': 0.1, 'small$': 0.2, 'base$': 0.4},
        'DaViT, arXiv 2204.03645; open-mmlab/mmpretrain, configs/_base_/models/davit',
    ),
    (
        'focalnet_',
        {'tiny': 0.2, 'small': 0.3, 'base|large|xlarge|huge': 0.5},
        'FocalNet, arXiv 2203.11926; microsoft/FocalNet, configs',
    ),
    ('edgenext_', {'(small|base|x_small|xx_small)$': 0.1}, 'EdgeNeXt, arXiv 2206.10589; mmaaz60/EdgeNeXt, README.md'),
    (
        'fastvit_',
        {'sa12|sa24': 0.1, 'sa36': 0.2, 'ma36': 0.35},
        'FastViT, arXiv 2303.14189; apple/ml-fastvit, README.md',
    ),
    (
        'mambaout_',
        {'(femto|kobe)$': 0.025, 'tiny$': 0.2, 'small$': 0.4, 'base$': 0.6},
        'MambaOut, arXiv 2405.07992; yuweihao/MambaOut, scripts',
    ),
    (
        'nextvit_',
        {'small': 0.1, 'base|large': 0.2},
        'Next-ViT, arXiv 2207.05501; bytedance/Next-ViT, classification/nextvit.py',
    ),
    (
        'inception_next_',
        {'atto|tiny': 0.1, 'small': 0.3, 'base': 0.4},
        'InceptionNeXt, arXiv 2303.16900; sail-sg/inceptionnext, scripts',
    ),
    (
        'tiny_vit_',
        {'5m': 0.0, '11m': 0.1, '21m': 0.2},
        'TinyViT, arXiv 2207.10666; microsoft/Cream, TinyViT/configs/1k',
    ),
    (
        'gcvit_',
        {'xxtiny|xtiny|tiny': 0.2, 'small': 0.3, 'base': 0.5},
        'GC ViT, arXiv 2206.09959; NVlabs/GCVit, models/gc_vit.py',
    ),
    (
        'nest_',
        {'tiny': 0.2, 'small': 0.3, 'base': 0.5},
        'NesT, arXiv 2105.12723; google-research/nested-transformer, models/nest_net.py',
    ),
    ('volo_', {'d1': 0.1, 'd2': 0.2, 'd3': 0.5}, 'VOLO, arXiv 2106.13112; sail-sg/volo, README.md'),
    (
        'rdnet_',
        {'tiny': 0.15, 'small': 0.35, 'base': 0.4, 'large': 0.5},
        'RDNet, arXiv 2403.19588; naver-ai/rdnet, TRAINING.md',
    ),
    (
        'coat_',
        {'small': 0.2, 'lite_medium': 0.3, '': 0.0},
        'CoaT, arXiv 2104.06399; mlpc-ucsd/CoaT, README.md and src/args.py',
    ),
    ('levit_(conv_)?', {'384': 0.1, '128|192|256$': 0.0}, 'LeViT, arXiv 2104.01136; facebookresearch/LeViT, levit.py'),
    (
        'fasternet_',
        {'t0': 0.0, 't1': 0.02, 't2': 0.05, 's': 0.1, 'm': 0.2, 'l': 0.3},
        'FasterNet, arXiv 2303.03667; JierunChen/FasterNet, cfg',
    ),
    (
        'starnet_',
        {'s1$': 0.0, 's2|s3': 0.01, 's4': 0.02},
        'StarNet, arXiv 2403.19967; ma-xu/Rewrite-the-Stars, imagenet/README.md',
    ),
    (
        'efficientvit_',
        {'b[123]': 0.05, 'l[123]': 0.1},
        'EfficientViT, arXiv 2205.14756; mit-han-lab/efficientvit, configs/imagenet',
    ),
    ('sequencer2d_', {'s': 0.1, 'l': 0.4}, 'Sequencer, arXiv 2205.01972; okojoalg/sequencer, README.md'),
    ('crossvit_', {'': 0.1}, 'CrossViT, arXiv 2103.14899; IBM/CrossViT, main.py'),
    ('convit_', {'': 0.1}, 'ConViT, arXiv 2103.10697; facebookresearch/convit, main.py'),
    (
        'visformer_',
        {'tiny': 0.03, 'small': 0.1},
        'Visformer, arXiv 2104.12533; danczs/Visformer, README.md and main.py',
    ),
    (
        'vit_',
        {'(large|giant)_patch14_(reg4_)?dinov2': 0.4},
        'DINOv2, arXiv 2304.07193; facebookresearch/dinov2, dinov2/configs/train',
    ),
    (
        'vit_',
        {r'(tiny|small|base|large)_(patch\d+|r26_s32|r50_s32|r_s16_p8)_(224|384)$': 0.1},
        'How to train your ViT, arXiv 2106.10270, section 3: none or 0.1',
    ),
)


class Published(NamedTuple):
    """A drop path rate, and where it comes from."""

    rate: float
    source: str


def published(architecture: str) -> Published:
    """The rate that timm's `architecture`, without tag, was published with, or `UNPUBLISHED`; it is never 0."""
    for family, sizes, source in _FAMILIES:
        if start := re.match(family, architecture):
            for size, rate in sizes.items():
                if re.match(size, architecture[start.end() :]):
                    return Published(rate, source) if rate else Published(UNPUBLISHED, f'published with none: {source}')
    return Published(UNPUBLISHED, 'none published that we know of')
