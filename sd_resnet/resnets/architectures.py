"""What timm builds its `ResNet`s with, asked of its own entrypoints: each version of timm has its own."""

import inspect
import sys
from threading import get_ident
from typing import Any

import torch
from timm.models import build_model_with_cfg, model_entrypoint, resnet

_BUILDER = build_model_with_cfg.__name__
_OPTIONS = inspect.signature(build_model_with_cfg).parameters.keys() - {'kwargs'}  # the builder's own


def recorded(name: str) -> dict[str, Any] | None:
    """The arguments with which timm's entrypoint `name` builds a `ResNet` of timm's own two blocks.

    Something else stands for timm's builder while the entrypoint is called: nothing is built. None where it builds
    anything else (Res2Net, ResNeSt and SK-Net put blocks of their own into the class), and where the arguments would
    not tell all: the entrypoint changes what was built, gives the builder options, or reaches it by a detour.
    """
    create, thread, calls = model_entrypoint(name), get_ident(), []

    def stand_in(model_cls: Any, variant: str, pretrained: bool = False, **kwargs: Any) -> Any:
        if get_ident() != thread:
            return build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
        calls.append((model_cls, variant, kwargs))
        return calls

    spaces = [vars(resnet), vars(sys.modules[create.__module__])]
    spaces = [space for space in spaces if space.get(_BUILDER) is build_model_with_cfg]
    try:
        for space in spaces:
            space[_BUILDER] = stand_in
        with torch.device('meta'):  # where it builds by itself
            built = create()
    except Exception:
        return None
    finally:
        for space in spaces:
            space[_BUILDER] = build_model_with_cfg
    if built is not calls or len(calls) != 1:
        return None
    model_cls, variant, args = calls[0]
    timms = all(block in (resnet.BasicBlock, resnet.Bottleneck) for block in blocks_of(args))
    return args if model_cls is resnet.ResNet and variant == name and timms and not _OPTIONS & args.keys() else None


def blocks_of(args: dict[str, Any]) -> tuple[Any, ...]:
    """Of timm's `ResNet` the class of each stage's blocks, or the one of all."""
    blocks = args.get('block')
    return tuple(blocks) if isinstance(blocks, list | tuple) else (blocks,)
