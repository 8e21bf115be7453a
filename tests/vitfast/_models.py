"""Tiny models with weights that matter, and the comparison of a plain model with an accelerated one."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import timm
import torch
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import vitfast
from tests._close import assert_close
from vitfast.kernels import INTERPRET

# odd enough that swapped sizes show: 3 x 4 patches, head width 12, two blocks
TINY = {"img_size": (24, 32), "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 4, "num_classes": 7}

# sizes of Transformers' models, and of the text models beside them: 4 x 4 patches, head width 12
HF_TINY: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
HF_TEXT: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 99,
    "max_position_embeddings": 16,
}
V4 = version("transformers").startswith("4.")


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values that matter: no zero heads, unit norms or vanishing LayerScale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                norm = any(word in name for word in ("norm", "ln_", ".ln."))
                centre = 1.0 if (norm and name.endswith("weight")) or "gamma" in name else 0.0
                p.copy_(centre + 0.3 * noise)
            elif name.endswith("weight"):
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.5 * noise)
    return model


def images(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(**changes: Any) -> nn.Module:
    """The reference model, in evaluation mode."""
    return randomise(vitfast.VisionTransformer(**{**TINY, **changes})).eval()


def timm_vit(**changes: Any) -> nn.Module:
    """timm's `VisionTransformer`, in evaluation mode."""
    return randomise(TimmVisionTransformer(**{**TINY, **changes})).eval()


def timm_deit(**changes: Any) -> nn.Module:
    """timm's distilled DeiT, in evaluation mode."""
    return randomise(VisionTransformerDistilled(**{**TINY, **changes})).eval()


def timm_beit(separate: bool = False, **changes: Any) -> nn.Module:
    """timm's `Beit` with a table in each block; with `separate`, biases are added behind the qkv layer."""
    options = {"use_rel_pos_bias": True, "use_abs_pos_emb": False, "init_values": 0.1}
    model = _with_key_biases(randomise(Beit(**{**TINY, **options, **changes})))
    for block in model.blocks:
        block.attn.qkv_bias_separate = separate
    return model.eval()


def timm_eva(**changes: Any) -> nn.Module:
    """timm's `Eva` with rotated tokens and heads 16 wide, in evaluation mode."""
    return _with_key_biases(randomise(Eva(**{**TINY, "embed_dim": 64, "use_rot_pos_emb": True, **changes}))).eval()


