"""`vitfast.doors.hf_layers`: by the rules of Hugging Face's `kernelize`, and through it where that is installed."""

from __future__ import annotations

import copy
import inspect
import subprocess
import sys
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import ViTConfig
from transformers.models.clip.modeling_clip import CLIPMLP
from transformers.models.siglip.modeling_siglip import SiglipMLP
from transformers.models.vit import modeling_vit

from tests.vitfast._models import assert_same, images, randomise
from vitfast import kernels
from vitfast.doors import hf_layers


def mlp(kind: Any, act: str = "gelu") -> nn.Module:
    return kind(ViTConfig(hidden_size=24, intermediate_size=40, hidden_act=act))


# name in the mapping, and a layer of a library that it stands for
REPLACED: dict[str, tuple[str, Any]] = {
    "LayerNorm": ("LayerNorm", lambda: nn.LayerNorm(24)),
    "CLIPMLP": ("CLIPMLP", lambda: mlp(CLIPMLP, "quick_gelu")),
    "SiglipMLP": ("CLIPMLP", lambda: mlp(SiglipMLP, "gelu_new")),
}
if hasattr(modeling_vit, "ViTMLP"):
    # version 5
    REPLACED["ViTMLP"] = ("CLIPMLP", lambda: mlp(modeling_vit.ViTMLP))


def kernelized(module: nn.Module, layer: type[nn.Module]) -> nn.Module:
    """As `kernelize` does it."""
    module = copy.deepcopy(module)
    module.forward = MethodType(layer.forward, module)  # type: ignore[method-assign]
    return module


def test_every_layer_has_what_it_stands_for() -> None:
    assert {name for name, _ in REPLACED.values()} == set(hf_layers.LAYERS)


@pytest.mark.parametrize(("name", "build"), REPLACED.values(), ids=REPLACED)
def test_the_rules(name: str, build: Any) -> None:
    # kernels 0.17, layer/layer.py, _validate_layer: kernelize raises on what breaks them
    layer, original = hf_layers.LAYERS[name], type(build())
    assert issubclass(layer, nn.Module)
    assert layer.__init__ is nn.Module.__init__
    members = {member for member, _ in inspect.getmembers(layer)} - {m for m, _ in inspect.getmembers(nn.Module)}
    assert members == {"has_backward", "can_torch_compile"}
    ours, theirs = (inspect.signature(kind.forward).parameters for kind in (layer, original))
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
    # kernelize caches by it
    assert hf_layers.mapping()[name]["cuda"] == hf_layers.Layer(layer)
    assert hash(hf_layers.mapping()[name]["cuda"]) == hash(hf_layers.Layer(layer))


@pytest.mark.parametrize(("name", "build"), REPLACED.values(), ids=REPLACED)
def test_outputs_and_gradients(name: str, build: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = randomise(build()).eval()
    ours = kernelized(plain, hf_layers.LAYERS[name])
    called: list[str] = []
    for op in ("layer_norm", "mlp"):
        original = getattr(kernels, op)
        monkeypatch.setattr(kernels, op, lambda *a, _op=op, _f=original, **k: called.append(_op) or _f(*a, **k))
    assert_same(plain, ours, images(2, 5, 24))
    # in fp32, and for the gradients in float64
    assert called == [{"LayerNorm": "layer_norm", "CLIPMLP": "mlp"}[name]] * 2


@pytest.mark.parametrize("shape", [(24,), (5, 24)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
def test_layer_norms_of_every_kind(shape: tuple[int, ...], affine: bool) -> None:
    plain = randomise(nn.LayerNorm(shape, elementwise_affine=affine)).eval()
    assert_same(plain, kernelized(plain, hf_layers.LayerNorm), images(2, 5, 24))


@pytest.mark.parametrize("change", ["activation", "hook", "another linear layer"])
def test_what_no_kernel_has_is_called_as_a_module(change: str) -> None:
    plain = randomise(mlp(CLIPMLP, "silu" if change == "activation" else "gelu")).eval()
    seen: list[torch.Size] = []
    if change == "hook":
        plain.activation_fn.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    elif change == "another linear layer":

        class Doubled(nn.Linear):
            def forward(self, input):
                return 2.0 * super().forward(input)

        plain.fc1.__class__ = Doubled
    ours = kernelized(plain, hf_layers.CLIPMLP)
    torch.testing.assert_close(ours(images(2, 5, 24)), plain(images(2, 5, 24)))
    assert len(seen) == (2 if change == "hook" else 0)


@pytest.mark.parametrize(("name", "build"), REPLACED.values(), ids=REPLACED)
def test_compiled_whole(name: str, build: Any) -> None:
    plain = randomise(build()).eval()
    ours = kernelized(plain, hf_layers.LAYERS[name])
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images(2, 5, 24)), plain(images(2, 5, 24)))


PROGRAM = """
import sys
try:
    from kernels import Mode, kernelize, replace_kernel_forward_from_hub, use_kernel_mapping
except ImportError:
    sys.exit(77)
sys.path.append(sys.argv[1])
import tests.conftest
import torch
from torch import nn
from tests.vitfast.test_hf_layers import REPLACED, images
from vitfast.doors import hf_layers

model = nn.ModuleDict({key: build() for key, (_, build) in REPLACED.items()}).eval()
with torch.no_grad():
    expected = {key: layer(images(2, 5, 24)) for key, layer in model.items()}
for key, (name, _) in REPLACED.items():
    replace_kernel_forward_from_hub(type(model[key]), name)
for mode in (Mode.INFERENCE, Mode.TRAINING | Mode.TORCH_COMPILE):
    with use_kernel_mapping(hf_layers.mapping(("cpu",)), inherit_mapping=False):
        kernelize(model, mode=mode, device="cpu", use_fallback=False)
    for key, (name, _) in REPLACED.items():
        assert model[key].forward.__func__ is hf_layers.LAYERS[name].forward, key
        torch.testing.assert_close(model[key](images(2, 5, 24)), expected[key])
"""


def test_through_the_package_itself(tmp_path: Path) -> None:
    # in a folder where `kernels` is not ours
    root = str(Path(__file__).parents[2])
    command = [sys.executable, "-c", PROGRAM, root]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the package kernels of Hugging Face is not installed")
    assert done.returncode == 0, done.stderr
