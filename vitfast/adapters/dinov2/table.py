"""DINOv2's own classes, and the copies of them that other projects carry under other module paths.

No package of theirs can be imported here, so a class is known by its name and by what it does: its `forward` takes the
arguments that it should, mentions no name that is not known, and computes on a small example what the fused layer
stands for. A copy that somebody changed fails one of these and is left alone.

Contracts, of the repository's code: blocks keep their branches' order and drop by `drop_path1` for both; above a rate
of 0.1 a training step computes the branches of some images only; lists of images are nested tensors for xFormers;
registers go behind the class token once positions are added; `w` and `h` are named the other way round.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import layers
from ..known import Swap, around
from ..torch_nn import decline_head_dim
from .layers import DinoAttention, DinoBlock, DinoFixedAttention, DinoMlp, DinoPatchEmbed, DinoVisionTransformer

# what a class must be to be known


@dataclass(frozen=True)
class _Prototype:
    """One class of DINOv2.

    Attributes:
        mixin: the fused layer for it.
        has: attributes that its objects have, to be taken for one at all.
        methods: by method, the arguments that it may take beside `self` and `x`, and the names that it may mention,
            None for any.
        computes: says whether a class computes on an example what the fused layer does, or a mixin that fits instead.
        decline: says why a module must stay, or None.
    """

    mixin: type[nn.Module]
    has: str
    methods: dict[str, tuple[str, str | None]]
    computes: Callable[[Any], Any]
    decline: Callable[[Any], str | None] = lambda module: None


def _names(code: CodeType) -> set[str]:
    """What a function mentions, with what is defined inside it."""
    inner = [const for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*map(_names, inner))


def _fits(kind: Any, prototype: _Prototype) -> bool:
    for name, (arguments, mentions) in prototype.methods.items():
        method = inspect.unwrap(getattr(kind, name, None) or (lambda: None))
        if not inspect.isfunction(method):
            return False
        taken = set(inspect.signature(method).parameters) - {"self", "x"}
        if taken - set(arguments.split()):
            return False
        if mentions is not None and _names(method.__code__) - _COMMON - set(mentions.split()):
            return False
    return True


_COMMON = frozenset(
    "torch nn functional shape dtype device Tensor AssertionError super forward reshape transpose".split()
)


@contextmanager
def _apart() -> Iterator[None]:
    """Small tensors of double precision, whatever a user set, and no random number of his drawn."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
        torch.manual_seed(0)
        yield


def _example(kind: Any, **attributes: Any) -> Any:
    """An object of a class with nothing but these attributes, in evaluation mode."""
    module = object.__new__(kind)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module.double().eval()


def _equal(actual: Any, expected: Tensor) -> bool:
    return isinstance(actual, Tensor) and actual.shape == expected.shape and torch.allclose(actual, expected)


def _norm() -> nn.LayerNorm:
    norm = nn.LayerNorm(6)
    nn.init.normal_(norm.weight)
    return norm


def _computes_patch_embed(kind: Any) -> bool:
    proj = nn.Conv2d(3, 6, (2, 4), (2, 4))
    sizes = {"patch_size": (2, 4), "embed_dim": 6, "flatten_embedding": True}
    module = _example(kind, proj=proj, norm=_norm(), **sizes)
    x = torch.randn(2, 3, 4, 12, dtype=torch.double)
    tokens = module.norm(module.proj(x).flatten(2).transpose(1, 2))
    flat = _equal(module.forward(x), tokens)
    module.flatten_embedding = False
    return flat and _equal(module.forward(x), tokens.unflatten(1, (2, 3)))


