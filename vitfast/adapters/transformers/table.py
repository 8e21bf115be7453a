"""Transformers: ViT, DeiT, BEiT, CLIP, SigLIP, DINOv2, Swin, and every model that holds copies of their layers.

Transformers repeats a layer's source in each model that has it, so a class is known by what its `forward` does: step by
step the same as that of one of the prototypes here, in the version that is installed. And a prototype counts only
while its `forward` mentions nothing but what is known here, so a layer that a new version changed is left alone.

Contracts read in the sources of 5.23 and 4.57: an attention returns `(output, weights)`; outputs are captured by
hooks that are set once and stay; the models' own classes carry the registry of what is captured by name, so they are
left as they are.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ... import layers
from ..known import Swap, around, instructions
from ..torch_nn import decline_head_dim, never
from .attention import CLIPAttention, ViTAttention, ViTSelfAttention
from .embeddings import (
    CLIPVisionEmbeddings,
    DeiTEmbeddings,
    Dinov2Embeddings,
    Dinov2PatchEmbeddings,
    Dinov2WithRegistersEmbeddings,
    SiglipVisionEmbeddings,
    SizedPatchEmbeddings,
    ViTEmbeddings,
    ViTPatchEmbeddings,
)
from .layers import BeitLayer, CLIPEncoderLayer, Dinov2Layer, ViTLayer
from .mlp import Dinov2MLP, ViTIntermediate, ViTMLP, ViTOutput
from .swin import SwinLayer


def _decline_attention(module: Any) -> str | None:
    function = inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")
    if function is not None and instructions(function) not in _softmaxes():
        return "its eager attention is not the plain softmax"
    names = ("q_proj", "k_proj", "v_proj") if hasattr(module, "q_proj") else ("query", "key", "value")
    # what stands in the place of a linear layer need not say how wide it is
    widths = [linear.out_features for name in names if hasattr(linear := getattr(module, name), "out_features")]
    if len(set(widths)) > 1:
        return f"q, k and v are {widths} wide: no kernel shares keys and values between heads"
    heads = getattr(module, "num_heads", None) or getattr(module, "num_attention_heads", None)
    if heads is None:
        return "does not say how many heads it has"
    return decline_head_dim(widths[0] // heads) if widths else None


def _decline_mlp(module: Any) -> str | None:
    names = ("activation_fn", "activation", "intermediate_act_fn")
    act: Any = next(getattr(module, name) for name in names if hasattr(module, name))
    if not isinstance(act, nn.Module) or layers.epilogue(act) is None:
        return f"activation {getattr(act, '__name__', type(act).__name__)} is in no epilogue"
    return None


def _decline_gated(module: Any) -> str:
    return "gated MLP: no kernel has its gate in an epilogue"


@dataclass(frozen=True)
class _Prototype:
    """One class of Transformers whose copies are known.

    Attributes:
        name: `"vit.ViTLayer"` for `transformers.models.vit.modeling_vit.ViTLayer`.
        mixin: the fused layer for it and its copies.
        mentions: the names that its forward takes and mentions, every one. The names of torch's own functions and
            attributes that most of them mention (`_COMMON`) are left out.
        decline: says why a module must stay, or None.
    """

    name: str
    mixin: type[nn.Module]
    mentions: str
    decline: Callable[[nn.Module], str | None] = never


_COMMON = frozenset(
    "self kwargs ValueError cat expand flatten shape size torch transpose type_as unsqueeze to dtype weight view"
    " reshape contiguous training where".split()
)
_INTERFACE = "hidden_states config _attn_implementation ALL_ATTENTION_FUNCTIONS eager_attention_forward"
_SPLIT = f"{_INTERFACE} attention_mask q_proj k_proj v_proj head_dim"
_KEPT_ATTENTION = (
    f"{_INTERFACE} query key value num_attention_heads attention_head_size all_head_size dropout_prob scaling is_causal"
)
_V4_ATTENTION = f"{_KEPT_ATTENTION} head_mask"
_PIXELS = "pixel_values num_channels projection"
_TOKENS = "pixel_values bool_masked_pos interpolate_pos_encoding cls_token mask_token dropout patch_embeddings"
_TOWER = "pixel_values interpolate_pos_encoding patch_embedding position_embedding position_ids"

_PROTOTYPES = (
    _Prototype(
        "vit.ViTAttention",
        ViTAttention,
        f"{_SPLIT} o_proj attention_dropout scaling get_interface",
        _decline_attention,
    ),
    _Prototype(
        "clip.CLIPAttention", CLIPAttention, f"{_SPLIT} out_proj dropout scale get_interface", _decline_attention
    ),
    _Prototype(
        "clip.CLIPAttention",
        CLIPAttention,
        f"{_SPLIT} out_proj dropout scale is_causal causal_attention_mask output_attentions",
        _decline_attention,
    ),
    _Prototype(
        "siglip.SiglipAttention",
        CLIPAttention,
        f"{_SPLIT} out_proj dropout scale is_causal get_interface",
        _decline_attention,
    ),
    _Prototype(
        "siglip.SiglipAttention",
        CLIPAttention,
        f"{_SPLIT} out_proj dropout scale is_causal num_heads",
        _decline_attention,
    ),
    _Prototype("vit.ViTSelfAttention", ViTSelfAttention, _V4_ATTENTION, _decline_attention),
    _Prototype("dinov2.Dinov2SelfAttention", ViTSelfAttention, _V4_ATTENTION, _decline_attention),
    _Prototype("yolos.YolosSelfAttention", ViTSelfAttention, f"{_KEPT_ATTENTION} get_interface", _decline_attention),
    _Prototype("vit.ViTMLP", ViTMLP, "hidden_states activation_fn fc1 fc2", _decline_mlp),
    _Prototype("clip.CLIPMLP", ViTMLP, "hidden_states activation_fn fc1 fc2", _decline_mlp),
    _Prototype("dinov2.Dinov2MLP", Dinov2MLP, "hidden_state activation fc1 fc2", _decline_mlp),
    _Prototype("vit.ViTIntermediate", ViTIntermediate, "hidden_states dense intermediate_act_fn", _decline_mlp),
    _Prototype("vit.ViTOutput", ViTOutput, "hidden_states input_tensor dense dropout"),
    _Prototype("yolos.YolosIntermediate", ViTIntermediate, "hidden_states dense intermediate_act_fn", _decline_mlp),
    _Prototype("yolos.YolosOutput", ViTOutput, "hidden_states input_tensor dense dropout"),
    _Prototype("vitpose_backbone.VitPoseBackboneMLP", Dinov2MLP, "hidden_state activation fc1 fc2", _decline_mlp),
    _Prototype(
        "vit.ViTLayer",
        ViTLayer,
        "hidden_states attention_mask layernorm_before attention layernorm_after mlp dropout",
    ),
    _Prototype(
        "clip.CLIPEncoderLayer",
        CLIPEncoderLayer,
        "hidden_states attention_mask layer_norm1 self_attn layer_norm2 mlp",
    ),
    _Prototype(
        "dinov2.Dinov2Layer",
        Dinov2Layer,
        "hidden_states attention_mask norm1 attention layer_scale1 drop_path norm2 mlp layer_scale2",
    ),
    _Prototype(
        "beit.BeitLayer",
        BeitLayer,
        "hidden_states attention_mask interpolate_pos_encoding resolution patch_size relative_position_bias"
        " layernorm_before attention dropout lambda_1 drop_path layernorm_after mlp lambda_2",
    ),
    _Prototype(
        "swin.SwinLayer",
        SwinLayer,
        "hidden_states input_dimensions always_partition set_shift_and_window_size layernorm_before maybe_pad"
        " window_partition cyclic_shift window_size get_attn_mask device attention dropout window_reverse drop_path"
        " layernorm_after mlp",
    ),
    _Prototype("vit.ViTPatchEmbeddings", ViTPatchEmbeddings, _PIXELS),
    _Prototype("vit.ViTPatchEmbeddings", SizedPatchEmbeddings, f"{_PIXELS} interpolate_pos_encoding image_size"),
    _Prototype("dinov2.Dinov2PatchEmbeddings", Dinov2PatchEmbeddings, _PIXELS),
    _Prototype("vit.ViTEmbeddings", ViTEmbeddings, f"{_TOKENS} position_embeddings image_size"),
    _Prototype("deit.DeiTEmbeddings", DeiTEmbeddings, f"{_TOKENS} position_embeddings image_size distillation_token"),
    _Prototype("dinov2.Dinov2Embeddings", Dinov2Embeddings, f"{_TOKENS} position_embeddings"),
    _Prototype(
        "dinov2_with_registers.Dinov2WithRegistersEmbeddings",
        Dinov2WithRegistersEmbeddings,
        f"{_TOKENS} register_tokens",
    ),
    _Prototype("clip.CLIPVisionEmbeddings", CLIPVisionEmbeddings, f"{_TOWER} class_embedding image_size"),
    _Prototype("siglip.SiglipVisionEmbeddings", SiglipVisionEmbeddings, _TOWER),
    _Prototype("dinov2.Dinov2SwiGLUFFN", layers.FusedMlp, "x down_proj act_fn gate_proj up_proj", _decline_gated),
)


def _class(name: str) -> type[nn.Module] | None:
    """A class of Transformers by a prototype's name, or None where the installed version has none."""
    model, _, kind = name.partition(".")
    try:
        module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    except ImportError:
        return None
    return getattr(module, kind, None)


