"""Layers that call the kernels: `forward` only, no state of their own.

Each class here is a mix-in. An adapter puts it in front of the class that it replaces
(`class FusedTimmBlock(FusedBlock, timm.Block)`), and `accelerate` sets a module's `__class__` to the result. So
parameters, buffers, hooks and attributes stay where they are, `isinstance` holds, `super().forward` is the original,
and restoring is setting `__class__` back. The attribute names are timm's, which the reference model shares.

A fused layer skips the `forward` of the modules inside it. Where that would lose something (a hook, a LoRA layer in
the place of a linear one, active dropout), it calls those modules as the original does, and `limits` says so.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.weak import WeakTensorKeyDictionary

from . import attention_backends, kernels

KINDS = ("patch_embed", "layer_norm", "attention", "mlp", "block", "fold", "tail")

# in the place of a module that a library's layer does not have
IDENTITY = nn.Identity()

# the kernels' names for what libraries' activation modules compute, by class: whoever proves one puts it here
ACTIVATIONS: dict[type[nn.Module], str] = {}

_leaving = threading.local()

# of tokens that a block handed on: their version, and the statistics of each
_statistics: Any = WeakTensorKeyDictionary()


def alias(name: str) -> Any:
    """A class attribute that gives an object's own attribute another name: the one that the mix-ins here read."""
    return property(lambda self: getattr(self, name))


def face(kind: type[nn.Module], module: Any) -> Any:
    """A module seen as a fused class: the same attributes, with that class's methods. The module stays what it is."""
    if isinstance(module, kind):
        return module
    view = object.__new__(kind)
    object.__setattr__(view, "__dict__", module.__dict__)
    return view


def hooked(module: nn.Module) -> bool:
    """Whether computing what the module does without calling it would skip a hook or a `forward` of its own."""
    # read from the instance's dictionary, a dozen times a block: `module.x` would look through the class first
    own = module.__dict__
    return bool(
        own["_forward_hooks"]
        or own["_forward_pre_hooks"]
        or own["_backward_hooks"]
        or own["_backward_pre_hooks"]
        # attention-map tools and offloading put a function in the instance
        or "forward" in own
        or _has_any_global_hook()
    )


def overridden(module: nn.Module) -> list[str]:
    """A sentence for each method that an object has of its own, in the place of its class's."""
    names = [name for name in vars(module) if callable(getattr(type(module), name, None))]
    # what every module has (train, state_dict) is not part of the forward
    return [f"{name} is replaced on this object" for name in names if name == "forward" or not hasattr(nn.Module, name)]


def symbolic(x: Tensor) -> bool:
    """Whether `torch.fx` traces, as feature extractors do: it cannot follow a kernel, so it is given the original."""
    return isinstance(x, Proxy)


def leaf(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Any:
    """What `torch.fx` records of a module of torch: one step, not what is inside."""
    tracer = x.tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(module), (x, *args), kwargs)


def plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is of this very class and calling it does nothing beyond the class's `forward`."""
    # exactly this class: LoRA, quantised and parametrised layers are others, with a forward of their own
    return type(module) is kind and not hooked(module)


def plain_linear(module: Any) -> bool:
    """Whether a module is a linear layer and nothing else."""
    # nn.MultiheadAttention's output projection is the second kind: the same, kept from dynamic quantisation
    return plain(module, nn.Linear) or plain(module, NonDynamicallyQuantizableLinear)


def _inactive(module: nn.Module, kind: type[nn.Module] = nn.Dropout, rate: str = "p") -> bool:
    """Whether a dropout of exactly this class, or an identity in its place, passes its input through, now."""
    if plain(module, nn.Identity):
        return True
    # a subclass may drop in evaluation too (Monte Carlo dropout)
    return plain(module, kind) and (not module.training or getattr(module, rate) == 0.0)


def _why_called(name: str, module: nn.Module, kind: type[nn.Module]) -> list[str]:
    if plain_linear(module) if kind is nn.Linear else plain(module, kind):
        return []
    actual = type(module)
    if actual is kind:
        return [f"{name} has hooks: called as a module"]
    # peft's layers have torch's names
    library = f"{actual.__module__.partition('.')[0]}." if actual.__name__ == kind.__name__ else ""
    return [f"{name} is a {library}{actual.__name__}: called as a module"]