def _computes_attention(kind: Any) -> Any:
    x = torch.randn(2, 5, 12, dtype=torch.double)
    qkv, proj = nn.Linear(12, 36), nn.Linear(12, 12)
    for drop in (nn.Dropout(0.0), 0.0):
        more = {"attn_drop": drop, "proj_drop": nn.Dropout(0.0)}
        module = _example(kind, num_heads=3, scale=0.7, qkv=qkv, proj=proj, **more)
        q, k, v = module.qkv(x).unflatten(2, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        try:
            out = module.forward(x)
        except TypeError:
            # a rate where a module was expected, or the other way round
            continue
        for mixin, scale in ((DinoAttention, 0.7), (DinoFixedAttention, 0.5)):
            merged = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
            if _equal(out, module.proj(merged)):
                return mixin
    return None


def _computes_efficient_attention(kind: Any) -> Any:
    # with xFormers it runs on a GPU alone: then the class behind it is asked, and the names that it mentions
    base = kind.__mro__[1]
    if getattr(sys.modules[kind.__module__], "XFORMERS_AVAILABLE", True):
        return _computes_attention(base) if _fits(base, _ATTENTION) else None
    return _computes_attention(kind)


def _computes_mlp(kind: Any) -> bool:
    module = _example(kind, fc1=nn.Linear(6, 10), act=nn.GELU(), drop=nn.Dropout(0.0), fc2=nn.Linear(10, 6))
    x = torch.randn(2, 5, 6, dtype=torch.double)
    return _equal(module.forward(x), module.fc2(module.act(module.fc1(x))))


def _computes_block(kind: Any) -> bool:
    branches = {name: nn.Linear(6, 6) for name in ("attn", "ls1", "mlp", "ls2")}
    drops = {"drop_path1": nn.Identity(), "drop_path2": nn.Identity(), "sample_drop_ratio": 0.0}
    module = _example(kind, norm1=_norm(), norm2=_norm(), **branches, **drops)
    x = torch.randn(2, 5, 6, dtype=torch.double)
    first = x + module.ls1(module.attn(module.norm1(x)))
    expected = first + module.ls2(module.mlp(module.norm2(first)))
    found = [_equal(module.train(mode).forward(x), expected) for mode in (False, True)]
    # in evaluation the rate must not matter
    module.sample_drop_ratio = 0.5
    return all(found) and _equal(module.eval().forward(x), expected)


def _computes_nested_block(kind: Any) -> bool:
    # it hands a tensor to the class behind it
    return _fits(kind.__mro__[1], _PLAIN_BLOCK) and _computes_block(kind)


def _computes_model(kind: Any) -> bool:
    embed = nn.Conv2d(3, 6, 2, 2)
    x = torch.randn(2, 3, 4, 6, dtype=torch.double)
    for count in (0, 2):
        tokens = {
            "cls_token": nn.Parameter(torch.randn(1, 1, 6)),
            "mask_token": nn.Parameter(torch.randn(1, 6)),
            "register_tokens": nn.Parameter(torch.randn(1, count, 6)) if count else None,
            "num_register_tokens": count,
        }
        module = _example(
            kind,
            patch_embed=nn.Sequential(embed, nn.Flatten(2), _Transpose()),
            blocks=nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)]),
            norm=_norm(),
            head=nn.Linear(6, 3),
            chunked_blocks=False,
            **tokens,
        )
        pos = torch.randn(1, 7, 6, dtype=torch.double)
        module.interpolate_pos_encoding = lambda x, w, h, pos=pos: pos if (x.shape[1], w, h) == (7, 4, 6) else None
        expected = torch.cat((module.cls_token.expand(2, -1, -1), module.patch_embed(x)), 1) + pos
        if count:
            registers = module.register_tokens.expand(2, -1, -1)
            expected = torch.cat((expected[:, :1], registers, expected[:, 1:]), 1)
        if not _equal(module.prepare_tokens_with_masks(x), expected):
            return False
        for block in module.blocks:
            expected = block(expected)
        normed = module.norm(expected)
        parts = {
            "x_norm_clstoken": normed[:, 0],
            "x_norm_regtokens": normed[:, 1 : 1 + count],
            "x_norm_patchtokens": normed[:, 1 + count :],
            "x_prenorm": expected,
        }
        got = module.forward_features(x)
        if not isinstance(got, dict) or got.keys() != {*parts, "masks"} or got["masks"] is not None:
            return False
        if not all(_equal(got[name], part) for name, part in parts.items()):
            return False
        if not _equal(module.forward(x), module.head(normed[:, 0])):
            return False
    return True