@functools.cache
def _known() -> dict[tuple[tuple[str, Any], ...], _Prototype]:
    """Prototypes by what their forward does."""
    known = {}
    for prototype in _PROTOTYPES:
        kind = _class(prototype.name)
        if kind is None:
            continue
        forward = inspect.unwrap(kind.forward)
        names = {*inspect.signature(forward).parameters, *forward.__code__.co_names}
        if names - _COMMON == set(prototype.mentions.split()):
            known[instructions(forward)] = prototype
    return known


@functools.cache
def _softmaxes() -> frozenset[tuple[tuple[str, Any], ...]]:
    """The ways in which the layers' files write eager attention: all are the plain softmax.

    Some repeat keys and values for the heads that share them, which is once for the modules that are not declined.
    """
    found = set()
    names = (
        *("vit.ViTLayer", "clip.CLIPEncoderLayer", "siglip.SiglipEncoderLayer", "dinov2.Dinov2Layer"),
        *("altclip.AltCLIPEncoderLayer", "idefics2.Idefics2EncoderLayer", "lw_detr.LwDetrViTAttention"),
    )
    for name in names:
        kind = _class(name)
        function = None if kind is None else inspect.unwrap(kind.forward).__globals__.get("eager_attention_forward")
        if function is not None:
            found.add(instructions(function))
    return frozenset(found)


def _copy_beside(kind: type[nn.Module], name: str) -> type[nn.Module]:
    """The class in a class's file that does what that of another file does; where there is none, one that is unused."""
    original: Any = _class(name)
    wanted = None if original is None else instructions(original.forward)
    for candidate in vars(sys.modules[kind.__module__]).values():
        if isinstance(candidate, type) and issubclass(candidate, nn.Module) and candidate.__module__ == kind.__module__:
            if instructions(candidate.forward) == wanted:
                return candidate
    return nn.Identity


@functools.cache
def find(kind: Any) -> Swap | None:
    """The swap for a class, or None where it is of no interest."""
    if not issubclass(kind, nn.Module) or not hasattr(inspect.unwrap(kind.forward), "__code__"):
        return None
    prototype = _known().get(instructions(kind.forward))
    # language models have gated MLPs too, and those are nobody's business here
    if prototype is None or (prototype.decline is _decline_gated and "SwiGLUFFN" not in kind.__name__):
        return None
    return Swap(around(prototype.mixin, kind), prototype.decline)
