"""Networks whose drop path is not timm's class: torchvision's and transformers'.

Fault 12 of the first edition, where these tests were seen red (commit 495752d): refused, or their rates stayed unsaid.
"""

import copy
import re
import warnings

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

import sd_resnet

from ..conftest import images
from .observed import MODES, RATE, Case, Residual, check_step

torchvision = pytest.importorskip('torchvision')


def convnext_tiny():
    from torchvision.models.convnext import CNBlock, CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(8, 16, 2), CNBlockConfig(16, None, 3)]
    model = ConvNeXt(blocks, stochastic_depth_prob=0.4, layer_scale=0.5, num_classes=10)
    return model, CNBlock, ['stochastic_depth']


def swin_t():
    from torchvision.models.swin_transformer import SwinTransformer, SwinTransformerBlock

    model = SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.4, num_classes=10)
    return model, SwinTransformerBlock, ['stochastic_depth', 'stochastic_depth']


def swin_v2_t():
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformer, SwinTransformerBlockV2

    second = dict(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)
    model = SwinTransformer([4, 4], 8, [2, 2], [2, 2], [4, 4], stochastic_depth_prob=0.4, num_classes=10, **second)
    return model, SwinTransformerBlockV2, ['stochastic_depth', 'stochastic_depth']


def efficientnet_b0():
    from torchvision.models.efficientnet import EfficientNet, MBConv, MBConvConfig

    blocks = [MBConvConfig(1, 3, 1, 8, 8, 2, 1, 1), MBConvConfig(2, 3, 2, 8, 16, 3, 1, 1)]
    model = EfficientNet(blocks, dropout=0.0, stochastic_depth_prob=0.4, num_classes=10)
    return model, MBConv, ['stochastic_depth']


def efficientnet_v2():
    from torchvision.models.efficientnet import EfficientNet, FusedMBConv, FusedMBConvConfig

    model = EfficientNet([FusedMBConvConfig(2, 3, 1, 8, 8, 4)], 0.0, stochastic_depth_prob=0.4, num_classes=10)
    return model, FusedMBConv, ['stochastic_depth']


def maxvit_t():
    from torchvision.models.maxvit import MaxVit, PartitionAttentionLayer

    model = MaxVit((32, 32), 8, 4, [8, 16], [1, 2], 4, stochastic_depth_prob=0.4, num_classes=10)
    return model, PartitionAttentionLayer, ['stochastic_dropout', 'stochastic_dropout']


def convnext_of_one_draw():
    model, kind, slots = convnext_tiny()
    for module in model.modules():
        if rate_of(module) is not None:
            module.mode = 'batch'
    return model, kind, slots


def _transformers(name, **options):
    transformers = pytest.importorskip('transformers')
    if not transformers.utils.is_torch_available():
        pytest.skip('this transformers takes no torch as old as the one installed')
    if not hasattr(transformers, f'{name}Config'):
        pytest.skip(f'this transformers has no {name}')
    torch.manual_seed(0)
    return getattr(transformers, f'{name}Model')(getattr(transformers, f'{name}Config')(drop_path_rate=0.4, **options))


