"""DINOv2's own classes and copies of them, and what MAE, BEiT and others copied from timm.

No package of theirs can be imported here, so a class is offered by its name and by its attributes.

Contracts, of DINOv2's repository: blocks keep their branches' order and drop by `drop_path1` for both; above a rate of
0.1 a training step computes the branches of some images only; lists of images are nested tensors for xFormers;
registers go behind the class token once positions are added; `w` and `h` are named the other way round.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from ... import kernels
from ..known import Call, Declined, Offer, of_images, of_tokens
from ..torch_nn import decline_activation, decline_head_dim
from .layers import (
    CopiedBlock,
    CopiedMlp,
    CopiedPatchEmbed,
    DinoAttention,
    DinoBlock,
    DinoFixedAttention,
    DinoMlp,
    DinoPatchEmbed,
    DinoVisionTransformer,
    LateDropMlp,
)


def _decline_attention(module: Any) -> str | None:
    return decline_head_dim(module.qkv.out_features // (3 * module.num_heads))


def _decline_mlp(module: Any) -> str | None:
    return decline_activation(module.act)


@contextmanager
def _without_xformers(root: Any) -> Iterator[None]:
    """xFormers runs on a GPU alone: what it stands for runs in its place."""
    name = "memory_efficient_attention"
    files = {sys.modules[kind.__module__] for part in root.modules() for kind in type(part).__mro__}
    files = {file for file in files if getattr(file, "XFORMERS_AVAILABLE", False)}
    before = [(file, vars(file).get(name)) for file in files]
    try:
        for file in files:
            setattr(file, name, _attention)
        yield
    finally:
        for file, found in before:
            if found is None:
                delattr(file, name)
            else:
                setattr(file, name, found)


@contextmanager
def _scaled(root: Any) -> Iterator[None]:
    """With another scale than the usual one, which torch's function does not read."""
    if "scale" in vars(root):
        root.scale *= 0.7
    with _without_xformers(root):
        yield


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return kernels.attention_ref(q, k, v, None, q.shape[-1] ** -0.5, False)


def _patch(module: Any) -> Any:
    stem = getattr(module, "patch_embed", module)
    return getattr(stem, "patch_size", None) or stem.proj.kernel_size


def _size(module: Any) -> Any:
    return module.img_size


_BLOCK = "norm1 attn norm2 mlp"
_MODEL = "patch_embed cls_token pos_embed register_tokens num_register_tokens blocks chunked_blocks norm head"

OFFERS = (
    Offer(
        "PatchEmbed",
        "patch_embed",
        (DinoPatchEmbed,),
        "patch_size embed_dim flatten_embedding proj norm",
        of_images(_patch),
    ),
    Offer("PatchEmbed", "patch_embed", (CopiedPatchEmbed,), "patch_size proj", of_images(_patch, _size)),
    Offer(
        "Attention|MemEffAttention",
        "attention",
        (DinoAttention, DinoFixedAttention),
        "num_heads qkv attn_drop proj proj_drop",
        (of_tokens,),
        _decline_attention,
        settings=(_scaled,),
    ),
    Offer("Mlp", "mlp", (DinoMlp, LateDropMlp), "fc1 act fc2 drop", (of_tokens,), _decline_mlp),
    Offer("Mlp", "mlp", (CopiedMlp,), "fc1 act drop1 fc2 drop2", (of_tokens,), _decline_mlp),
    Offer(
        "Block|NestedTensorBlock",
        "block",
        (DinoBlock,),
        f"{_BLOCK} ls1 drop_path1 ls2 drop_path2 sample_drop_ratio",
        (of_tokens,),
        settings=(_without_xformers,),
    ),
    Offer("Block", "block", (CopiedBlock,), f"{_BLOCK} drop_path", (of_tokens,)),
    Offer(
        "DinoVisionTransformer",
        "model",
        (DinoVisionTransformer,),
        _MODEL,
        of_images(_patch, also=(Call((), {"is_training": True}, backward=False),)),
    ),
)
DECLINED = (Declined("SwiGLUFFN|SwiGLUFFNFused", "mlp", "gated MLP: no kernel has its gate in an epilogue", "w12 w3"),)
