"""Models of somebody else, as in anybody's repository."""

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

URL = 'https://example.org/their_resnet.pth'
SHAPE = dict(block=BasicBlock, layers=(2, 1, 1, 1), channels=(16, 24, 32, 48), aa_layer=nn.AvgPool2d)


def _cfg(**kwargs):
    return dict(num_classes=1000, input_size=(3, 96, 96), first_conv='conv1', classifier='fc', **kwargs)


default_cfgs = generate_default_cfgs(
    {
        'their_resnet.first': _cfg(hf_hub_id='them/their_resnet'),
        'their_resnet.second*': _cfg(url=URL),
        'their_untagged_resnet': _cfg(),
    }
)


@register_model
def their_resnet(pretrained=False, **kwargs):
    return build_model_with_cfg(ResNet, 'their_resnet', pretrained, **dict(SHAPE, **kwargs))


@register_model
def their_untagged_resnet(pretrained=False, **kwargs):
    return build_model_with_cfg(ResNet, 'their_untagged_resnet', pretrained, **dict(SHAPE, **kwargs))


@register_model
def their_changed_resnet(pretrained=False, **kwargs):
    model = build_model_with_cfg(ResNet, 'their_changed_resnet', pretrained, **dict(SHAPE, **kwargs))
    model.maxpool = nn.Identity()
    return model


class Halved(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x) / 2


@register_model
def their_wrapped_resnet(pretrained=False, **kwargs):
    return Halved(build_model_with_cfg(ResNet, 'their_wrapped_resnet', pretrained, **dict(SHAPE, **kwargs)))


@register_model
def their_filtered_resnet(pretrained=False, **kwargs):
    kwargs['pretrained_filter_fn'] = lambda state_dict, model: {k[4:]: v for k, v in state_dict.items()}
    return build_model_with_cfg(ResNet, 'their_filtered_resnet', pretrained, **dict(SHAPE, **kwargs))


@register_model
def their_resnet_by_hand(pretrained=False, **kwargs):
    return ResNet(**dict(SHAPE, **kwargs))


@register_model
def their_vit(pretrained=False, **kwargs):
    return build_model_with_cfg(VisionTransformer, 'their_vit', pretrained, **dict(dict(embed_dim=48), **kwargs))