_VIT = dict(
    image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
)
_STAGES = dict(hidden_sizes=[8, 16], depths=[2, 2])
_SWIN = dict(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
_PYRAMID = dict(**_STAGES, num_encoder_blocks=2, num_attention_heads=[1, 2], mlp_ratios=[2, 2], strides=[4, 2])
_HIERA = dict(embed_dim=8, image_size=[32, 32], depths=[1, 2], num_heads=[1, 2], query_stride=[2, 2])
_HIERA |= dict(masked_unit_size=[4, 4], masked_unit_attention=[True, False], num_query_pool=1)
_FOCAL = dict(image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], hidden_sizes=[8, 16], focal_levels=[1, 1])
_ONE, _TWO = ['drop_path'], ['drop_path', 'drop_path']
# Architecture: the class of its blocks, their drop paths, its configuration
TRANSFORMERS = {
    'ConvNext': ('ConvNextLayer', _ONE, dict(**_STAGES, num_stages=2)),
    'ConvNextV2': ('ConvNextV2Layer', _ONE, dict(**_STAGES, num_stages=2)),
    'Swin': ('SwinLayer', _ONE, _SWIN),  # its MLP has no drop path
    'Swinv2': ('Swinv2Layer', _TWO, _SWIN),
    'Dinov2': ('Dinov2Layer', _TWO, _VIT),
    'Dinov2WithRegisters': ('Dinov2WithRegistersLayer', _TWO, _VIT),
    'Beit': ('BeitLayer', _TWO, _VIT),
    'Data2VecVision': ('Data2VecVisionLayer', _TWO, _VIT),
    'Pvt': ('PvtLayer', _TWO, dict(**_PYRAMID, image_size=32, patch_sizes=[4, 2], sequence_reduction_ratios=[2, 1])),
    'Segformer': ('SegformerLayer', _TWO, dict(**_PYRAMID, patch_sizes=[7, 3], sr_ratios=[2, 1])),
    'Hiera': ('HieraLayer', _TWO, _HIERA),
    'FocalNet': ('FocalNetLayer', _TWO, dict(**_FOCAL, focal_windows=[3, 3])),
}


def _hf(name):
    def create():
        kind, slots, options = TRANSFORMERS[name]
        return _transformers(name, **options), kind, slots

    create.__name__ = f'transformers-{name}'
    return create


hf = {name: _hf(name) for name in TRANSFORMERS}
VISION = [convnext_tiny, convnext_of_one_draw, swin_t, swin_v2_t, efficientnet_b0, efficientnet_v2, maxvit_t]
FOREIGN = [*VISION, *hf.values()]
each = pytest.mark.parametrize('create', FOREIGN, ids=lambda create: create.__name__)
SIZE = (3, 32, 32)


def rate_of(module):
    """What anybody's drop path drops at, or None."""
    if type(module).__name__ == 'StochasticDepth' and hasattr(module, 'p'):
        return module.p
    return module.drop_prob if type(module).__name__.endswith('DropPath') else None


def rates(model):
    return {name: rate for name, module in model.named_modules() if (rate := rate_of(module))}


def last(out):
    """Of transformers' outputs the tensor."""
    return out if isinstance(out, torch.Tensor) else out.last_hidden_state


def within(name, names):
    return next((outer for outer in names if name == outer or name.startswith(f'{outer}.')), None)


def accounted(before, done, said):
    """Each drop path is one of a converted block, at its rate, or stays and is named with it in a warning."""
    taken = 0
    for name, rate in before.items():
        block = within(name, done.survival_probs)
        if block is not None:
            assert done.survival_probs[block] == pytest.approx(1 - rate, abs=1e-4), name
            taken += 1
            continue
        holder = within(name, done.left_alone)
        assert holder is not None, f'{name} is neither converted nor named'
        if 'never used' in done.left_alone[holder]:
            taken += 1
            continue
        named = [text for text in said if holder in text]
        assert named, f'no warning names {holder}, which keeps dropping at {rate}'
        numbers = [float(number) for text in named for number in re.findall(r'\d+\.\d+', text)]
        assert any(abs(number - rate) < 0.006 for number in numbers), f'{named} do not state {rate}'
    return taken


