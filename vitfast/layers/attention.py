"""Self-attention: packed q, k and v in, merged heads out, LayerScale and residual in the output projection."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import kernels
from . import backends
from .base import FusedLayer, original_of
from .guards import add_residual, compute_linear, deriving, hooked, is_plain, linear
from .known import inactive


class AttentionPlan(NamedTuple):
    """How an attention runs.

    Attributes:
        original: why the original forward runs, or "".
        notes: what is left to the original's modules, one sentence each.
        plain_in: the projection to q, k and v is computed without calling a module.
        plain_out: so is the output projection.
        drops: dropout behind the output projection is at work.
        normed: q and k are normalised by modules.
        packed: weight `[3 * H * d, D]` and bias that stand in several tensors, as one; derived from frozen weights.
        table: of relative positions `[rows, H]`, as a kernel reads it; derived from frozen weights.
        scales: of cosine attention, one per head; derived from frozen weights.
    """

    original: str
    notes: tuple[str, ...]
    plain_in: bool
    plain_out: bool
    drops: bool
    normed: bool
    packed: tuple[Tensor, Tensor | None] | None = None
    table: Tensor | None = None
    scales: Tensor | None = None

    @property
    def complete(self) -> bool:
        """Whether no module inside is called but a norm of q and k."""
        return not self.original and self.plain_in and self.plain_out and not self.drops


class FusedAttention(FusedLayer):
    """Self-attention whose projection to q, k and v is one layer."""

    kind = "attention"
    qkv: Any
    q_norm: Any
    k_norm: Any
    attn_drop: Any
    proj: Any
    proj_drop: Any
    num_heads: int
    scale: float

    # the plan

    def make_plan(self, derive: bool = False) -> AttentionPlan:
        """Which of the modules inside are computed without being called."""
        notes: list[str] = []
        original = original_of(self) or self.why_dropout(notes)
        plain_in = self.plan_in(notes)
        plain_out = self.plan_out(notes)
        normed = not (is_plain(self.q_norm, nn.Identity) and is_plain(self.k_norm, nn.Identity))
        plan = AttentionPlan(original, tuple(notes), plain_in, plain_out, not inactive(self.proj_drop), normed)
        return plan._replace(**self.derive(plan)) if derive and not original else plan

    def derive(self, plan: AttentionPlan) -> dict[str, Any]:
        """What is computed once of frozen weights, by the names that it has in the plan."""
        return {}

    def why_dropout(self, notes: list[str]) -> str:
        """Why attention's own dropout has the original run, which no kernel has; noted where it will in training."""
        drop = self.attn_drop
        if hooked(drop):
            return "attn_drop has hooks"
        # the original reads the rate from the dropout, and whether it trains from itself or the dropout
        rate = getattr(drop, "p", 0.0)
        return self.why_rate("attention dropout", rate, notes) or ("" if inactive(drop) else "attn_drop is at work")

    def why_rate(self, what: str, rate: float, notes: list[str]) -> str:
        """The same for a rate that is an attribute."""
        if rate and self.training:
            return f"{what} {rate:g}, in training"
        if rate:
            notes.append(f"{what} {rate:g}: the original forward runs in training")
        return ""

    def plan_in(self, notes: list[str]) -> bool:
        """Whether the projection to q, k and v is computed without calling a module."""
        return linear("qkv", self.qkv, notes)

    def plan_out(self, notes: list[str]) -> bool:
        """Whether the output projection is."""
        return linear("proj", self.proj, notes)

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[3 * H * d, D]` and bias of the projection to q, k and v; asked for where that is plain."""
        return self.qkv.weight, self.qkv.bias

    # the forward, in three steps

    def fused(
        self,
        x: Tensor,
        plan: AttentionPlan,
        residual: Tensor | None = None,
        scale: Tensor | None = None,
        **inputs: Any,
    ) -> Tensor:
        """`residual + scale * attention(x)`, `[B, N, D]` to `[B, N, D]`; further inputs are for `attend`."""
        return self.project(self.attend(self.project_in(x, plan), plan, **inputs), plan, residual, scale)

    def project_in(self, x: Tensor, plan: AttentionPlan) -> Any:
        """Normed tokens `[B, N, D]` to what `attend` takes, q, k and v as `[B, N, 3 * H * d]`."""
        return compute_linear(plan.plain_in, self.qkv, x, None, None, self.tf32)

    def attend(self, qkv: Any, plan: AttentionPlan) -> Tensor:
        """`[B, N, 3 * H * d]` to merged heads `[B, N, H * d]`."""
        if not plan.normed:
            backend = self.attention_backend
            out = backends.attention_qkv(qkv, self.num_heads, self.scale, tf32=self.tf32, backend=backend)
            return self.merged(out)
        return self.softmax_attention(*self.heads(qkv))

    def project(
        self, out: Tensor, plan: AttentionPlan, residual: Tensor | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """`residual + scale * proj(out)`, `[B, N, H * d]` to `[B, N, D]`."""
        if not plan.drops:
            return compute_linear(plan.plain_out, self.proj, out, residual, scale, self.tf32)
        out = self.proj_drop(compute_linear(plan.plain_out, self.proj, out, None, None, self.tf32))
        return add_residual(out, residual, scale)

    def softmax_attention(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[B, H, N, d]` thrice to `[B, N, H * d]`; the bias is added to the scaled scores."""
        backend = self.attention_backend
        out = backends.attention(q, k, v, self.scale, bias, tf32=self.tf32, backend=backend)
        return self.merged(out.transpose(1, 2).flatten(2))

    def relative_attention(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """`softmax_attention` with BEiT's bias, read from its table `[rows, H]`, by columns, for a grid of patches."""
        backend = self.attention_backend
        out = backends.relative_attention(q, k, v, table, grid, self.scale, tf32=self.tf32, backend=backend)
        return self.merged(out.transpose(1, 2).flatten(2))

    def merged(self, out: Tensor) -> Tensor:
        """What the model does to the merged heads `[B, N, H * d]`: nothing, here."""
        return out

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `[B, H, N, d]`, q and k normalised where the model does that."""
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    # for who wants less, or more

    def position_free(self) -> bool:
        """Whether no token's query is treated by where it stands, so that some tokens' queries may be left out."""
        return True

    def attend_prefix(self, x: Tensor, count: int) -> Tensor:
        """The merged heads of the first tokens' queries alone: normed `[B, N, D]` to `[B, count, H * d]`.

        Asked for where the plan is complete.
        """
        weight, bias = self.weights_in()
        width = weight.shape[0] // 3
        q = kernels.linear(x[:, :count], weight[:width], None if bias is None else bias[:width], tf32=self.tf32)
        kv = kernels.linear(x, weight[width:], None if bias is None else bias[width:], tf32=self.tf32)
        k, v = kv.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = q.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return self.softmax_attention(self.q_norm(q), self.k_norm(k), v)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What enters the softmax, of normed tokens `[B, N, D]`, for whoever wants the probabilities.

        Returns:
            `(q, k, bias)`: q and k `[B, H, N, d]`, and what is added to `scale * q @ k.T`, or None.
        """
        q, k, _ = self.heads(self.qkv(x))
        return q, k, None