def timm_swin(version: int = 1, **changes: Any) -> nn.Module:
    """timm's `SwinTransformer` or the second version's, in evaluation mode.

    Maps are 6 x 8, shifted by (1, 1), and 3 x 4, which is one window high and shifted along its width alone.
    """
    options = {"img_size": (24, 32), "patch_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    kind = SwinTransformerV2 if version == 2 else SwinTransformer
    model = randomise(kind(**{**options, "num_classes": 7, "window_size": (3, 2), "drop_path_rate": 0.0, **changes}))
    for name, parameter in model.named_parameters():
        if name.endswith("logit_scale"):
            # around what training starts from; the last head's is cut off
            parameter.data = math.log(10.0) + parameter.data
            parameter.data[-1] = 5.0
    return _with_key_biases(model).eval()


def _with_key_biases(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(getattr(module, "k_bias", None), Tensor):
            # zero in practice, yet it is what timm adds
            module.k_bias.copy_(images(*module.k_bias.shape, seed=5))
    return model


def timm_model(name: str, **changes: Any) -> nn.Module:
    """A registered model of timm, in evaluation mode."""
    return randomise(timm.create_model(name, **changes)).eval()


BUILDERS = {"reference": reference, "timm": timm_vit}


def fused_names(model: nn.Module) -> dict[str, str]:
    """Name of each fused module's class, by the module's name."""
    return {row.module: row.fused for row in vitfast.report(model).replaced if row.fused}


def kept_reasons(model: nn.Module) -> dict[str, str]:
    """Note of each module that the report lists as not replaced, by the module's name."""
    return {row.module: row.note for row in vitfast.report(model).kept}


def hook_all(model: nn.Module) -> list[tuple[str, tuple[Any, ...], dict[str, Any], Any]]:
    """Give every module a hook; its name, arguments, keywords and output are appended to the list in each call."""
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda m, args, kwargs, out, name=name: seen.append((name, args, kwargs, out)), with_kwargs=True
        )
    return seen


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def run(
    model: nn.Module, call: Callable[..., Any], x: Tensor, *, train: bool = False, grad: bool = True, seed: int = 3
) -> dict[str, Tensor]:
    """Outputs of `call(model, x)` and the gradients of a fixed random functional of them, by name.

    The random numbers that the model draws start from `seed`.
    """
    model.train(train)
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_(grad)
    torch.manual_seed(seed)
    with torch.set_grad_enabled(grad):
        outputs = _tensors(call(model, x))
    results = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    if grad:
        loss = sum((out * images(*out.shape, seed=7 + i, dtype=out.dtype)).sum() for i, out in enumerate(outputs))
        loss.backward()
        results["gradient of the pixels"] = x.grad
        # two names of one tensor share a gradient
        for name, p in model.named_parameters(remove_duplicate=False):
            if p.grad is not None:
                results[f"gradient of {name}"] = p.grad.clone()
    model.zero_grad(set_to_none=True)
    return results


def forward(model: nn.Module, x: Tensor) -> Any:
    return model(x)


def assert_same(
    plain: nn.Module,
    fused: nn.Module,
    x: Tensor,
    call: Callable[..., Any] = forward,
    *,
    train: bool = False,
    grad: bool = True,
    truth: nn.Module | None = None,
) -> None:
    """Hold the accelerated model's outputs to the rule, against the plain model in float64, and its gradients to those.

    Gradients are compared in float64, where nothing but rounding may be between them: in fp32 the largest error of some
    thousand sums is a matter of luck, and the kernels' own are held to the rule where they are tested. With `train` the
    random numbers matter: float64 draws others, so the plain model itself is the truth.
    """
    ruled = grad and (train or INTERPRET)
    actual, baseline = (run(model, call, x, train=train, grad=ruled) for model in (fused, plain))
    if train:
        exact = {name: value.double() for name, value in baseline.items()}
    else:
        exact = run(truth or copy.deepcopy(plain).double(), call, x.double(), grad=grad)
    assert actual.keys() == baseline.keys() <= exact.keys()
    for name, value in actual.items():
        assert_close(value, exact[name], baseline[name], name=name)
    if grad and not ruled:
        double = run(copy.deepcopy(fused).double(), call, x.double())
        assert double.keys() == exact.keys()
        for name, value in double.items():
            message = functools.partial("{}: {}".format, name)
            torch.testing.assert_close(value, exact[name], rtol=1e-7, atol=1e-8, msg=message)


def assert_equal(
    plain: nn.Module,
    fused: nn.Module,
    x: Tensor,
    call: Callable[..., Any] = forward,
    *,
    train: bool = False,
) -> None:
    """Hold the accelerated model to the plain one in fp64: outputs and gradients, and outputs to the rule in fp32.

    For models with gradients of few numbers (Swin-V2's scale of a head), whose rounding in fp32 is a matter of luck.
    """
    actual, expected = (run(copy.deepcopy(m).double(), call, x.double(), train=train) for m in (fused, plain))
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-9, atol=1e-9, msg=lambda text, key=key: f"{key}: {text}")
    if not train:
        assert_same(plain, fused, x, call, grad=False)


def check(
    build: Callable[..., nn.Module],
    x: Tensor,
    call: Callable[..., Any] = forward,
    *,
    train: bool = False,
    **changes: Any,
) -> nn.Module:
    """Build a model, accelerate a copy, compare both; the accelerated one comes back."""
    plain = build(**changes)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert fused_names(fused), "nothing was replaced"
    assert_same(plain, fused, x, call, train=train)
    # and back: nothing of the fused layers is left behind
    again = vitfast.restore(copy.deepcopy(fused))
    assert [type(m) for m in again.modules()] == [type(m) for m in plain.modules()]
    assert_same(plain, again, x, call, train=train, grad=False)
    return fused