def convert(model, *args, **kwargs):
    """What was done, and what was said."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        done = sd_resnet.convert(model, *args, input_size=SIZE, **kwargs)
    return done, [str(warning.message) for warning in caught]


@each
def test_drop_paths_of_others_are_taken_over_with_their_rates_or_named(create):
    """Fault 12."""
    model, _, _ = create()
    before = rates(model)
    assert before
    done, said = convert(model)
    assert accounted(before, done, said) == len(before)


@pytest.mark.parametrize(
    ('create', 'mode'),
    [(create, mode) for create in FOREIGN for mode in MODES],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_evaluation_state_dict_and_the_way_back_are_theirs(create, mode):
    """Fault 12: else their weights would not load."""
    model, _, _ = create()
    plain, x = copy.deepcopy(model), images(2)
    convert(model, mode=mode)
    assert model.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(last(model.eval()(x)), last(plain.eval()(x)))
    sd_resnet.unconvert(model)
    assert [(n, type(m), rate_of(m)) for n, m in model.named_modules()] == [
        (n, type(m), rate_of(m)) for n, m in plain.named_modules()
    ]


class Last(nn.Module):
    """A network that gives a tensor."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return last(self.network(x))


def without_dropping(model):
    for module in model.modules():
        if rate_of(module) is not None:
            setattr(module, 'p' if hasattr(module, 'p') else 'drop_prob', 0.0)
    return model


# Half of efficientnet_b0's drop paths are never used, and maxvit_t's are in two kinds of blocks: no outcome tells
TRAINED = [create for create in FOREIGN if create not in (efficientnet_b0, maxvit_t)]


