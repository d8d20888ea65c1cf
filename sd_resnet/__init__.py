"""timm ResNets trained with stochastic depth that skip the work they drop. Importing registers the models with timm."""

from .analysis.subnetworks import subnetwork
from .converted import converted_models  # noqa: F401 - registers
from .converted.convert import convert, unconvert
from .converted.converted_models import register
from .core.drop_path import StochasticDepth
from .core.schedules import expected_depth, survival_probs
from .resnets import resnet_cifar, resnet_imagenet  # noqa: F401 - registers
from .resnets.checkpoints import to_resnet

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
