"""timm ResNets trained with stochastic depth that skip the work they drop. Importing registers the models with timm."""

from . import converted_models, resnet_cifar, resnet_imagenet  # noqa: F401 - registers the models
from .checkpoints import to_resnet
from .convert import convert, unconvert
from .converted_models import register
from .schedules import expected_depth, survival_probs
from .stochastic_depth import StochasticDepth
from .subnetworks import subnetwork

__version__ = '0.2.0'

__all__ = [
    'StochasticDepth',
    '__version__',
    'convert',
    'expected_depth',
    'register',
    'subnetwork',
    'survival_probs',
    'to_resnet',
    'unconvert',
]
