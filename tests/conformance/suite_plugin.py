"""pytest plugin for timm's own model tests: shows them this package's models alone.

timm's file picks models with `list_models`. Tests of `forward_intermediates` go by the names of timm's modules, to
which this package's are added. What timm leaves out for a model is left out for its converted one.
"""

import os
from fnmatch import fnmatch

import pytest
import timm

import sd_resnet  # noqa: F401

_list_models = timm.list_models
_wanted = os.environ.get('SD_RESNET_SUITE_MODELS', '').split()
_converted = _list_models(module='converted_models')


def list_models(filter='', module='', include_tags=False, exclude_filters='', **kwargs):
    if isinstance(module, (list, tuple)):
        module = [*module, 'resnet_imagenet', 'resnet_cifar', 'converted_models']
    names = _list_models(filter, module, include_tags=include_tags, exclude_filters=exclude_filters, **kwargs)
    excluded = [exclude_filters] if isinstance(exclude_filters, str) else exclude_filters
    return [
        name
        for name in names
        if name.startswith('sd_')
        and (not _wanted or name.split('.')[0] in _wanted)
        and not (name.split('.')[0] in _converted and any(fnmatch(name.removeprefix('sd_'), f) for f in excluded))
    ]


timm.list_models = list_models


def pytest_collection_modifyitems(items):
    """timm's own time-outs, of some minutes, are those of a quiet machine; these only end a hang."""
    for item in items:
        item.add_marker(pytest.mark.timeout(1800), append=False)