class _Transpose(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


def _decline_attention(module: Any) -> str | None:
    return decline_head_dim(module.qkv.out_features // (3 * module.num_heads))


def _decline_mlp(module: Any) -> str | None:
    if layers.epilogue(module.act) is None:
        return f"activation {type(module.act).__name__} is in no epilogue"
    return None


def _decline_gated(module: Any) -> str:
    return "gated MLP: no kernel has its gate in an epilogue"


_ATTENTION = _Prototype(
    DinoAttention,
    "num_heads qkv attn_drop proj proj_drop",
    {
        "forward": (
            "is_causal",
            "qkv num_heads permute scale softmax attn_drop proj proj_drop unbind F scaled_dot_product_attention"
            " training contiguous view",
        )
    },
    _computes_attention,
    _decline_attention,
)
_BLOCK_HAS = "norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2 sample_drop_ratio"
_BLOCK_MENTIONS = (
    "norm1 attn ls1 drop_path1 norm2 mlp ls2 drop_path2 sample_drop_ratio training drop_add_residual_stochastic_depth"
)
_PLAIN_BLOCK = _Prototype(DinoBlock, _BLOCK_HAS, {"forward": ("", _BLOCK_MENTIONS)}, _computes_block)
_NESTED_BLOCK = _Prototype(
    DinoBlock,
    _BLOCK_HAS,
    {"forward": ("x_or_x_list", "isinstance list XFORMERS_AVAILABLE forward_nested")},
    _computes_nested_block,
)
_GATED = _Prototype(layers.FusedMlp, "w12 w3", {}, lambda kind: True, _decline_gated)

PROTOTYPES = {
    "PatchEmbed": _Prototype(
        DinoPatchEmbed,
        "patch_size embed_dim flatten_embedding proj norm",
        {"forward": ("", "patch_size proj size flatten norm flatten_embedding embed_dim")},
        _computes_patch_embed,
    ),
    "Attention": _ATTENTION,
    "MemEffAttention": _Prototype(
        DinoAttention,
        _ATTENTION.has,
        {
            "forward": (
                "attn_bias",
                # the last two in its first versions, where a bias chose the operator
                "XFORMERS_AVAILABLE qkv num_heads unbind memory_efficient_attention proj proj_drop"
                " fmha MemoryEfficientAttentionFlashAttentionOp",
            )
        },
        _computes_efficient_attention,
        _decline_attention,
    ),
    "Mlp": _Prototype(DinoMlp, "fc1 act fc2 drop", {"forward": ("", "fc1 act drop fc2")}, _computes_mlp, _decline_mlp),
    "SwiGLUFFN": _GATED,
    "SwiGLUFFNFused": _GATED,
    "Block": _PLAIN_BLOCK,
    "NestedTensorBlock": _NESTED_BLOCK,
    "DinoVisionTransformer": _Prototype(
        DinoVisionTransformer,
        "patch_embed cls_token pos_embed register_tokens num_register_tokens blocks chunked_blocks norm head",
        {
            "forward": ("args is_training kwargs", "forward_features head"),
            "forward_features": (
                "masks",
                "isinstance list forward_features_list prepare_tokens_with_masks blocks norm num_register_tokens",
            ),
            "prepare_tokens_with_masks": (
                "masks",
                "patch_embed where unsqueeze mask_token to cat cls_token expand interpolate_pos_encoding"
                " register_tokens",
            ),
            # called as it is
            "interpolate_pos_encoding": ("w h", None),
        },
        _computes_model,
    ),
}


@functools.cache
def _mixin(kind: Any) -> type[nn.Module] | None:
    """The fused layer that computes what a class does, or None."""
    prototype = PROTOTYPES[kind.__name__]
    if not _fits(kind, prototype):
        return None
    try:
        with _apart():
            computes = prototype.computes(kind)
    except Exception:
        # a changed copy may ask for anything that the example has not
        return None
    return computes if isinstance(computes, type) else prototype.mixin if computes else None


def _layer_scale_beside(kind: type[nn.Module]) -> type[nn.Module]:
    """The class `LayerScale` that a block's file uses, if it multiplies by `gamma`; else one that is unused."""
    found = getattr(sys.modules[kind.__module__], "LayerScale", None)
    if not isinstance(found, type):
        return nn.Identity
    with _apart():
        try:
            module = _example(found, gamma=nn.Parameter(torch.randn(6)), inplace=False)
            x = torch.randn(2, 6, dtype=torch.double)
            return found if _equal(module.forward(x), x * module.gamma) else nn.Identity
        except Exception:
            return nn.Identity


@functools.cache
def find(kind: Any) -> Swap | None:
    """The swap for a class, or None where it is of no interest."""
    prototype = PROTOTYPES.get(kind.__name__)
    if prototype is None or not issubclass(kind, nn.Module) or "forward" not in vars(kind):
        return None
    mixin = _mixin(kind)

    def concerns(module: Any) -> bool:
        return all(hasattr(module, name) for name in prototype.has.split())

    if mixin is None:
        fused = around(prototype.mixin, kind)
        return Swap(fused, lambda module: "its forward does something else than DINOv2's", concerns)
    if prototype is _GATED:
        return Swap(layers.FusedMlp, prototype.decline, concerns)
    return Swap(around(mixin, kind), prototype.decline, concerns)
