"""A pre-norm block whose residual additions and LayerScale ride in the branches' last kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import kernels
from .attention import AttentionPlan, FusedAttention
from .base import FusedLayer, FusedLayerNorm, original_of
from .guards import add_residual, deriving, hooked
from .known import inactive, rate_of, scale_of
from .mlp import FusedMlp, MlpPlan

# of tokens that a block handed on: their version, and the statistics of each
_statistics: Any = WeakTensorKeyDictionary()

# folding a norm keeps the rule where statistics are finer than what is stored, as in 16 bits; in fp32 it does not from
# a mean of ten standard deviations on
FOLDED_DTYPES = (torch.float16, torch.bfloat16)


class BlockPlan(NamedTuple):
    """How a block runs.

    Attributes:
        original: why the original forward runs, or "".
        notes: what is left to the original's modules, one sentence each.
        norms: whether each of the two norms is a kernel that nobody looks at.
        attn, mlp: the branches' plans where their last kernel adds the residual, else None.
        scale1, scale2: the branches' LayerScale, known where the branch ends in a kernel, or None.
        sums: the second norm's kernel adds the first residual, since the attention does not.
        complete: nothing but a norm of q and k is called as a module.
        prefix: the first tokens alone can be computed.
        folded: what is derived from the frozen weights of norms and the layers behind them, or None.
        recipes: prepared launches of frozen weights, or None.
    """

    original: str
    notes: tuple[str, ...]
    norms: tuple[bool, bool] = (False, False)
    attn: AttentionPlan | None = None
    scale1: Tensor | None = None
    sums: bool = False
    mlp: MlpPlan | None = None
    scale2: Tensor | None = None
    complete: bool = False
    prefix: bool = False
    folded: tuple[kernels.Folded, kernels.Folded] | None = None
    recipes: dict[Any, Any] | None = None


class FusedBlock(FusedLayer):
    """Attention and MLP, each with a norm in front. `ls1` and `ls2` are modules, or the scales themselves, or None."""

    kind = "block"
    norm1: Any
    attn: Any
    ls1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    ls2: Any
    drop_path2: Any

    # whether the block makes a bias for its attention, so that the normed input does not say all
    bias_from_block: ClassVar[bool] = False
    # whether the norms may be folded into the layers behind them
    can_fold: ClassVar[bool] = True
    fold: bool = False

    # the plan

    def watched(self, module: nn.Module) -> bool:
        """Whether somebody looks at what a module of this block does."""
        return hooked(module)

    def make_plan(self, derive: bool = False) -> BlockPlan:
        """Which branches end in a kernel that adds the residual, and what that leaves out."""
        if original := original_of(self):
            return BlockPlan(original, ())
        notes: list[str] = []
        drop1, drop2 = self.drop_paths()
        attn = self._plan_branch("attn", self.attn, drop1, derive, notes)
        mlp = self._plan_branch("mlp", self.mlp, drop2, derive, notes)
        for name, drop in (("drop_path1", drop1), ("drop_path2", drop2)):
            if rate := rate_of(drop):
                notes.append(f"{name} {rate:.3g}: its residual is added outside the kernel in training")
        known1, scale1 = scale_of(self.ls1)
        known2, scale2 = scale_of(self.ls2)
        norms = (self._computes(self.norm1), self._computes(self.norm2))
        sums = known1 and attn is None and norms[1] and inactive(drop1)
        if not known1:
            attn = None
        if not known2:
            mlp = None
        complete = (
            attn is not None
            and mlp is not None
            and attn.complete
            and mlp.complete
            and not any([self.watched(module) for module in self.modules()])
        )
        by_token = all([isinstance(norm, nn.LayerNorm) for norm in (self.norm1, self.norm2)])
        prefix = complete and by_token and self.attn.position_free()
        plan = BlockPlan("", tuple(notes), norms, attn, scale1, sums, mlp, scale2, complete, prefix)
        if derive:
            plan = plan._replace(recipes={})
            if self.fold and complete and all(norms):
                return plan._replace(folded=self._folded(attn))
        return plan

    def _computes(self, norm: Any) -> bool:
        return isinstance(norm, FusedLayerNorm) and not self.watched(norm) and not original_of(norm)

    def drop_paths(self) -> tuple[Any, Any]:
        """What drops each branch."""
        return self.drop_path1, self.drop_path2

    def _plan_branch(self, name: str, branch: Any, drop_path: Any, derive: bool, notes: list[str]) -> Any:
        """The branch's plan, or None where its residual is added outside of it."""
        if not isinstance(branch, (FusedAttention, FusedMlp)):
            notes.append(f"{name} is a {type(branch).__name__}: its residual is added outside it")
            return None
        if self.watched(branch):
            notes.append(f"{name} has hooks: its residual is added outside it")
            return None
        plan = branch.make_plan(derive)
        return None if plan.original or not inactive(drop_path) else plan

    def _folded(self, attn: AttentionPlan) -> tuple[kernels.Folded, kernels.Folded] | None:
        weight, bias = attn.packed or self.attn.weights_in()
        fc1, norm1, norm2 = self.mlp.fc1, self.norm1, self.norm2
        if weight.dtype not in FOLDED_DTYPES or fc1.weight.dtype is not weight.dtype:
            return None
        return (
            kernels.fold(weight, bias, norm1.weight, norm1.bias),
            kernels.fold(fc1.weight, fc1.bias, norm2.weight, norm2.bias),
        )

    # the forward

    def attend(self, x: Tensor, **inputs: Any) -> Tensor:
        """Call the attention as the original block does."""
        return self.attn(x, **inputs)

    def attention_inputs(self, **inputs: Any) -> dict[str, Any]:
        """Which of the block's other arguments fused attention takes: none, here."""
        return {}

    def fused(self, x: Tensor, plan: BlockPlan, **inputs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; an attention that is called as a module gets the other arguments."""
        if plan.folded is not None and deriving(x) and x.dtype is plan.folded[0].weight.dtype:
            return self._fused_folded(x, plan, **inputs)
        return self._together(self._fused, plan, x, **inputs)

    def _together(self, function: Callable[..., Any], plan: BlockPlan, *args: Any, **inputs: Any) -> Any:
        """`function(*args, plan, **inputs)`, as one prepared launch where it is nothing but kernels."""
        if plan.recipes is None or any(value is not None for value in inputs.values()):
            return function(*args, plan, **inputs)
        run = partial(function, plan=plan, **inputs)
        return kernels.together(function.__name__, run, args, plan.recipes, partial(self._constants, plan))

    def _constants(self, plan: BlockPlan) -> list[Tensor]:
        """Every tensor that stays where it is for as long as the plan."""
        derived = [t for folded in plan.folded or () for t in (folded.weight, folded.colsum, folded.bias)]
        packed = (plan.attn and plan.attn.packed) or ()
        return [*self.parameters(), *self.buffers(), *derived, *(t for t in packed if t is not None)]

    def _fused(self, x: Tensor, plan: BlockPlan, **inputs: Any) -> Tensor:
        # nothing is named that is not needed again: a name keeps its tensor's memory from the next kernel
        normed = None
        if plan.attn is not None:
            more = self.attention_inputs(**inputs)
            x = self.attn.fused(self._norm1(x, plan), plan.attn, x, plan.scale1, **more)
        elif plan.sums:
            norm = self.norm2
            branch = self.attend(self._norm1(x, plan), **inputs)
            x, normed = kernels.add_layer_norm(branch, x, norm.weight, norm.bias, norm.eps, plan.scale1)
        else:
            x = x + self.drop_paths()[0](_scaled(self.ls1, self.attend(self._norm1(x, plan), **inputs)))
        if plan.mlp is not None:
            return self.mlp.fused(self._norm2(x, plan) if normed is None else normed, plan.mlp, x, plan.scale2)
        branch = self.mlp(self._norm2(x, plan) if normed is None else normed)
        return x + self.drop_paths()[1](_scaled(self.ls2, branch))

    def _norm1(self, x: Tensor, plan: BlockPlan) -> Tensor:
        return self.norm1.compute(x) if plan.norms[0] else self.norm1(x)

    def _norm2(self, x: Tensor, plan: BlockPlan) -> Tensor:
        return self.norm2.compute(x) if plan.norms[1] else self.norm2(x)

    def fused_prefix(self, x: Tensor, count: int, plan: BlockPlan) -> Tensor:
        """`fused` for the first tokens alone, where the plan has `prefix`: `[B, N, D]` to `[B, count, D]`."""
        return self._together(self._fused_prefix, plan, x, count)

    def _fused_prefix(self, x: Tensor, count: int, plan: BlockPlan) -> Tensor:
        attn = self.attn
        x = attn.project(attn.attend_prefix(self._norm1(x, plan), count), plan.attn, x[:, :count], plan.scale1)
        return self.mlp.fused(self._norm2(x, plan), plan.mlp, x, plan.scale2)

    # with norms folded, in two halves, so that whoever runs them lets the first one's input go before the second

    def folded_attention(
        self, x: Tensor, stats: Tensor | None, plan: BlockPlan, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        """The first half of `fused` without a normalised tensor: tokens `[B, N, D]` and the statistics of each."""
        return self._together(self._folded_attention, plan, x, stats, **inputs)

    def folded_mlp(self, x: Tensor, stats: Tensor, plan: BlockPlan, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """The second half; statistics where they are wanted."""
        return self._together(self._folded_mlp, plan, x, stats, wanted)

    def _folded_attention(
        self, x: Tensor, stats: Tensor | None, plan: BlockPlan, **inputs: Any
    ) -> tuple[Tensor, Tensor]:
        attn, norm, proj = self.attn, self.norm1, self.attn.proj
        assert plan.folded is not None and plan.attn is not None
        weight, bias = plan.attn.packed or attn.weights_in()
        stats = kernels.row_stats(x) if stats is None else stats
        out = kernels.norm_linear(
            x, stats, norm.weight, norm.bias, norm.eps, weight, bias, tf32=attn.tf32, folded=plan.folded[0]
        )
        out = attn.attend(out, plan.attn, **self.attention_inputs(**inputs))
        return kernels.linear_stats(out, proj.weight, proj.bias, residual=x, scale=plan.scale1, tf32=attn.tf32)

    def _folded_mlp(self, x: Tensor, stats: Tensor, wanted: bool, plan: BlockPlan) -> tuple[Tensor, Tensor | None]:
        mlp, norm, fc1, fc2 = self.mlp, self.norm2, self.mlp.fc1, self.mlp.fc2
        assert plan.folded is not None and plan.mlp is not None
        out = kernels.norm_linear(
            x,
            stats,
            norm.weight,
            norm.bias,
            norm.eps,
            fc1.weight,
            fc1.bias,
            plan.mlp.activation or "none",
            tf32=mlp.tf32,
            folded=plan.folded[1],
        )
        out = mlp.between(out)
        if not wanted:
            return kernels.linear(out, fc2.weight, fc2.bias, residual=x, scale=plan.scale2, tf32=mlp.tf32), None
        return kernels.linear_stats(out, fc2.weight, fc2.bias, residual=x, scale=plan.scale2, tf32=mlp.tf32)

    def _fused_folded(self, x: Tensor, plan: BlockPlan, **inputs: Any) -> Tensor:
        """Both halves. Statistics of the result are kept for the block behind, while it lives."""
        # inference tensors do not say when they change: each block reads them once more
        kept = not x.is_inference() and not torch.is_inference_mode_enabled()
        version, stats = _statistics.get(x, (None, None)) if kept else (None, None)
        x, stats = self.folded_attention(x, stats if kept and version == x._version else None, plan, **inputs)
        x, after = self.folded_mlp(x, stats, plan, kept)
        if kept:
            _statistics[x] = (x._version, after)
        return x


def _scaled(scale: Any, x: Tensor) -> Tensor:
    """LayerScale by a module, or by the scale itself."""
    return scale(x) if isinstance(scale, nn.Module) else add_residual(x, None, scale)
