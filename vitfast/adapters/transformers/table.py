"""Transformers: ViT, DeiT, BEiT, CLIP, SigLIP, DINOv2, Swin, and every model that holds layers like theirs.

Transformers repeats a layer's source in each model that has it, under the model's own name, so offers go by the ends of
names and by attributes. An attention returns `(output, weights)`; outputs are captured by hooks that are set once and
stay; the models' own classes carry the registry of what is captured by name, so they are left as they are.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..known import Call, Declined, Offer, of_images, of_rows, of_tokens, pair, pixels, tokens, width
from ..torch_nn import decline_activation, decline_head_dim
from .attention import CLIPAttention, LoneSelfAttention, ViTAttention, ViTSelfAttention
from .embeddings import (
    CLIPVisionEmbeddings,
    DeiTEmbeddings,
    Dinov2Embeddings,
    Dinov2PatchEmbeddings,
    Dinov2WithRegistersEmbeddings,
    ShapedEmbeddings,
    ShapedPatchEmbeddings,
    SiglipVisionEmbeddings,
    SizedPatchEmbeddings,
    ViTEmbeddings,
    ViTPatchEmbeddings,
)
from .layers import BeitLayer, CLIPEncoderLayer, Dinov2Layer, ViTLayer
from .mlp import Dinov2MLP, ViTIntermediate, ViTMLP, ViTOutput
from .swin import SwinLayer
from .wrapped import (
    TupledAttention,
    TupledBeitAttention,
    TupledBeitLayer,
    TupledCLIPLayer,
    TupledDinov2Layer,
    TupledLayer,
    WrappedAttention,
    WrappedBeitAttention,
    WrappedBeitLayer,
    WrappedDinov2Layer,
    WrappedLayer,
    WrappedSwinLayer,
)


def _decline_attention(module: Any) -> str | None:
    names = ("q_proj", "k_proj", "v_proj") if hasattr(module, "q_proj") else ("query", "key", "value")
    # what stands in the place of a linear layer need not say how wide it is
    widths = [linear.out_features for name in names if hasattr(linear := getattr(module, name), "out_features")]
    if len(set(widths)) > 1:
        return f"q, k and v are {widths} wide: no kernel shares keys and values between heads"
    head_dim = getattr(module, "head_dim", None) or getattr(module, "attention_head_size", None)
    return "does not say how wide its heads are" if head_dim is None else decline_head_dim(head_dim)


def _decline_wrapped(module: Any) -> str | None:
    return _decline_attention(module.attention)


def _wraps(module: Any, names: str = "") -> bool:
    """Whether an attention is a wrapper around queries, keys and values, and an output projection."""
    inner = getattr(module, "attention", None)
    holds = all(hasattr(inner, name) for name in (names or _KEPT).split())
    return holds and hasattr(getattr(module, "output", None), "dense")


def _wraps_beit(module: Any) -> bool:
    return _wraps(module, _KEPT_BEIT)


def _holds_wrapped(module: Any) -> bool:
    return _wraps(module.attention)


def _holds_beit(module: Any) -> bool:
    return _wraps_beit(module.attention)


def _holds_swin(module: Any) -> bool:
    return all(hasattr(getattr(module.attention, "self", None), name) for name in _KEPT_SWIN.split())


def _decline_mlp(module: Any) -> str | None:
    names = ("activation_fn", "activation", "intermediate_act_fn")
    return decline_activation(next(getattr(module, name) for name in names if hasattr(module, name)))


# settings: attention by torch's function, as models are made, and where a block stands for the softmax in Python too


@contextmanager
def _attends(root: Any, implementation: str) -> Iterator[None]:
    before = []
    for module in root.modules():
        config = vars(module).get("config")
        if hasattr(config, "_attn_implementation"):
            before.append((module, config))
            module.config = copy.copy(config)
            vars(module.config)["_attn_implementation_internal"] = implementation
    try:
        yield
    finally:
        for module, config in before:
            module.config = config


def _sdpa(root: Any) -> Any:
    return _attends(root, "sdpa")


def _eager(root: Any) -> Any:
    return _attends(root, "eager")


# examples


def _with_none(module: Any) -> list[Call]:
    """Where a mask has no default."""
    return [Call((*call.args, None), backward=call.backward) for call in of_tokens(module)]


def _with_two(module: Any) -> list[Call]:
    """Where two masks have no default."""
    return [Call((*call.args, None, None), backward=call.backward) for call in of_tokens(module)]


def _with_residual(module: Any) -> list[Call]:
    rows, columns = module.dense.weight.shape
    return [
        Call((tokens(2, 5, columns), tokens(2, 5, rows))),
        Call((tokens(1, 41, columns), tokens(1, 41, rows)), backward=False),
    ]


def _of_beit(module: Any) -> list[Call]:
    size, bias = width(module.attention), module.relative_position_bias
    if bias is None:
        return of_rows(size)
    rows, cols = bias.window_size
    resolution = {"resolution": (rows * module.patch_size, cols * module.patch_size)}
    return [
        Call((tokens(2, rows * cols + 1, size),), resolution),
        Call((tokens(1, rows * cols + 1, size),), {**resolution, "interpolate_pos_encoding": True}, backward=False),
    ]


def _of_wrapped_beit(module: Any) -> list[Call]:
    """Of a layer, or of the attention inside, which wraps another one."""
    wrapper = module.attention if _wraps_beit(module.attention) else module
    inner = wrapper.attention
    size, patch = width(inner), inner.config.patch_size
    if not inner.has_relative_position_bias:
        return of_rows(size)
    rows, cols = inner.relative_position_bias.window_size
    resolution = {"resolution": (rows * patch, cols * patch)}
    x, count = tokens(2, rows * cols + 1, size), rows * cols + 1
    shared = torch.randn(inner.num_attention_heads, count, count, dtype=torch.float64)
    return [
        Call((x,), resolution),
        Call((x[:1],), {**resolution, "relative_position_bias": shared}, backward=False),
        Call((x[:1],), {**resolution, "interpolate_pos_encoding": True}, backward=False),
    ]


def _of_map(module: Any) -> list[Call]:
    side, size = module.window_size, width(module.attention)
    return [
        Call((tokens(2, 2 * side * 3 * side, size), (2 * side, 3 * side))),
        Call((tokens(1, (2 * side + 1) * side, size), (2 * side + 1, side)), backward=False),
    ]


def _convolution(module: Any) -> Any:
    stem = getattr(module, "patch_embeddings", module)
    return getattr(stem, "projection", None) or module.patch_embedding


def _patch(module: Any) -> Any:
    return _convolution(module).kernel_size


def _size(module: Any) -> Any:
    return getattr(module, "image_size", None) or getattr(getattr(module, "patch_embeddings", None), "image_size", None)


def _resized(module: Any) -> list[Call]:
    """The module's own size, and another with resized positions."""
    (rows, cols), (height, length) = pair(_patch(module)), pair(_size(module))
    return [
        Call((pixels(module, 2, 2 * rows, 3 * cols),), {"interpolate_pos_encoding": True}),
        Call((pixels(module, 1, height, length),), backward=False),
    ]


