"""timm's BEiT and EVA: biases beside the layer, positions as a table or as a rotation."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import apply_rot_embed_cat
from torch import Tensor

from ... import layers
from ...layers import backends
from ..known import Rebuilt, asked, handed_on, without_proxies
from .parts import FusedTimmPartBias


class FusedTimmBeitAttention(FusedTimmPartBias):
    """`timm.models.beit.Attention`: the relative position bias is read from its table inside the kernel."""

    q_norm = k_norm = layers.IDENTITY

    def derive(self, plan: layers.AttentionPlan) -> dict[str, Any]:
        """The biases as one, and the table by columns."""
        table = self.relative_position_bias_table
        columns = {} if table is None else {"table": layers.by_columns(table)}
        return {**super().derive(plan), **columns}

    def attend(  # type: ignore[override]
        self, qkv: Tensor, plan: layers.AttentionPlan, bias: Tensor | None = None
    ) -> Tensor:
        """`[B, N, 3 * H * d]` to `[B, N, H * d]`, with a bias `[H, N, N]` that blocks share."""
        table = self.relative_position_bias_table
        if table is None and bias is None:
            return super().attend(qkv, plan)
        q, k, v = self.heads(qkv)
        if bias is not None or self.attention_backend not in backends.OURS:
            return self.softmax_attention(q, k, v, self._summed(bias))
        columns = layers.kept(plan.table, qkv, lambda: layers.by_columns(table))
        return self.relative_attention(q, k, v, columns, tuple(self.window_size))

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
        plan = self.plan_for(x)
        if plan is None:
            return super().forward(x, shared_rel_pos_bias)
        return self.fused(x, plan, bias=shared_rel_pos_bias)


class _ScaledBlock(layers.FusedBlock, Rebuilt):
    """BEiT's and EVA's blocks: LayerScale as a parameter of the block, and a model that calls them one by one."""

    ls1 = layers.alias("gamma_1")
    ls2 = layers.alias("gamma_2")


class FusedTimmBeitBlock(_ScaledBlock):
    """`timm.models.beit.Block`."""

    def attention_inputs(self, bias: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
        """The bias that blocks share."""
        return {"bias": bias}

    def attend(self, x: Tensor, bias: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Call the attention with the keyword that timm's block gives it."""
        return self.attn(x, shared_rel_pos_bias=bias)

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`."""
        plan = self.plan_for(x)
        if plan is None:
            return super().forward(x, shared_rel_pos_bias)
        return self.fused(x, plan, bias=shared_rel_pos_bias)


class FusedTimmEvaAttention(FusedTimmPartBias, layers.FusedSplitAttention):
    """Tokens behind the prefix are rotated by their position, by timm's own function.

    q, k and v come from one layer or from three.
    """

    num_prefix_tokens: int
    norm: Any
    # not in every version
    q_norm = property(lambda self: self._modules.get("q_norm", layers.IDENTITY))
    k_norm = property(lambda self: self._modules.get("k_norm", layers.IDENTITY))

    def _form(self) -> Any:
        return layers.FusedSplitAttention if self.qkv is None else FusedTimmPartBias

    def plan_in(self, notes: list[str]) -> bool:
        """As the form of the projection has it."""
        return self._form().plan_in(self, notes)

    def derive(self, plan: layers.AttentionPlan) -> dict[str, Any]:
        """As the form of the projection has it."""
        return self._form().derive(self, plan)

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """As the form of the projection has it."""
        return self._form().weights_in(self)

    def project_in(self, x: Tensor, plan: layers.AttentionPlan) -> Any:
        """Normed tokens `[B, N, D]` to q, k and v, packed or three."""
        return self._form().project_in(self, x, plan)

    def attend(self, qkv: Any, plan: layers.AttentionPlan, rope: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """q, k and v to merged heads `[B, N, H * d]`, q and k rotated by their positions."""
        if rope is None and not isinstance(qkv, tuple):
            return super().attend(qkv, plan)
        q, k, v = qkv if isinstance(qkv, tuple) else self.heads(qkv)
        return self.softmax_attention(self._rotated(q, rope, v), self._rotated(k, rope, v), v)

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
        if layers.symbolic(x):
            return super().forward(x, rope, *without_proxies(args), **without_proxies(kwargs))  # type: ignore[misc]
        plan = None if asked(args, kwargs) else self.plan_for(x)
        if plan is None:
            return super().forward(x, rope, *args, **kwargs)  # type: ignore[misc]
        return self.fused(x, plan, rope=rope)


class FusedTimmAttentionRope(FusedTimmEvaAttention):
    """`timm.layers.AttentionRope` without a gate, with as many heads of k and v as of q."""

    q_bias = k_bias = v_bias = None


class FusedTimmEvaBlock(_ScaledBlock):
    """`timm.models.eva.EvaBlock`."""

    def attention_inputs(self, rope: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
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
        if layers.symbolic(x):
            return super().forward(x, rope, *without_proxies(args), **without_proxies(kwargs))
        plan = None if asked(args, kwargs) else self.plan_for(x)
        if plan is None:
            return super().forward(x, rope, *args, **kwargs)
        return self.fused(x, plan, rope=rope)
