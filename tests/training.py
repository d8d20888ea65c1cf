"""Small networks of each kind, own and converted, for tests that train them in every way."""

import warnings
from functools import cache

import sd_resnet
from sd_resnet.converted.blocks import BlockDropPath
from sd_resnet.converted.by_branch import BranchDropPath

from .conftest import make
from .families import build

OWN = {'sd_resnet18': 32, 'sd_resnet20_cifar': 16}  # and the height of their images
ANY = {'vit': 'test_vit', 'convnext': 'test_convnext', 'swin': 'swin_tiny_patch4_window7_224', 'regnet': 'regnetx_002'}
KINDS = (*OWN, *ANY)
MODES = ('batch', 'subset', 'row')
BATCH = 5


@cache
def network(kind, mode, ramp=False, rate=0.4):
    """On the host, with 5 classes or 10, and the height of its images; tests copy it."""
    ramp = ('warmup', 4) if ramp else None
    if kind in OWN:
        options = dict(drop_path_rate=rate, drop_path_schedule='uniform', drop_path_mode=mode, drop_path_ramp=ramp)
        return make(kind, **options), OWN[kind]
    model, x = build(ANY[kind], rate=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        sd_resnet.convert(model, rate, 'uniform', mode, ramp=ramp, input_size=tuple(x.shape[1:]))
    # Else what fails in a branch's code would be converted in another way, and the tests be green without it
    way = BlockDropPath if mode == 'batch' else BranchDropPath
    assert {type(each) for each in model.modules() if isinstance(each, sd_resnet.StochasticDepth)} == {way}
    return model, x.shape[-1]
