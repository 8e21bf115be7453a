"""Our models in timm's registry: `vitfast_<name>` for each name of `vitfast.list_models()` that timm has too.

Imported by `vitfast.register("timm")`. Each is the model of `vitfast.create_model`, not accelerated, with timm's own
`pretrained_cfg` of the name: tags, checkpoints and how images are wanted are timm's.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    get_arch_pretrained_cfgs,
    get_pretrained_cfg,
    is_model,
    register_model,
)
from timm.models.vision_transformer import checkpoint_filter_fn

from ..reference.architectures import ARCHITECTURES, create_model
from ..reference.vit import VisionTransformer

PREFIX = "vitfast_"


def _build(name: str, **options: Any) -> VisionTransformer:
    model: Any = create_model(name, **options)
    # for `features_only`
    reduction = max(model.patch_embed.patch_size)
    model.feature_info = [
        {"module": f"blocks.{i}", "num_chs": model.embed_dim, "reduction": reduction} for i in range(len(model.blocks))
    ]
    return model


def _entrypoint(name: str) -> Any:
    def build(pretrained: bool = False, **options: Any) -> VisionTransformer:
        return build_model_with_cfg(
            functools.partial(_build, name),
            PREFIX + name,
            pretrained,
            pretrained_filter_fn=functools.partial(checkpoint_filter_fn, adapt_layer_scale=True),
            feature_cfg={"out_indices": options.pop("out_indices", 3), "feature_cls": "getter"},
            **options,
        )

    build.__name__ = build.__qualname__ = PREFIX + name
    build.__doc__ = f"`vitfast.create_model({name!r})`, with what timm does around a model."
    return build


def _cfgs(name: str) -> dict[str, Any]:
    """timm's configurations of a name under ours; a star marks the default one for `generate_default_cfgs`."""
    default = get_pretrained_cfg(name).tag
    cfgs = {}
    for cfg in get_arch_pretrained_cfgs(name).values():
        if cfg.custom_load:
            # a file that timm's class reads by itself; the hub has it converted
            cfg = dataclasses.replace(cfg, url="", custom_load=False)
        tag = cfg.tag or ""
        cfgs[".".join(filter(None, (PREFIX + name, tag))) + ("*" if tag and tag == default else "")] = cfg
    return cfgs


_NAMES = [name for name in ARCHITECTURES if is_model(name)]

# timm reads it here, when an entry point of this module is registered, and lists the names in `__all__`
default_cfgs = generate_default_cfgs({key: cfg for name in _NAMES for key, cfg in _cfgs(name).items()})
__all__: list[str] = []

for _name in _NAMES:
    globals()[PREFIX + _name] = register_model(_entrypoint(_name))