class FusedSplitAttention(FusedAttention):
    """Self-attention with a linear layer each for q, k and v; of frozen weights, one GEMM computes all three."""

    q_proj: Any
    k_proj: Any
    v_proj: Any

    def plan_in(self, notes: list[str]) -> bool:
        """Whether all three are computed without calling a module."""
        names = ("q_proj", "k_proj", "v_proj")
        return all([linear(name, getattr(self, name), notes) for name in names])

    def derive(self, plan: AttentionPlan) -> dict[str, Any]:
        """The three layers as one."""
        return {"packed": self.weights_in()} if plan.plain_in else {}

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[3 * H * d, D]` and bias of the three layers as one, which copies them."""
        return joined(self.q_proj, self.k_proj, self.v_proj)

    def project_in(self, x: Tensor, plan: AttentionPlan) -> Any:
        """Normed tokens `[B, N, D]` to q, k and v packed, or to the three `[B, H, N, d]`."""
        if plan.packed is not None and deriving(x) and plan.packed[0].dtype == x.dtype:
            return kernels.linear(x, *plan.packed, tf32=self.tf32)
        q, k, v = (
            self._split(compute_linear(plan.plain_in, module, x, None, None, self.tf32))
            for module in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(q), self.k_norm(k), v

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.num_heads, -1)).transpose(1, 2)

    def attend(self, qkv: Any, plan: AttentionPlan, **inputs: Any) -> Tensor:
        """What `project_in` made to merged heads `[B, N, H * d]`."""
        if isinstance(qkv, tuple):
            return self.softmax_attention(*qkv, **inputs)
        return super().attend(qkv, plan, **inputs)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`."""
        q, k = (self._split(module(x)) for module in (self.q_proj, self.k_proj))
        return self.q_norm(q), self.k_norm(k), None


def joined(q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of three linear layers as one; None where none has a bias."""
    weight = torch.cat((q.weight, k.weight, v.weight))
    if all(part.bias is None for part in (q, k, v)):
        return weight, None
    biases = [part.weight.new_zeros(part.weight.shape[0]) if part.bias is None else part.bias for part in (q, k, v)]
    return weight, torch.cat(biases)
