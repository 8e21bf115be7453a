"""torch.nn: the modules that every library's models share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import kernels, layers
from .known import Call, Declined, Offer, Rebuilt, of_rows, of_tokens


class FusedLayerNorm(layers.FusedLayerNorm, Rebuilt):
    """`torch.nn.LayerNorm` over one dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return layers.call_leaf(self, x) if layers.symbolic(x) else super().forward(x)


class FusedMultiheadAttention(layers.FusedAttention, Rebuilt):
    """`torch.nn.MultiheadAttention` with one weight for q, k and v: self-attention without masks or weights asked for.

    Tokens are `[B, N, D]`, or `[N, B, D]` without `batch_first`; all steps take them as they are. The output
    projection's weights are read, as torch does: that module is never called, so its hooks never ran.
    """

    q_norm = k_norm = attn_drop = proj_drop = layers.IDENTITY
    proj = layers.alias("out_proj")

    @property
    def scale(self) -> float:  # type: ignore[override]
        """Of the scores."""
        return (self.in_proj_weight.shape[0] // (3 * self.num_heads)) ** -0.5

    def why_dropout(self, notes: list[str]) -> str:
        """Why dropout has the original run."""
        return self.why_rate("attention dropout", self.dropout, notes)

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """`(output, weights or None)`; what is not plain self-attention is torch's own."""
        if layers.symbolic(query):
            more = (key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            return layers.call_leaf(self, query, *more)
        if (
            query is key is value
            and not need_weights
            and not is_causal
            and key_padding_mask is None
            and attn_mask is None
            and query.dim() == 3
            and (plan := self.plan_for(query)) is not None
        ):
            return self.fused(query, plan), None
        return super().forward(
            query,
            key,
            value,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )

    def plan_in(self, notes: list[str]) -> bool:
        """Always: the projection's weights are the module's own."""
        return True

    def plan_out(self, notes: list[str]) -> bool:
        """Of the output projection the weights are read, whatever hangs on it."""
        if held := layers.foreign(self.out_proj):
            notes.append(f"out_proj holds a {held}: called as a module")
        return not held

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[3 * D, D]` and bias of the projection to q, k and v."""
        return self.in_proj_weight, self.in_proj_bias

    def project_in(self, x: Tensor, plan: layers.AttentionPlan) -> Tensor:
        """Normed tokens to q, k and v `[..., 3 * H * d]`."""
        return kernels.linear(x, *self.weights_in(), tf32=self.tf32)

    def attend(self, qkv: Tensor, plan: layers.AttentionPlan) -> Tensor:
        """`[..., 3 * H * d]` to `[..., H * d]`."""
        if self.batch_first:
            return super().attend(qkv, plan)
        return super().attend(qkv.transpose(0, 1), plan).transpose(0, 1)

    def position_free(self) -> bool:
        """Whether tokens are where `attend_prefix` looks for them."""
        return self.batch_first

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`."""
        qkv = nn.functional.linear(x, *self.weights_in())
        q, k, _ = self.heads(qkv if self.batch_first else qkv.transpose(0, 1))
        return q, k, None


def place(index: int) -> Any:
    """A class attribute that names the module at a place of an `nn.Sequential`."""
    return property(lambda self: tuple(self._modules.values())[index])


class FusedSequential(layers.FusedMlp, Rebuilt):
    """An MLP whose modules stand in a row: linear layer, activation, linear layer.

    Modules are named by their places, so one with more or fewer of them is left to `nn.Sequential`.
    """

    length = 3
    fc1 = place(0)
    act = place(1)
    drop1 = drop2 = layers.IDENTITY
    fc2 = place(2)

    def why_original(self) -> str:
        """Whether there are as many modules as there were."""
        return super().why_original() or ("" if len(self) == self.length else "has other modules than it had")


def decline_layer_norm(module: Any) -> str | None:
    """Why a LayerNorm must stay: the kernel normalises one dimension, of bounded width."""
    shape = module.normalized_shape
    if len(shape) != 1:
        return f"normalises {len(shape)} dimensions; the kernel one"
    if shape[0] > (widest := kernels.MAX_WIDTH):
        return f"is {shape[0]} wide; the kernel takes up to {widest}"
    return None


def _decline_attention(module: Any) -> str | None:
    if module.in_proj_weight is None:
        return "separate weights for q, k and v"
    if module.bias_k is not None or module.add_zero_attn:
        return "adds a key and a value of its own (add_bias_kv, add_zero_attn)"
    return decline_head_dim(module.embed_dim // module.num_heads)


def _is_mlp(module: Any) -> bool:
    if type(module) is not nn.Sequential or len(module) != FusedSequential.length:
        return False
    first, act, second = module
    return isinstance(first, nn.Linear) and isinstance(second, nn.Linear) and layers.epilogue(act) is not None


def decline_head_dim(width: int) -> str | None:
    """Why attention must stay whose heads are wider than the kernel's."""
    return None if width <= kernels.MAX_HEAD_DIM else f"head dim {width}; the kernel takes up to {kernels.MAX_HEAD_DIM}"


def decline_activation(act: Any) -> str | None:
    """Why an MLP must stay whose activation is in no kernel's epilogue."""
    if layers.epilogue(act) is not None:
        return None
    return f"activation {getattr(act, '__name__', type(act).__name__)} is in no epilogue"


def of_norm(module: Any) -> list[Call]:
    """Rows of a LayerNorm."""
    return of_rows(module.normalized_shape[-1])


def _of_attention(module: Any) -> list[Call]:
    calls = []
    for call in of_tokens(module):
        x = call.args[0] if module.batch_first else call.args[0].transpose(0, 1)
        calls.append(Call((x, x, x), {"need_weights": False}, backward=call.backward))
    return calls


OFFERS = (
    Offer("LayerNorm", "layer_norm", (FusedLayerNorm,), "normalized_shape eps", (of_norm,), decline_layer_norm),
    Offer(
        "MultiheadAttention",
        "attention",
        (FusedMultiheadAttention,),
        "in_proj_weight out_proj num_heads",
        (_of_attention,),
        _decline_attention,
    ),
    Offer("Sequential", "mlp", (FusedSequential,), "", (of_tokens,), concerns=_is_mlp),
)
DECLINED: tuple[Declined, ...] = ()
