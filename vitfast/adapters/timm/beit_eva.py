"""timm's BEiT and EVA: biases beside the layer, positions as a table or as a rotation."""

from __future__ import annotations

from typing import Any, ClassVar

import timm.layers
import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from ... import attention_backends, kernels, layers
from ..known import Rebuilt, asked, handed_on
from .parts import _PartBias


class FusedTimmBeitAttention(_PartBias):
    """`timm.models.beit.Attention`: the relative position bias is read from its table inside the kernel."""

    q_norm = k_norm = layers.IDENTITY

    def core(self, qkv: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[B, N, 3 * H * d]` to `[B, N, H * d]`, with a bias `[H, N, N]` that blocks share."""
        table = self.relative_position_bias_table
        if table is None and bias is None:
            return super().core(qkv)
        q, k, v = self.heads(qkv)
        if bias is not None or self.attention_backend not in attention_backends.OURS:
            return self.mixed(q, k, v, self._summed(bias))
        return self.relative(q, k, v, table, tuple(self.window_size))

    def _summed(self, bias: Tensor | None) -> Tensor | None:
        # of the block and of all blocks, N x N in memory
        if self.relative_position_bias_table is None:
            return bias
        return self._get_rel_pos_bias() if bias is None else self._get_rel_pos_bias() + bias

    def query_key(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`; a bias that blocks share is an argument of the forward's."""
        q, k, _ = super().query_key(x)
        return q, k, self._summed(shared_rel_pos_bias)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        if layers.symbolic(x) or not self.fusable():
            return super().forward(x, shared_rel_pos_bias)
        return self.fused(x, bias=shared_rel_pos_bias)


class _ScaledBlock(layers.FusedBlock, Rebuilt):
    """BEiT's and EVA's blocks: LayerScale as a parameter of the block, and a model that calls them one by one."""

    ls1 = layers.alias("gamma_1")
    ls2 = layers.alias("gamma_2")
    drop_path_class = timm.layers.DropPath
    folds_itself = True


class FusedTimmBeitBlock(_ScaledBlock):
    """`timm.models.beit.Block`."""

    def given(self, bias: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        """The bias that blocks share."""
        return {"bias": bias}

    def attend(self, x: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Call the attention with the keyword that timm's block gives it."""
        return self.attn(x, shared_rel_pos_bias=bias)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        if layers.symbolic(x):
            return super().forward(x, shared_rel_pos_bias)
        return self.fused(x, bias=shared_rel_pos_bias)


class FusedTimmEvaAttention(_PartBias, layers.FusedSplitAttention):
    """Tokens behind the prefix are rotated by their position, by timm's own function.

    q, k and v come from one layer or from three.
    """

    num_prefix_tokens: int
    norm: Any
    # not in every version
    q_norm = property(lambda self: self._modules.get("q_norm", layers.IDENTITY))
    k_norm = property(lambda self: self._modules.get("k_norm", layers.IDENTITY))

    def _form(self) -> Any:
        return layers.FusedSplitAttention if self.qkv is None else _PartBias

    def attended(self, x: Tensor, rope: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Normed tokens `[B, N, D]` to merged heads `[B, N, H * d]`."""
        if self.qkv is not None:
            return self.core(self.packed(x), rope)
        if layers.packable(x, self.q_proj, self.k_proj, self.v_proj):
            return self.core(kernels.linear(x, *self.weights_in(), tf32=self.tf32), rope)
        return self.turned(*self._projected(x), rope)

    def plain_in(self) -> bool:
        """Whether the projection to q, k and v can be computed without calling a module."""
        return self._form().plain_in(self)

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """As the form of the projection has it."""
        return self._form().weights_in(self)

    def limits_in(self) -> list[str]:
        """`limits` of the projection to q, k and v."""
        return self._form().limits_in(self)

    def core(self, qkv: Tensor, rope: Tensor | None = None) -> Tensor:
        """`[B, N, 3 * H * d]` to `[B, N, H * d]`."""
        return super().core(qkv) if rope is None else self.turned(*self.heads(qkv), rope)

    def turned(self, q: Tensor, k: Tensor, v: Tensor, rope: Tensor | None) -> Tensor:
        """`mixed` of rotated q and k: `[B, H, N, d]` thrice to `[B, N, H * d]`."""
        return self.mixed(self._rotated(q, rope, v), self._rotated(k, rope, v), v)

    def _rotated(self, x: Tensor, rope: Tensor | None, like: Tensor) -> Tensor:
        if rope is None:
            return x
        prefix, rest = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        rest = apply_rot_embed_cat(rest, rope, **({"half": True} if getattr(self, "rotate_half", False) else {}))
        return torch.cat([prefix, rest], dim=2).type_as(like)

    def merged(self, out: Tensor) -> Tensor:
        """timm's optional norm of the merged heads."""
        return self.norm(out)

    def query_key(self, x: Tensor, rope: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`; the rotation is an argument of the forward's."""
        q, k, _ = self._form().query_key(self, x)
        return self._rotated(q, rope, q), self._rotated(k, rope, k), None

    def forward(self, x: Tensor, rope: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is timm's own."""
        if asked(args, kwargs) or layers.symbolic(x) or not self.fusable():
            return super().forward(x, rope, *args, **kwargs)  # type: ignore[misc]
        return self.fused(x, rope=rope)


class FusedTimmAttentionRope(FusedTimmEvaAttention):
    """`timm.layers.AttentionRope` without a gate, with as many heads of k and v as of q."""

    q_bias = k_bias = v_bias = None


class FusedTimmEvaBlock(_ScaledBlock):
    """`timm.models.eva.EvaBlock`."""

    def given(self, rope: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        """The rotation."""
        return {"rope": rope}

    # what a block takes and hands on to its attention beside the rotation, by name; versions differ
    handed: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if original := vars(cls).get("replaces"):
            cls.handed = handed_on(original, 3)

    def attend(self, x: Tensor, rope: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Call the attention with the keywords that timm's block gives it."""
        return self.attn(x, rope=rope, **self.handed)

    def forward(self, x: Tensor, rope: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; masked attention is timm's own."""
        if asked(args, kwargs) or layers.symbolic(x):
            return super().forward(x, rope, *args, **kwargs)
        return self.fused(x, rope=rope)