@pytest.mark.parametrize(
    ('create', 'mode'),
    # In batch mode all of a block drops as one, of Swin the MLP too, which has no drop path of its own; one of Hiera's
    # blocks, which changes the shape, keeps its drop path
    [
        (create, mode)
        for create in TRAINED
        for mode in MODES
        if mode != 'batch' or create not in (hf['Swin'], hf['Hiera'])
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_they_train_as_theirs_for_what_survived(create, mode):
    """Fault 12: output and gradients for the same rows, and something is dropped."""
    model, kind, slots = create()
    if isinstance(kind, str):
        kind = next(type(module) for module in model.modules() if type(module).__name__ == kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.abs().max() < 0.3:
                parameter.uniform_(-0.4, 0.4)
    plain = Last(without_dropping(copy.deepcopy(model)))
    model = Last(model)
    done, _ = convert(model, RATE, 'uniform', mode)
    blocks = [name for name, module in plain.named_modules() if isinstance(module, kind)]
    whole = [
        name
        for name in blocks
        if not any(within(name, [found]) or within(found, [name]) for found in done.survival_probs)
    ]
    assert len(whole) < len(blocks)
    dropped, _ = check_step(Case(model, plain, kind, slots, whole), seeds=range(3))
    assert dropped


@each
def test_they_save_the_work_of_what_they_drop(create):
    """Fault 12: at a rate of 0.4 of five images, three rows go through layers of every block."""
    model, _, _ = create()
    done, _ = convert(model, 0.4, 'uniform', 'subset')
    rows = {}
    for name in done.survival_probs:
        layers = [m for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        for layer in layers:
            layer.register_forward_hook(lambda layer, args, out, name=name: rows.setdefault(name, set()).add(len(out)))
    model.train()(images(5))
    assert rows.keys() == done.survival_probs.keys()
    # Or as many for each image, as of a Swin's windows
    assert all(any(count % 3 == 0 and count % 5 for count in seen) for seen in rows.values())


def test_a_network_that_would_save_nothing_is_refused():
    """What begins with an operation that is no module, on images and inner rows alike, is left to compute by row."""
    with pytest.raises(ValueError, match='drop_path: row: its rows are not images'):
        sd_resnet.convert(timm.create_model('tnt_s_legacy_patch16_224', depth=1), 0.4)


@pytest.mark.parametrize('name', ['Dinov2', 'Swinv2', 'Hiera'])
def test_a_configuration_of_transformers_states_the_size_of_the_images(name):
    model, _, _ = hf[name]()
    assert sd_resnet.convert(model, 0.4).survival_probs


class Mixed(nn.Module):
    """A block that concatenates: without a shortcut its drop path stays."""

    def __init__(self, rate):
        super().__init__()
        self.f = nn.Conv2d(8, 4, 1)
        self.drop_path = DropPath(rate)

    def forward(self, x):
        return torch.cat([x[:, :4], self.drop_path(self.f(x))], 1)


@pytest.mark.parametrize('rate', [None, 0.2, 0.0])
def test_drop_paths_of_timm_that_stay_are_named_with_their_rates(rate):
    """Fault 12, of timm's own class: what is not converted keeps dropping as it did, and each is said."""
    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), *(Mixed(0.1 * index) for index in range(6)), Residual())
    before = rates(model)
    assert len(before) == 5
    done, said = convert(model, rate)
    assert list(done.survival_probs) == ['7']
    assert rates(model).items() >= before.items()
    assert accounted(before, done, said) == 0


def test_a_drop_path_class_of_somebodys_own_is_taken_over():
    """Fault 12: many repositories carry a copy of timm's class."""

    class Dropping(nn.Module):
        def __init__(self, drop_prob):
            super().__init__()
            self.drop_prob = drop_prob

        def forward(self, x):
            if not self.training:
                return x
            kept = torch.empty(x.shape[0], *[1] * (x.dim() - 1), dtype=x.dtype).bernoulli_(1 - self.drop_prob)
            return x * kept / (1 - self.drop_prob)

    Dropping.__name__ = 'DropPath'

    class Block(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.f = nn.Conv2d(8, 8, 1)
            self.drop_path = Dropping(rate)

        def forward(self, x):
            return x + self.drop_path(self.f(x))

    model = nn.Sequential(nn.Conv2d(3, 8, 4, 4), Block(0.1), Block(0.3))
    before = rates(model)
    done, said = convert(model)
    assert accounted(before, done, said) == 2


class Closing(nn.Module):
    """A drop path of a name that tells nothing."""

    def __init__(self, **attributes):
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x):
        return x


class Opening(Closing):
    pass


def network(*closings):
    blocks = [Residual() for _ in closings]
    for block, closing in zip(blocks, closings):
        block.drop_path = closing
    return nn.Sequential(nn.Conv2d(3, 8, 4, 4), *blocks)


def test_further_classes_are_taken_over_where_they_are_named():
    for kinds, names in (((), ['2']), (Closing, ['1', '2', '3'])):
        model = network(Closing(drop_prob=0.1), DropPath(0.2), Opening(p=0.3))
        done = convert(model, drop_path=kinds)[0]
        assert list(done.survival_probs) == names
    assert list(done.survival_probs.values()) == pytest.approx([0.9, 0.8, 0.7])
    other = type('Other', (nn.Identity,), {'p': 0.5})
    done = convert(network(other(), Opening(p=0.3), Closing(p=0.1)), drop_path=(other, Opening))[0]
    assert list(done.survival_probs) == ['1', '2']


@pytest.mark.parametrize('attributes', [{}, {'p': 'a half'}])
def test_a_class_without_a_rate_is_refused_where_it_is_named(attributes):
    """Its rate would be 0 in silence."""
    with pytest.raises(ValueError, match=r'drop_path must be a class with its rate in drop_prob or p, .* Closing') as e:
        convert(network(DropPath(0.2), Closing(**attributes)), drop_path=Closing)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    ('closing', 'why'),
    [
        (type('MyDropPath', (nn.Identity,), {'rate': 0.3})(), 'MyDropPath has no number in drop_prob or p'),
        (DropPath(0.3, scale_by_keep=False), 'scale_by_keep=False'),
    ],
)
def test_one_in_whose_place_no_other_can_stand_stays_and_is_named(closing, why):
    """Taken over, it would drop at rate 0, or divide by the survival probability."""
    model = network(DropPath(0.2), closing)
    done, said = convert(model)
    assert list(done.survival_probs) == ['1']
    assert model[2].drop_path is closing
    assert why in done.left_alone['2.drop_path']
    assert any('2.drop_path (rate' in text and why in text for text in said)
