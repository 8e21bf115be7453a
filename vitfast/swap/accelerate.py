"""`accelerate`, `restore` and `report`: fused layers in the place of a model's own, and back."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from ..adapters import Match
from ..graphs.runner import Graphs, attach, detach, memory_bound
from ..layers import KINDS, FusedBlock, FusedLayer, FusedModel, FusedPatchEmbed, FusedStemModel, backends, view_as
from ..layers.base import SWITCHES
from ..watch import STATE
from .cast import cast, uncast
from .choose import Choice, select
from .match import check_model, disproved, matches, offloaded, serves
from .precision import Precision, get_precision

Model = TypeVar("Model", bound=nn.Module)


@dataclass
class _State:
    """What `restore` undoes beside the classes, a cast and a compile, and what was measured before.

    `originals` holds the data of parameters and buffers as it was before the cast, under (module name, tensor name),
    and None for a tensor that had the dtype already.
    """

    precision: Precision | None = None
    originals: dict[tuple[str, str], Tensor | None] = field(default_factory=dict)
    compiled: bool = False
    choice: Choice | None = None
    graphs: Graphs | None = None
    attention: str = "auto"
    frozen: bool = False


def accelerate(
    model: Model,
    *,
    precision: str | None = None,
    only: Collection[str] | None = None,
    normalize: tuple[Sequence[float], Sequence[float]] | None = None,
    attention: str | None = None,
    example: Tensor | None = None,
    frozen: bool = False,
    compile: bool = False,
    cuda_graph: bool | int = False,
    strict: bool = False,
) -> Model:
    """Replace a model's modules by fused ones, in place.

    Parameters are shared, not copied; `state_dict()` keeps its keys, and its values unless `precision` casts them.
    Hooks, `deepcopy`, pickling, gradient checkpointing and train/eval switches work as before. What cannot be
    replaced stays as it is, and `report(model)` says why.

    Args:
        model: a `vitfast.VisionTransformer`, a timm `VisionTransformer`, or any model that holds their modules.
        precision: `"fp32"`, `"tf32"`, `"bf16"` or `"fp16"`: casts parameters and floating-point buffers once, as
            `model.to(dtype)` does (they stay the same objects), and keeps the original data for `restore`. None leaves
            every dtype as it is.
        only: kinds of replacement to switch on; default all. A further call adds to what is switched on.
            `"patch_embed"`, `"layer_norm"`, `"attention"`, `"mlp"` and `"block"` are modules; `"fold"` folds each
            block's LayerNorms into the linear layers behind them, of frozen weights in 16 bits on a GPU; `"tail"` has
            the last block compute the class token alone, where nothing else is read. Both work on blocks that are
            replaced as a whole.
        normalize: mean and standard deviation per channel, for pixels between 0 and 1 (`vitfast.image_spec` knows a
            model's). The model then takes uint8 pixels `[B, C, H, W]` too, 0 to 255, and the patch-embed kernel
            normalises them. NCHW and channels_last are read in place, so an NHWC batch goes in as
            `batch.permute(0, 3, 1, 2)`. Floating-point pixels mean what they did. A further call replaces the numbers.
        attention: who computes attention in the modules that are replaced: "auto" (our kernel, or torch where the tuned
            table says so), "triton" (our kernel), "sdpa" (torch), "flash_attn" or "xformers" (those libraries). What a
            backend does not take (a device, dtype, head dim or bias) is an error when the model runs; modules that run
            their original forward, and masked attention, do not ask it. None leaves it as it is, "auto" at first.
        example: a batch of pixels on the model's device. With it, what is selected is measured first, in this model, in
            inference and without a compiler, in about 10 seconds: kinds without which the model is faster are left
            out, a GEMM or attention that torch does faster goes to torch, and nothing is replaced if the plain model
            is faster. `report(model)` shows the figures. They are remembered in `$VITFAST_CONFIG_DIR/choices`, else in
            the user's cache, by device, versions, model and shapes. It implies `frozen`.
        frozen: promises that weights stay as they are. Then, and only then, things are derived from them and kept, for
            inference on a GPU: folded norms, one weight for q, k and v, tables of positions by columns. What changes
            weights where torch can see it (training, `load_state_dict`, `.to()`, an optimiser's step, another module)
            derives them anew at the next call; of writes through `.data` tell it by `vitfast.refresh(model)`.
        compile: also compile the model's forward (`model.compile()`), so the state dict has no `_orig_mod.` prefix.
        cuda_graph: also run `model(pixels)` in inference as a CUDA graph, captured when a batch size comes again. A
            number bounds the memory that the graphs keep, in MiB; True stands for 2048. It implies `frozen`; hooks,
            gradients, train mode and other arguments take the plain path. A further call captures anew.
        strict: raise if a module of a selected kind cannot be replaced, and replace nothing.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is no `torch.nn.Module`, or a scripted one.
        ImportError: the library of the `attention` backend is missing.
        ValueError: an unknown precision, kind or attention backend; with `strict`, the modules that cannot be replaced
            and why; a model that was cast to another precision before, or a precision for offloaded weights; an
            `example` that the model cannot take, or for a model that is accelerated already; `normalize` with wrong
            numbers, without a patch embedding that is replaced, or for a model of Transformers, which casts pixels
            before any of its modules sees them; a `cuda_graph` that bounds nothing.
    """
    check_model(model)
    selected = _kinds(only)
    max_mib = memory_bound(cuda_graph)
    policy = None if precision is None else get_precision(precision)
    state: _State = vars(model).get(STATE) or _State()
    backend = state.attention if attention is None else attention
    backends.require(backend)
    if policy and state.precision and policy != state.precision:
        raise ValueError(
            f"the model was accelerated in {state.precision.name}; restore it before going to {policy.name}"
        )
    if policy and offloaded(model):
        raise ValueError(f"precision={policy.name!r}, but weights are offloaded; load the model in {policy.dtype}")

    for module in model.modules():
        # its class was changed, or an option: what a further call finds is what holds now
        if "replaces" in vars(type(module)) and disproved(module):  # type: ignore[arg-type]
            module.__class__ = type(module).replaces  # type: ignore[attr-defined]
    found = [(name, module, m) for name, module, m in matches(model) if selected.intersection(serves(m))]
    if strict:
        refused = [
            f"{name or '(model)'} ({type(module).__name__}): {m.reason}" for name, module, m in found if m.reason
        ]
        if refused:
            raise ValueError("strict: these modules cannot be replaced: " + "; ".join(refused))
        if not found and not any(isinstance(module, FusedLayer) for module in model.modules()):
            raise ValueError(f"strict: nothing in this {type(model).__name__} can be replaced")
    if example is not None:
        if any(isinstance(module, FusedLayer) for module in model.modules()):
            raise ValueError("example: the model is accelerated already; restore it first, as it is timed without that")
        kinds = [kind for kind in KINDS if kind in selected]
        state.choice = select(
            model, example, kinds, swap=accelerate, precision=precision, cuda_graph=cuda_graph, attention=backend
        )
        selected = frozenset(state.choice.kinds)
        found = [match for match in found if selected.intersection(serves(match[2]))]
    embeds = [] if normalize is None else _uint8_embeds(model, found, normalize)
    for _, module, m in found:
        if m.fused is not None:
            # its class's own, if any, would stand in front of the new class's
            module.__dict__.pop("forward", None)
            module.__class__ = m.fused
    for module in model.modules():
        if isinstance(module, FusedModel):
            module.tail = module.tail or "tail" in selected
        elif isinstance(module, FusedBlock):
            module.fold = module.fold or ("fold" in selected and module.can_fold)
        if isinstance(module, FusedStemModel):
            module.stem = module.stem or "patch_embed" in selected
    for embed in embeds:
        embed.set_normalize(normalize)

    if policy:
        # a further call casts what was put into the model since
        for key, original in cast(model, policy.dtype).items():
            if original is not None or key not in state.originals:
                state.originals[key] = original
        state.precision = policy
    if state.precision:
        for module in model.modules():
            if isinstance(module, FusedLayer):
                module.tf32 = state.precision.tf32
    state.attention = backend
    state.frozen = state.frozen or frozen or example is not None or bool(max_mib)
    for module in model.modules():
        if isinstance(module, FusedLayer):
            module.attention_backend, module.frozen = backend, state.frozen
            module.forget()
    if state.graphs:
        max_mib = max_mib or state.graphs.max_mib
        detach(model, state.graphs)
    if compile:
        model.compile()
        state.compiled = True
    if max_mib:
        state.graphs = attach(model, max_mib)
    if state != _State():
        model.__dict__[STATE] = state
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`: the original classes, dtypes and forward, with what training changed.

    Parameters stay the objects that they are. The values of those that were cast are the original ones, bit for bit,
    where they were not changed since, else the changed ones in the original dtype.

    Args:
        model: the model that `accelerate` was given; one that was not accelerated stays as it is.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
    """
    check_model(model)
    state: _State | None = model.__dict__.pop(STATE, None)
    if state is not None and state.graphs:
        # before the memory goes that they read
        detach(model, state.graphs)
    for module in model.modules():
        # a class made around the fused one (FSDP's, a parametrisation's) is its maker's to undo
        replaces = vars(type(module)).get("replaces")
        if isinstance(module, FusedLayer) and replaces is not None:
            module.forget()
            for name in SWITCHES:
                module.__dict__.pop(name, None)
            if isinstance(module, FusedPatchEmbed):
                module.set_normalize(None)
            module.__class__ = replaces
    if state is not None:
        if state.precision is not None:
            uncast(model, state.precision.dtype, state.originals)
        if state.compiled:
            model._compiled_call_impl = None
    return model


def refresh(model: Model) -> Model:
    """Derive anew what `accelerate(frozen=True)` keeps, after weights were written where torch does not see it.

    That is what goes through `.data`: some averages of weights, some optimisers, merged adapters.
    Without `frozen` there is nothing to do. CUDA graphs are captured anew.

    Args:
        model: the model that `accelerate` was given.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is no `torch.nn.Module`.
    """
    check_model(model)
    for module in model.modules():
        if isinstance(module, FusedLayer):
            module.forget()
    state: _State | None = model.__dict__.get(STATE)
    if state is not None and state.graphs:
        state.graphs.release()
    return model


def _kinds(only: Collection[str] | None) -> frozenset[str]:
    if only is None:
        return frozenset(KINDS)
    if isinstance(only, str):
        raise ValueError(f"only={only!r} is a string; expected a collection such as {{{only!r}}}")
    unknown = sorted(set(only) - set(KINDS))
    if unknown:
        raise ValueError(f"only: unknown kind {unknown[0]!r}; expected some of {', '.join(KINDS)}")
    return frozenset(only)


def _uint8_embeds(
    model: nn.Module, found: list[tuple[str, nn.Module, Match]], normalize: tuple[Sequence[float], Sequence[float]]
) -> list[Any]:
    """The patch embeddings that are fused, or will be, and shall normalise; raises where one cannot."""
    stems: list[tuple[str, Any, Any]] = [
        (name, module, type(module)) for name, module in model.named_modules() if isinstance(module, FusedPatchEmbed)
    ]
    stems += [(name, module, m.fused) for name, module, m in found if m.fused and issubclass(m.fused, FusedPatchEmbed)]
    convolved = [
        f"{name or '(model)'}: {why}" for name, stem, fused in stems for why in view_as(fused, stem).why_convolved()
    ]
    if convolved or not stems:
        declined = [f"{name or '(model)'}: {m.reason}" for name, _, m in found if m.kind == "patch_embed" and m.reason]
        reasons = "; ".join(convolved + declined) or "there is none"
        raise ValueError(f"normalize: uint8 pixels need a replaced patch embedding ({reasons})")
    for module in model.modules():
        if any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__):
            # they would reach the kernel as numbers up to 255 that pass for normalised ones
            name = type(module).__name__
            raise ValueError(f"normalize: {name} of Transformers casts uint8 pixels before they are embedded")
    if len(normalize) != 2:
        raise ValueError(f"normalize={normalize!r}; expected (mean, std)")
    for what, values in zip(("mean", "std"), normalize, strict=True):
        channels = view_as(stems[0][2], stems[0][1]).conv.in_channels
        if len(values) != channels or not all(math.isfinite(value) for value in values):
            raise ValueError(f"normalize: {what} is {tuple(values)}; expected {channels} numbers, one per channel")
    if min(normalize[1]) <= 0.0:
        raise ValueError(f"normalize: std is {tuple(normalize[1])}; expected positive numbers")
    return [stem for _, stem, _ in stems]