def _linear(module: Any, x: Tensor, residual: Tensor | None, scale: Tensor | None, tf32: bool) -> Tensor:
    """`residual + scale * module(x)`, in one kernel where the module is a plain `nn.Linear`."""
    if plain_linear(module):
        return kernels.linear(x, module.weight, module.bias, residual=residual, scale=scale, tf32=tf32)
    return _residual(module(x), residual, scale)


def _residual(x: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
    x = x if scale is None else x * scale
    return x if residual is None else residual + x


class FusedLayer(nn.Module if TYPE_CHECKING else object):  # type: ignore[misc]
    """What every fused layer has.

    Attributes:
        kind: one of `KINDS`, or "model".
        replaces: the class in whose place it stands.
        tf32: lets fp32 products run in tf32 on CUDA (precision "tf32").
        attention_backend: who computes attention, one of `vitfast.attention_backends.BACKENDS`.
    """

    kind: ClassVar[str]
    replaces: ClassVar[type[nn.Module]]
    tf32: bool = False
    attention_backend: str = "auto"

    def train(self, mode: bool = True) -> Any:
        """As `torch.nn.Module.train`. What is derived from weights is made anew: some optimisers write unseen."""
        if not self.training or mode or getattr(_leaving, "training", False):
            return super().train(mode)
        for parameter in self.parameters():
            kernels.expire(parameter)
        # the fused layers inside are seen to
        _leaving.training = True
        try:
            super().train(mode)
        finally:
            _leaving.training = False
        # at once, for graphs that only replay
        kernels.rederive()
        return self

    def limits(self) -> list[str]:
        """What this layer leaves to the original's modules at present, one sentence each."""
        return []


class FusedLayerNorm(FusedLayer):
    """LayerNorm over the last dimension: `vitfast.kernels.layer_norm`."""

    kind = "layer_norm"
    weight: Any
    bias: Any
    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        if symbolic(x):
            return super().forward(x)  # type: ignore[misc]
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


class FusedPatchEmbed(FusedLayer):
    """Patch embedding as an implicit GEMM: `vitfast.kernels.patch_embed`.

    With `accelerate(normalize=...)` it holds mean and std in a buffer outside the state dict, and takes uint8 pixels.
    """

    kind = "patch_embed"
    patch_size: Any
    # attribute with the convolution
    conv_name: ClassVar[str] = "proj"

    @property
    def conv(self) -> Any:
        """The convolution that embeds patches."""
        return getattr(self, self.conv_name)

    def set_normalize(self, normalize: tuple[Sequence[float], Sequence[float]] | None) -> None:
        """Take uint8 pixels, with this mean and std per channel for pixels between 0 and 1; None: take none again."""
        if normalize is None:
            if "pixel_affine" in self._buffers:
                del self.pixel_affine
            return
        mean, std = (torch.tensor(values, dtype=torch.float64, device="cpu") for values in normalize)
        # (x / 255 - mean) / std = x * scale + shift; as bytes, since casting a model casts its floating-point buffers
        affine = torch.stack([1.0 / (255.0 * std), -mean / std]).float().view(torch.uint8)
        self.register_buffer("pixel_affine", affine.to(self.conv.weight.device), persistent=False)

    def fusable(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what the original would of these pixels."""
        # what the original refuses, it shall refuse in its own words; raw bytes without mean and std are among that
        return (
            not symbolic(pixels)
            and pixels.dim() == 4
            and (pixels.is_floating_point() or (pixels.dtype == torch.uint8 and "pixel_affine" in self._buffers))
            and not self.why_convolved()
            and pixels.shape[1] == self.conv.in_channels
        )

    def why_convolved(self) -> list[str]:
        """Why the convolution is called as a module, in a sentence each; empty where the kernel runs."""
        name, conv, patch = self.conv_name, self.conv, self.patch_size
        if limits := _why_called(name, conv, nn.Conv2d):
            return limits
        patch = (patch, patch) if isinstance(patch, int) else tuple(patch)
        # dense feature extractors make the stride smaller than the patch, in place
        if conv.kernel_size != patch or conv.stride != patch:
            return [f"{name} has kernel {conv.kernel_size} and stride {conv.stride}: called as a module"]
        if conv.padding not in ((0, 0), "valid") or conv.dilation != (1, 1) or conv.groups != 1:
            return [f"{name} is padded, dilated or grouped: called as a module"]
        return []

    def tokens(self, pixels: Tensor, prefix: Tensor | None = None, pos_embed: Tensor | None = None) -> Tensor:
        """`[B, C, H, W]` to `[B, T + N, D]`, with prefix tokens `[T, D]` and position embeddings `[N or T + N, D]`."""
        scale = shift = None
        if pixels.dtype == torch.uint8:
            scale, shift = self._buffers["pixel_affine"].view(torch.float32).unbind()  # type: ignore[union-attr]
        conv = self.conv
        return kernels.patch_embed(pixels, conv.weight, conv.bias, prefix, pos_embed, scale, shift, tf32=self.tf32)

    def limits(self) -> list[str]:
        return self.why_convolved()


class FusedAttention(FusedLayer):
    """Self-attention: packed qkv in, merged heads out, LayerScale and residual in the output projection."""

    kind = "attention"
    qkv: Any
    q_norm: Any
    k_norm: Any
    attn_drop: Any
    proj: Any
    proj_drop: Any
    num_heads: int
    scale: float

    def fusable(self) -> bool:
        """Whether the attention kernel computes what the original would: it has no dropout."""
        # the original reads the rate from the dropout, and whether it trains from itself or the dropout
        return _inactive(self.attn_drop) and not (self.training and getattr(self.attn_drop, "p", 0.0))

    def fused(self, x: Tensor, residual: Tensor | None = None, scale: Tensor | None = None, **given: Any) -> Tensor:
        """`residual + scale * attention(x)`, `[B, N, D]` to `[B, N, D]`; the rest is for `attended`."""
        return self.project(self.attended(x, **given), residual, scale)

    def attended(self, x: Tensor, **given: Any) -> Tensor:
        """Normed tokens `[B, N, D]` to merged heads `[B, N, H * d]`."""
        return self.core(_linear(self.qkv, x, None, None, self.tf32), **given)

    def project(self, out: Tensor, residual: Tensor | None, scale: Tensor | None) -> Tensor:
        """`residual + scale * proj(out)`, `[B, N, H * d]` to `[B, N, D]`."""
        if _inactive(self.proj_drop):
            return _linear(self.proj, out, residual, scale, self.tf32)
        return _residual(self.proj_drop(_linear(self.proj, out, None, None, self.tf32)), residual, scale)

    def core(self, qkv: Tensor) -> Tensor:
        """`[B, N, 3 * H * d]` to `[B, N, H * d]`."""
        if plain(self.q_norm, nn.Identity) and plain(self.k_norm, nn.Identity):
            backend = self.attention_backend
            out = attention_backends.attention_qkv(qkv, self.num_heads, self.scale, tf32=self.tf32, backend=backend)
            return self.merged(out)
        return self.mixed(*self.heads(qkv))

    def mixed(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        """`[B, H, N, d]` thrice to `[B, N, H * d]`; the bias is added to the scaled scores."""
        backend = self.attention_backend
        out = attention_backends.attention(q, k, v, self.scale, bias, tf32=self.tf32, backend=backend)
        return self.merged(out.transpose(1, 2).flatten(2))

    def relative(self, q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
        """`mixed` with BEiT's bias, read from its table `[rows, H]` for a grid of patches."""
        backend, table = self.attention_backend, by_columns(table)
        out = attention_backends.relative_attention(q, k, v, table, grid, self.scale, tf32=self.tf32, backend=backend)
        return self.merged(out.transpose(1, 2).flatten(2))

    def whole(self) -> bool:
        """Whether `first` may stand for `core`: no token's query is treated by where it stands."""
        return True

    def merged(self, out: Tensor) -> Tensor:
        """What the model does to the merged heads `[B, N, H * d]`: nothing, here."""
        return out

    def plain_in(self) -> bool:
        """Whether the projection to q, k and v can be computed without calling a module."""
        return plain_linear(self.qkv)

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[3 * H * d, D]` and bias of the projection to q, k and v; asked for where `plain_in`."""
        return self.qkv.weight, self.qkv.bias

    def first(self, x: Tensor, kept: int) -> Tensor:
        """`attended` for the queries of the first tokens alone: normed `[B, N, D]` to `[B, kept, H * d]`."""
        weight, bias = self.weights_in()
        width = weight.shape[0] // 3
        q = kernels.linear(x[:, :kept], weight[:width], None if bias is None else bias[:width], tf32=self.tf32)
        kv = kernels.linear(x, weight[width:], None if bias is None else bias[width:], tf32=self.tf32)
        k, v = kv.unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q = q.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        return self.mixed(self.q_norm(q), self.k_norm(k), v)

    def heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v `[B, H, N, d]`, q and k normalised where the model does that."""
        q, k, v = qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.q_norm(q), self.k_norm(k), v

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What enters the softmax, of normed tokens `[B, N, D]`, for whoever wants the probabilities.

        Returns:
            `(q, k, bias)`: q and k `[B, H, N, d]`, and what is added to `scale * q @ k.T`, or None.
        """
        q, k, _ = self.heads(self.qkv(x))
        return q, k, None

    def limits(self) -> list[str]:
        limits = self.limits_in() + _why_called("proj", self.proj, nn.Linear)
        if hooked(self.attn_drop):
            limits.append("attn_drop has hooks: the original forward runs")
        elif getattr(self.attn_drop, "p", 0.0) > 0.0:
            limits.append(f"attention dropout {self.attn_drop.p:g}: the original forward runs in training")
        return limits

    def limits_in(self) -> list[str]:
        """`limits` of the projection to q, k and v."""
        return _why_called("qkv", self.qkv, nn.Linear)


class FusedSplitAttention(FusedAttention):
    """Self-attention with a linear layer each for q, k and v: in inference on a GPU one GEMM computes all three."""

    q_proj: Any
    k_proj: Any
    v_proj: Any

    def attended(self, x: Tensor, **given: Any) -> Tensor:
        """Normed tokens `[B, N, D]` to merged heads `[B, N, H * d]`."""
        if packable(x, self.q_proj, self.k_proj, self.v_proj):
            return self.core(kernels.linear(x, *self.weights_in(), tf32=self.tf32), **given)
        return self.mixed(*self._projected(x), **given)

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (
            _linear(module, x, None, None, self.tf32).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for module in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.q_norm(q), self.k_norm(k), v

    def plain_in(self) -> bool:
        """Whether the projection to q, k and v can be computed without calling a module."""
        return plain_linear(self.q_proj) and plain_linear(self.k_proj) and plain_linear(self.v_proj)

    def weights_in(self) -> tuple[Tensor, Tensor | None]:
        """Weight `[3 * H * d, D]` and bias of the three layers as one."""
        return packed(self.q_proj, self.k_proj, self.v_proj)

    def query_key(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `FusedAttention.query_key`."""
        q, k = (module(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2) for module in (self.q_proj, self.k_proj))
        return self.q_norm(q), self.k_norm(k), None

    def limits_in(self) -> list[str]:
        """`limits` of the projection to q, k and v."""
        names = ("q_proj", "k_proj", "v_proj")
        return [limit for name in names for limit in _why_called(name, getattr(self, name), nn.Linear)]


def packable(x: Tensor, *linears: Any) -> bool:
    """Whether layers that read the same tokens may be computed as one, for these tokens."""
    return (
        derivable(x)
        and all(plain_linear(linear) for linear in linears)
        and all(linear.weight.dtype == x.dtype for linear in linears)
        and not linears[0].weight.is_inference()
    )


def packed(q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor | None]:
    """`joined`, derived from the layers' weights; asked for where they are `packable`."""
    weights, biases = [linear.weight for linear in (q, k, v)], [linear.bias for linear in (q, k, v)]
    made = kernels.derived("packed", _join, *weights, *biases)
    return made[0], made[1] if len(made) > 1 else None


def joined(q: Any, k: Any, v: Any) -> tuple[Tensor, Tensor | None]:
    """Weights and biases of three linear layers as one; None where none has a bias."""
    made = _join(q.weight, k.weight, v.weight, q.bias, k.bias, v.bias)
    return made[0], made[1] if len(made) > 1 else None


def _join(q: Tensor, k: Tensor, v: Tensor, *biases: Tensor | None) -> tuple[Tensor, ...]:
    weight = torch.cat((q, k, v))
    if all(bias is None for bias in biases):
        return (weight,)
    zeros = (part.new_zeros(part.shape[0]) for part in (q, k, v))
    return weight, torch.cat([zero if bias is None else bias for zero, bias in zip(zeros, biases, strict=True)])


def by_columns(table: Tensor) -> Tensor:
    """A table of positions `[rows, H]` with each head's column in one piece, for the kernels that gather from it.

    Neighbouring keys read neighbouring rows: of a table by rows each from a sector of memory of its own. In inference
    the copy is derived from the table, else it is made in each call, which is a few KB.
    """
    if not table.is_cuda and not kernels.INTERPRET:
        return table
    if derivable(table) and not table.is_inference():
        return kernels.derived("columns", _by_columns, table)[0].t()
    return _by_columns(table)[0].t()


def _by_columns(table: Tensor) -> tuple[Tensor]:
    return (table.t().contiguous(),)


def why_uncut(backend: str) -> list[str]:
    """Why a backend of attention leaves windows to the original, in a sentence; empty where it does not."""
    if backend in attention_backends.OURS:
        return []
    return [f"attention={backend!r} knows no windows: the original forward runs"]


def windows_pay(x: Tensor) -> bool:
    """Whether windows are cut by the kernel: in inference on a CPU a library's own calls are a little faster."""
    return x.is_cuda or kernels.INTERPRET or torch.is_grad_enabled() or torch.compiler.is_compiling()


def position_table(mlp: Any, coords: Tensor) -> Tensor:
    """Swin V2's bias by offset, `[(2 * wh - 1) * (2 * ww - 1), H]`, from the small MLP that makes it of coordinates.

    In inference on a GPU it is derived from the MLP's weights, by columns.
    """
    first, act, last = mlp
    if not (
        derivable(coords)
        and plain(mlp, nn.Sequential)
        and plain_linear(first)
        and plain(act, nn.ReLU)
        and plain_linear(last)
        and not coords.is_inference()
        and not first.weight.is_inference()
    ):
        return by_columns(16 * torch.sigmoid(mlp(coords).flatten(0, -2)))
    # by the size too: a buffer of another window may stand where an older one stood
    what = f"table {coords.shape[-3]}x{coords.shape[-2]}"
    return kernels.derived(what, _position_table, first.weight, first.bias, last.weight, coords)[0].t()


def _position_table(weight: Tensor, bias: Tensor, out: Tensor, coords: Tensor) -> tuple[Tensor]:
    table = 16 * torch.sigmoid(F.linear(F.relu(F.linear(coords, weight, bias)), out).flatten(0, -2))
    return _by_columns(table)


def cosine_scales(logit_scale: Tensor) -> Tensor:
    """Swin V2's factors of cosines, `[H]`, bounded by 100."""
    if derivable(logit_scale) and not logit_scale.is_inference():
        return kernels.derived("scales", _cosine_scales, logit_scale)[0]
    return _cosine_scales(logit_scale)[0]


def _cosine_scales(logit_scale: Tensor) -> tuple[Tensor]:
    return (torch.clamp(logit_scale, max=math.log(100.0)).exp().flatten(),)


def derivable(x: Tensor) -> bool:
    """Whether a layer may read what was derived from its weights, for these tokens: in inference, on a GPU."""
    return (
        (x.is_cuda or kernels.INTERPRET)
        and not torch.is_grad_enabled()
        # a compiler's graphs would not see weights change
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(x.device.type)
    )


class FusedMlp(FusedLayer):
    """The MLP: activation in the first GEMM's epilogue, LayerScale and residual in the second's."""

    kind = "mlp"
    fc1: Any
    act: Any
    drop1: Any
    fc2: Any
    drop2: Any

    @classmethod
    def epilogue(cls, module: nn.Module) -> str | None:
        """The kernel's name for an activation module, or None where it has none."""
        if type(module) is nn.GELU:
            return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)
        return ACTIVATIONS.get(type(module))

    def fusable(self) -> bool:
        """Whether the modules inside are those that stand here by their names."""
        return True

    def between(self, hidden: Tensor) -> Tensor:
        """What the model does between the activation's dropout and the second layer: nothing, here."""
        return hidden

    def fused(self, x: Tensor, residual: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """`residual + scale * mlp(x)`, `[..., D]` to `[..., D]`."""
        activation = None if hooked(self.act) else self.epilogue(self.act)
        # one name for all, or the input's memory would be kept from the second layer
        if activation is not None and plain_linear(self.fc1):
            x = kernels.linear(x, self.fc1.weight, self.fc1.bias, activation, tf32=self.tf32)
        else:
            x = self.act(self.fc1(x))
        x = self.between(x if _inactive(self.drop1) else self.drop1(x))
        if _inactive(self.drop2):
            return _linear(self.fc2, x, residual, scale, self.tf32)
        return _residual(self.drop2(_linear(self.fc2, x, None, None, self.tf32)), residual, scale)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return super().forward(x) if symbolic(x) or not self.fusable() else self.fused(x)  # type: ignore[misc]

    def limits(self) -> list[str]:
        if not self.fusable():
            return ["has other modules than it had: the original forward runs"]
        limits = _why_called("fc1", self.fc1, nn.Linear) + _why_called("fc2", self.fc2, nn.Linear)
        if hooked(self.act) or self.epilogue(self.act) is None:
            limits += _why_called("act", self.act, type(self.act) if hooked(self.act) else nn.GELU)
        return limits


class FusedBlock(FusedLayer):
    """A pre-norm block whose residual additions and LayerScale ride in the branches' last kernels.

    `ls1` and `ls2` are modules, or the scales themselves, or None.
    """

    kind = "block"
    norm1: Any
    attn: Any
    ls1: Any
    drop_path1: Any
    norm2: Any
    mlp: Any
    ls2: Any
    drop_path2: Any

    # the library's classes for LayerScale and for what drops a branch, and the attributes that these keep theirs in
    layer_scale_class: ClassVar[type[nn.Module]] = nn.Identity
    gamma_name: ClassVar[str] = "gamma"
    drop_path_class: ClassVar[type[nn.Module]] = nn.Identity
    rate_name: ClassVar[str] = "drop_prob"
    # whether the block makes a bias for its attention, so that the normed input does not say all
    bias_from_block: ClassVar[bool] = False
    # whether the block folds its norms by itself, since no `FusedModel` runs it
    folds_itself: ClassVar[bool] = False
    fold: bool = False

    def attend(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Call the attention as the original block does."""
        return self.attn(x, **kwargs)

    def given(self, **kwargs: Any) -> dict[str, Any]:
        """Which of the block's other arguments fused attention takes: none, here."""
        return {}

    def _scale(self, module: Any) -> tuple[bool, Tensor | None]:
        """`(known, gamma)` of a LayerScale or what is in its place."""
        if module is None or isinstance(module, Tensor):
            return True, module
        if plain(module, nn.Identity):
            return True, None
        if plain(module, self.layer_scale_class):
            return True, getattr(module, self.gamma_name)
        return False, None

    def _scaled(self, module: Any, x: Tensor) -> Tensor:
        return module(x) if isinstance(module, nn.Module) else _residual(x, None, module)

    def _undropped(self, module: nn.Module) -> bool:
        return _inactive(module, self.drop_path_class, self.rate_name)

    def fused(self, x: Tensor, **kwargs: Any) -> Tensor:
        """`[B, N, D]` to `[B, N, D]`; an attention that is called as a module gets the other arguments."""
        if self.fold and derivable(x) and self.foldable(x):
            return self.folded(x, **kwargs)
        # nothing is named that is not needed again: a name keeps its tensor's memory from the next kernel
        known, gamma = self._scale(self.ls1)
        known = known and self._undropped(self.drop_path1)
        normed = None
        if known and self._takes_residual(self.attn):
            x = self.attn.fused(self.norm1(x), x, gamma, **self.given(**kwargs))
        elif known and isinstance(self.norm2, FusedLayerNorm) and not hooked(self.norm2):
            norm = self.norm2
            branch = self.attend(self.norm1(x), **kwargs)
            x, normed = kernels.add_layer_norm(branch, x, norm.weight, norm.bias, norm.eps, gamma)
        else:
            x = x + self.drop_path1(self._scaled(self.ls1, self.attend(self.norm1(x), **kwargs)))

        known, gamma = self._scale(self.ls2)
        if known and self._undropped(self.drop_path2) and self._takes_residual(self.mlp):
            return self.mlp.fused(self.norm2(x) if normed is None else normed, x, gamma)
        return x + self.drop_path2(self._scaled(self.ls2, self.mlp(self.norm2(x) if normed is None else normed)))

    def whole(self) -> bool:
        """Whether everything in this block is known: nothing but a norm or an identity is called as a module."""
        attn, mlp = self.attn, self.mlp
        return (
            self._takes_residual(attn)
            and isinstance(attn, FusedAttention)
            and self._takes_residual(mlp)
            and isinstance(mlp, FusedMlp)
            and attn.plain_in()
            and plain_linear(attn.proj)
            and plain_linear(mlp.fc1)
            and plain_linear(mlp.fc2)
            and mlp.epilogue(mlp.act) is not None
            and all(_inactive(drop) for drop in (attn.proj_drop, mlp.drop1, mlp.drop2))
            and self._undropped(self.drop_path1)
            and self._undropped(self.drop_path2)
            and self._scale(self.ls1)[0]
            and self._scale(self.ls2)[0]
            and not any(self._watched(module) for module in self.modules())
        )

    def _watched(self, module: nn.Module) -> bool:
        """Whether somebody looks at what a module of this block does."""
        return hooked(module)

    def sliceable(self) -> bool:
        """Whether `first` computes what `fused` does: all but the attention works token by token."""
        norms = (self.norm1, self.norm2)
        return self.whole() and self.attn.whole() and all(isinstance(norm, nn.LayerNorm) for norm in norms)

    def foldable(self, x: Tensor) -> bool:
        """Whether both norms can be folded into the layers that read them, for these tokens."""
        if not self.whole():
            return False
        weight = self.attn.weights_in()[0]
        return (
            x.dtype == weight.dtype == self.mlp.fc1.weight.dtype
            # inference tensors do not say when they change
            and not weight.is_inference()
            and all(
                isinstance(norm, FusedLayerNorm) and (norm.weight is None or not norm.weight.is_inference())
                for norm in (self.norm1, self.norm2)
            )
        )

    # two halves, so that whoever runs them lets the first one's input go before the second

    def folded_attention(self, x: Tensor, stats: Tensor | None, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The first half of `fused` without a normalised tensor: tokens `[B, N, D]` and the statistics of each."""
        attn, norm, proj = self.attn, self.norm1, self.attn.proj
        weight, bias = attn.weights_in()
        stats = kernels.row_stats(x) if stats is None else stats
        out = kernels.norm_linear(x, stats, norm.weight, norm.bias, norm.eps, weight, bias, tf32=attn.tf32)
        out = attn.core(out, **self.given(**kwargs))
        gamma = self._scale(self.ls1)[1]
        return kernels.linear_stats(out, proj.weight, proj.bias, residual=x, scale=gamma, tf32=attn.tf32)

    def folded_mlp(self, x: Tensor, stats: Tensor, wanted: bool) -> tuple[Tensor, Tensor | None]:
        """The second half; statistics where they are wanted."""
        mlp, norm = self.mlp, self.norm2
        fc1, fc2, activation = mlp.fc1, mlp.fc2, mlp.epilogue(mlp.act)
        out = kernels.norm_linear(
            x, stats, norm.weight, norm.bias, norm.eps, fc1.weight, fc1.bias, activation, tf32=mlp.tf32
        )
        out = mlp.between(out)
        gamma = self._scale(self.ls2)[1]
        if not wanted:
            return kernels.linear(out, fc2.weight, fc2.bias, residual=x, scale=gamma, tf32=mlp.tf32), None
        return kernels.linear_stats(out, fc2.weight, fc2.bias, residual=x, scale=gamma, tf32=mlp.tf32)

    def folded(self, x: Tensor, **kwargs: Any) -> Tensor:
        """`fused` with both norms folded. Statistics of the result are kept for the block behind, while it lives."""
        # inference tensors do not say when they change: each block reads them once more
        kept = not x.is_inference()
        version, stats = _statistics.get(x, (None, None)) if kept else (None, None)
        x, stats = self.folded_attention(x, stats if kept and version == x._version else None, **kwargs)
        x, after = self.folded_mlp(x, stats, kept)
        if kept:
            _statistics[x] = (x._version, after)
        return x

    def first(self, x: Tensor, kept: int) -> Tensor:
        """`fused` for the first tokens alone, which is exact: `[B, N, D]` to `[B, kept, D]`."""
        attn = self.attn
        x = attn.project(attn.first(self.norm1(x), kept), x[:, :kept], self._scale(self.ls1)[1])
        return self.mlp.fused(self.norm2(x), x, self._scale(self.ls2)[1])

    def _takes_residual(self, branch: nn.Module) -> bool:
        if self._watched(branch):
            return False
        return isinstance(branch, (FusedAttention, FusedMlp)) and branch.fusable()

    def limits(self) -> list[str]:
        limits = []
        for name in ("attn", "mlp"):
            branch = getattr(self, name)
            if not isinstance(branch, (FusedAttention, FusedMlp)):
                limits.append(f"{name} is a {type(branch).__name__}: its residual is added outside it")
            elif self._watched(branch):
                limits.append(f"{name} has hooks: its residual is added outside it")
        for name in ("drop_path1", "drop_path2"):
            rate = getattr(getattr(self, name), self.rate_name, 0.0)
            if rate:
                limits.append(f"{name} {rate:.3g}: its residual is added outside the kernel in training")
        return limits


class FusedModel(FusedLayer):
    """A model around blocks that stand in `self.blocks`: what two of them share, and what nobody reads.

    Attributes:
        fold: fold LayerNorms into the GEMMs behind them, with statistics handed from block to block. It needs weights
            that stay as they are while it runs, so it is for inference, and not for `torch.compile`, whose graphs
            would not see weights change.
        tail: where only pooled class tokens are asked for, the last block computes those alone.
    """

    kind = "model"
    serves: ClassVar = ("patch_embed", "fold", "tail")
    fold: bool = False
    tail: bool = False
    blocks: Any
    norm: Any

    def pooled_tokens(self) -> int | None:
        """How many leading tokens the head reads, or None where it may read all."""
        raise NotImplementedError

    def kept(self) -> int | None:
        """`pooled_tokens`, where the last block may leave the others out."""
        # in training dropout draws for every token
        count = self.pooled_tokens() if self.tail and not self.training else None
        blocks = self.blocks
        if count is None or not self.straight() or not len(blocks) or hooked(self.norm):
            return None
        if any(name in vars(self) for name in ("forward_features", "forward_head", "pool")):
            # somebody put a function of their own in the place of a step
            return None
        last = blocks[-1]
        return count if isinstance(last, FusedBlock) and last.sliceable() else None

    def encode(self, x: Tensor, kept: int | None = None) -> Tensor:
        """All blocks: `[B, N, D]` to `[B, N, D]`, or to `[B, kept, D]`."""
        folds = self.fold and self._may_fold(x)
        if kept is None and not folds:
            return self.through(x)
        stats = None
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            if i == last and kept is not None:
                return block.first(x, kept)
            if folds and isinstance(block, FusedBlock) and block.foldable(x):
                x, stats = block.folded_attention(x, stats)
                # nobody reads them behind the last block, and the tail normalises for itself
                x, stats = block.folded_mlp(x, stats, i < last - (kept is not None))
            else:
                x, stats = block(x), None
        return x

    def _may_fold(self, x: Tensor) -> bool:
        return derivable(x) and self.straight()

    def straight(self) -> bool:
        """Whether `through` runs the blocks one after another and nothing else."""
        return plain(self.blocks, nn.Sequential)

    def through(self, x: Tensor) -> Tensor:
        """All blocks as the original runs them: `[B, N, D]` to `[B, N, D]`."""
        return self.blocks(x)


class FusedStemModel(FusedModel, FusedPatchEmbed):
    """A model that embeds patches by a convolution of its own, without a module around it.

    Attributes:
        stem: the kernel embeds the patches, prefix tokens and position embeddings with them.
    """

    stem: bool = False

    def fusable(self, pixels: Tensor) -> bool:
        """Whether the kernel computes what the original would of these pixels."""
        # who asks for bytes asks for the kernel
        return (self.stem or "pixel_affine" in self._buffers) and super().fusable(pixels)