_ATTENTION = "config head_dim num_attention_heads q_proj k_proj v_proj o_proj scaling attention_dropout is_causal"
_KEPT = "config attention_head_size num_attention_heads query key value scaling dropout_prob is_causal"
_KEPT_BEIT = "config attention_head_size num_attention_heads query key value dropout has_relative_position_bias"
_KEPT_SWIN = "attention_head_size query key value dropout relative_position_bias_table window_size"
_TOWER = "config num_heads head_dim q_proj k_proj v_proj out_proj scale dropout"
_TOKENS = "patch_embeddings cls_token position_embeddings dropout"
_IMAGES = of_images(_patch, _size)
_EMBEDDED = (_IMAGES[0], _resized, _IMAGES[1])
_BLOCK = "layernorm_before attention layernorm_after mlp dropout"
_HALVES = "layernorm_before attention layernorm_after intermediate output"
_DINO = "norm1 attention layer_scale1 drop_path norm2 mlp layer_scale2"


def _attention(has: str, *mixins: type[Any]) -> Offer:
    return Offer(
        ".*Attention",
        "attention",
        mixins,
        has,
        (of_tokens, _with_none),
        _decline_attention,
        # Swin's is computed by its layer
        lambda module: not hasattr(module, "relative_position_bias"),
        settings=(_sdpa,),
    )


