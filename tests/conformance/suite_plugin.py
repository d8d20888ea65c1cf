"""pytest plugin for timm's own model tests: shows them this package's models alone.

timm's file picks models with `list_models`. Tests of `forward_intermediates` go by the names of timm's modules, to
which this package's two are added.
"""

import os

import timm

import sd_resnet  # noqa: F401

_list_models = timm.list_models
_wanted = os.environ.get('SD_RESNET_SUITE_MODELS', '').split()


def list_models(filter='', module='', **kwargs):
    if isinstance(module, (list, tuple)):
        module = [*module, 'resnet_imagenet', 'resnet_cifar']
    names = [name for name in _list_models(filter, module, **kwargs) if name.startswith('sd_')]
    return [name for name in names if not _wanted or name.split('.')[0] in _wanted]


timm.list_models = list_models