def _block(has: str, *mixins: type[Any], example: Any = of_tokens, **more: Any) -> Offer:
    # eager attention has its softmax in fp32
    examples = (example, _with_none, _with_two)
    return Offer(".*Layer", "block", mixins, has, examples, settings=(_sdpa, _eager), rtol=3e-6, **more)


OFFERS = (
    _attention(_ATTENTION, ViTAttention),
    _attention(_TOWER, CLIPAttention),
    _attention(_KEPT, ViTSelfAttention, LoneSelfAttention),
    Offer(
        ".*Attention",
        "attention",
        (WrappedAttention, TupledAttention),
        "attention output",
        (of_tokens,),
        _decline_wrapped,
        _wraps,
        settings=(_sdpa,),
    ),
    Offer(
        ".*Attention",
        "attention",
        (WrappedBeitAttention, TupledBeitAttention),
        "attention output",
        (_of_wrapped_beit,),
        _decline_wrapped,
        _wraps_beit,
        settings=(_sdpa,),
    ),
    Offer(".*MLP", "mlp", (ViTMLP,), "fc1 activation_fn fc2", (of_tokens,), _decline_mlp),
    Offer(".*MLP", "mlp", (Dinov2MLP,), "fc1 activation fc2", (of_tokens,), _decline_mlp),
    Offer(".*Intermediate", "mlp", (ViTIntermediate,), "dense intermediate_act_fn", (of_tokens,), _decline_mlp),
    Offer(
        "(?!.*(Self|Attention|Cross)).*Output",
        "mlp",
        (ViTOutput,),
        "dense dropout",
        (_with_residual,),
        concerns=lambda module: (
            "input_tensor" in inspect.signature(type(module).forward).parameters
            # BERT's has a norm behind it
            and len(module._modules) == 2
        ),
    ),
    _block(f"{_BLOCK} lambda_1 relative_position_bias patch_size", BeitLayer, example=_of_beit),
    _block(f"{_BLOCK} window_size shift_size drop_path", SwinLayer, example=_of_map),
    _block(_BLOCK, ViTLayer, concerns=lambda module: not hasattr(module, "window_size")),
    _block("layer_norm1 self_attn layer_norm2 mlp", CLIPEncoderLayer, TupledCLIPLayer),
    _block(_DINO, WrappedDinov2Layer, TupledDinov2Layer, concerns=_holds_wrapped),
    _block(_DINO, Dinov2Layer, concerns=lambda module: not _holds_wrapped(module)),
    _block(_HALVES, WrappedLayer, TupledLayer, concerns=_holds_wrapped),
    _block(
        f"{_HALVES} lambda_1 drop_path",
        WrappedBeitLayer,
        TupledBeitLayer,
        example=_of_wrapped_beit,
        concerns=_holds_beit,
    ),
    _block(f"{_HALVES} window_size shift_size drop_path", WrappedSwinLayer, example=_of_map, concerns=_holds_swin),
    Offer(
        ".*PatchEmbeddings",
        "patch_embed",
        (ViTPatchEmbeddings, SizedPatchEmbeddings, Dinov2PatchEmbeddings, ShapedPatchEmbeddings),
        "projection patch_size",
        _IMAGES,
    ),
    Offer(".*Embeddings", "patch_embed", (DeiTEmbeddings,), f"{_TOKENS} distillation_token", _EMBEDDED),
    Offer(".*Embeddings", "patch_embed", (Dinov2WithRegistersEmbeddings,), f"{_TOKENS} register_tokens", _EMBEDDED),
    Offer(".*Embeddings", "patch_embed", (ViTEmbeddings, Dinov2Embeddings, ShapedEmbeddings), _TOKENS, _EMBEDDED),
    Offer(
        ".*Embeddings",
        "patch_embed",
        (CLIPVisionEmbeddings,),
        "class_embedding patch_embedding position_embedding position_ids image_size",
        (_resized, *_IMAGES),
    ),
    Offer(
        ".*Embeddings",
        "patch_embed",
        (SiglipVisionEmbeddings,),
        "patch_embedding position_embedding position_ids image_size",
        (_resized, *_IMAGES),
    ),
)
DECLINED = (Declined(".*SwiGLUFFN", "mlp", "gated MLP: no kernel has its gate in an epilogue"),)
