"""`vitfast.register`: Transformers' own doors lead to the kernels, and lose neither masks nor weights."""

from __future__ import annotations

import copy
import importlib
import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

import vitfast
from tests._close import assert_close
from tests.vitfast._models import HF_TEXT, HF_TINY, V4, assert_same, images, randomise
from vitfast import kernels

# the module; the package exports a function under its name
module = importlib.import_module("vitfast.doors.register")

TOWERS: dict[str, tuple[Any, Any]] = {
    "ViT": (ViTModel, ViTConfig),
    "CLIP": (CLIPVisionModel, CLIPVisionConfig),
    "SigLIP": (SiglipVisionModel, SiglipVisionConfig),
    "DINOv2": (Dinov2Model, Dinov2Config),
    "BEiT": (BeitModel, BeitConfig),
}
X = (2, 3, 32, 32)


@pytest.fixture(autouse=True)
def _registered() -> None:
    vitfast.register()


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Tensor | None]:
    """The bias of each call of the kernel."""
    heard: list[Tensor | None] = []
    attention = kernels.attention

    def listening(q, k, v, scale=None, bias=None, tf32=False):
        heard.append(bias)
        return attention(q, k, v, scale, bias, tf32)

    monkeypatch.setattr(kernels, "attention", listening)
    return heard


def tower(name: str, implementation: str, **changes: Any) -> nn.Module:
    kind, config = TOWERS[name]
    settings = config(**{**HF_TINY, **changes})
    settings._attn_implementation = implementation
    return randomise(kind(settings)).eval()


def pair(name: str, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """Eager and ours, of the same weights; each has a config of its own."""
    return tower(name, "eager", **changes), tower(name, "vitfast", **changes)


@pytest.mark.parametrize("name", TOWERS)
def test_outputs_and_gradients(name: str, launches: list[Tensor | None]) -> None:
    if V4 and name == "BEiT":
        pytest.skip("version 4's BEiT has classes for attention of its own")
    changes = {"use_relative_position_bias": True} if name == "BEiT" else {}
    eager, ours = pair(name, **changes)
    assert_same(eager, ours, images(*X), grad=False)
    # two layers; BEiT's carry their relative position bias
    assert len(launches) == 2
    assert all((bias is not None) == (name == "BEiT") for bias in launches)
    # eager attention's products round otherwise: some true gradients are zero
    assert_same(tower(name, "sdpa", **changes), ours, images(*X))


def test_in_a_fresh_process_nothing_is_registered_before_it_is_asked() -> None:
    program = "; ".join(
        (
            "import sys, vitfast",
            "assert 'transformers' not in sys.modules and 'timm' not in sys.modules",
            # for torchvision
            "import tests.conftest",
            "from transformers import AttentionInterface",
            "assert 'vitfast' not in AttentionInterface._global_mapping",
            "vitfast.register(); vitfast.register()",
            "assert AttentionInterface._global_mapping['vitfast'].__module__ == 'vitfast.doors.register'",
        )
    )
    subprocess.run([sys.executable, "-c", program], check=True)


# --- the three ways in


def test_from_pretrained(tmp_path, launches: list[Tensor | None]) -> None:
    eager = tower("ViT", "eager")
    eager.save_pretrained(tmp_path)
    ours = AutoModel.from_pretrained(tmp_path, attn_implementation="vitfast")
    assert ours.config._attn_implementation == "vitfast"
    with torch.no_grad():
        outputs = [m.eval()(images(*X)).last_hidden_state for m in (ours, eager, copy.deepcopy(eager).double())]
    del outputs[2:]
    torch.testing.assert_close(*outputs)
    assert len(launches) == 2
    # the name is not written into the folder: whoever loads it need not have vitfast
    ours.save_pretrained(tmp_path / "again")
    assert "vitfast" not in json.dumps(json.loads((tmp_path / "again" / "config.json").read_text()))


def test_set_attn_implementation_and_back(launches: list[Tensor | None]) -> None:
    model = tower("DINOv2", "sdpa")
    plain = copy.deepcopy(model)
    model.set_attn_implementation("vitfast")
    assert_same(plain, model, images(*X), grad=False)
    assert len(launches) == 2
    model.set_attn_implementation("sdpa")
    model(images(*X))
    assert len(launches) == 2


def test_models_of_one_config_share_the_implementation(launches: list[Tensor | None]) -> None:
    # Transformers' own rule, which the docstring warns of
    settings = ViTConfig(**HF_TINY)
    first, second = ViTModel(settings).eval(), ViTModel(settings).eval()
    first.set_attn_implementation("vitfast")
    second(images(*X))
    assert len(launches) == 2
    copied = copy.deepcopy(first)
    copied.set_attn_implementation("sdpa")
    first(images(*X))
    assert len(launches) == 4


# --- masks


def text_inputs(padding: str) -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones(2, 9, dtype=torch.long)
    if padding == "right":
        mask[1, 5:] = 0
    elif padding == "left":
        mask[1, :4] = 0
    return {"input_ids": ids} | ({} if padding == "no mask" else {"attention_mask": mask})


def two_towers(kind: str, implementation: str) -> nn.Module:
    settings: Any = {
        "CLIP": lambda: CLIPConfig(text_config=HF_TEXT, vision_config=HF_TINY),
        "SigLIP": lambda: SiglipConfig(text_config=HF_TEXT, vision_config=HF_TINY),
    }[kind]()
    model = {"CLIP": CLIPModel, "SigLIP": SiglipModel}[kind](settings)
    model = randomise(model).eval()
    model.set_attn_implementation(implementation)
    return model


@pytest.mark.parametrize("padding", ["no mask", "all ones", "right", "left"])
@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_both_towers_with_causal_and_padding_masks(kind: str, padding: str, launches: list[Tensor | None]) -> None:
    inputs = text_inputs(padding)
    eager, ours = two_towers(kind, "eager"), two_towers(kind, "vitfast")
    # where a padded query sees no key, eager attention gives the mean of all values and the kernel zeros
    seen = inputs.get("attention_mask", torch.ones(2, 9)).bool()

    def call(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        out = model(pixel_values=x, **inputs)
        return out.vision_model_output.last_hidden_state, out.text_model_output.last_hidden_state[seen]

    if V4 or padding == "left":
        # in float64 eager attention's mask is NaN in its fp32 softmax
        with torch.no_grad():
            for actual, expected in zip(call(ours, images(*X)), call(eager, images(*X)), strict=True):
                torch.testing.assert_close(actual, expected)
    else:
        assert_same(eager, ours, images(*X), call, grad=False)
    assert len(launches) >= 4
    if padding in ("right", "left"):
        without = dict(inputs, attention_mask=torch.ones_like(inputs["attention_mask"]))
        with torch.no_grad():
            masked, full = (ours.text_model(**i).last_hidden_state[1, 5 - 1] for i in (inputs, without))
        if kind == "SigLIP" or padding == "left":
            # the mask is not dropped
            assert not torch.allclose(masked, full)


@pytest.mark.skipif(V4, reason="version 4 makes CLIP's masks without asking")
def test_a_mask_is_made_once_in_the_models_dtype(launches: list[Tensor | None]) -> None:
    model = two_towers("CLIP", "vitfast").bfloat16()
    model.text_model(**text_inputs("right"))
    first, second = launches
    assert first is not None and first is not second
    assert first.data_ptr() == second.data_ptr()
    assert first.dtype == torch.bfloat16
    assert set(first.unique().tolist()) == {0.0, float("-inf")}


@pytest.mark.skipif(V4, reason="version 4's ViT takes no attention mask")
@pytest.mark.parametrize("form", ["2-D", "boolean", "additive", "additive per head"])
def test_masks_of_every_form(form: str) -> None:
    eager, ours = pair("ViT")
    keep = torch.ones(2, 17, dtype=torch.bool)
    keep[0, 9:] = False
    additive = torch.zeros(2, 1, 17, 17).masked_fill(~keep[:, None, None], torch.finfo(torch.float32).min)
    mask = {
        "2-D": keep.long(),
        "boolean": keep[:, None, None].expand(2, 1, 17, 17),
        "additive": additive,
        "additive per head": additive + 0.3 * images(2, 4, 17, 17),
    }[form]

    def call(model: nn.Module, x: Tensor) -> Any:
        given = mask
        if model is not ours and form == "boolean":
            # eager attention would add it
            given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
        return model(x, attention_mask=given.to(x.dtype) if given.is_floating_point() else given)

    assert_same(eager, ours, images(*X), call, grad=False)
    with torch.no_grad():
        assert not torch.allclose(call(ours, images(*X))[0], ours(images(*X))[0])


def test_a_query_that_sees_no_key_gives_zeros() -> None:
    q, k, v = (images(1, 2, 3, 8, seed=seed) for seed in range(3))
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    mask[..., 1, :] = False
    out, weights = module.attention_forward(nn.Module(), q, k, v, mask, output_attentions=True)
    plain, none = module.attention_forward(nn.Module(), q, k, v, mask)
    assert none is None
    torch.testing.assert_close(out, plain)
    assert torch.equal(plain[:, 1], torch.zeros(1, 2, 8))
    assert torch.equal(weights[:, :, 1], torch.zeros(1, 2, 3))


# --- the function by itself, against Transformers' eager one


def eager_attention(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    from transformers.models.clip.modeling_clip import eager_attention_forward

    return eager_attention_forward(*args, **kwargs)


@pytest.mark.parametrize("causal", ["argument", "module", "neither", "mask beside it"])
def test_causal_order(causal: str) -> None:
    q, k, v = images(2, 7, 3, 3, 8).permute(2, 0, 3, 1, 4).unbind(0)
    assert not q.is_contiguous()
    owner = SimpleNamespace(is_causal=causal in ("module", "mask beside it"), training=False)
    mask = torch.zeros(1, 1, 7, 7) if causal == "mask beside it" else None
    given = {"is_causal": True} if causal == "argument" else {}
    out, _ = module.attention_forward(owner, q, k, v, mask, scaling=0.2, **given)
    seen = torch.zeros(7, 7)
    if causal in ("argument", "module"):
        seen = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)
    expected, _ = eager_attention(owner, q, k, v, seen, scaling=0.2)
    wide, _ = eager_attention(owner, q.double(), k.double(), v.double(), seen.double(), scaling=0.2)
    assert_close(out, wide, expected)
    assert out.is_contiguous()
    # one query of many keys is a step of decoding: it sees them all
    one, _ = module.attention_forward(SimpleNamespace(is_causal=True), q[:, :, :1], k, v, None, scaling=0.2)
    all_seen, _ = eager_attention(owner, q[:, :, :1], k, v, None, scaling=0.2)
    torch.testing.assert_close(one, all_seen)


def test_fewer_heads_of_keys_and_a_longer_mask() -> None:
    q, k, v = images(2, 6, 5, 8), images(2, 2, 5, 8, seed=2), images(2, 2, 5, 8, seed=3)
    mask = torch.zeros(2, 1, 5, 9)
    mask[..., 3:] = float("-inf")
    owner = SimpleNamespace(is_causal=False, training=False)
    out, _ = module.attention_forward(owner, q, k, v, mask)
    k, v = k.repeat_interleave(3, 1), v.repeat_interleave(3, 1)
    expected, _ = eager_attention(owner, q, k[:, :, :3], v[:, :, :3], None, scaling=8**-0.5)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "cache", "head_mask"])
def test_what_the_kernel_does_not_compute_is_refused(name: str) -> None:
    q = images(1, 2, 3, 8)
    with pytest.raises(ValueError, match=f"takes no {name}"):
        module.attention_forward(nn.Module(), q, q, q, None, **{name: 1.0})
    module.attention_forward(nn.Module(), q, q, q, None, **{name: None})


# --- weights and dropout


@pytest.mark.skipif(V4, reason="version 4 captures weights of eager attention alone")
@pytest.mark.parametrize("name", TOWERS)
def test_weights_are_handed_out_where_they_are_asked_for(name: str, launches: list[Tensor | None]) -> None:
    eager, ours = pair(name, **({"use_relative_position_bias": True} if name == "BEiT" else {}))
    out = ours(images(*X), output_attentions=True)
    assert launches == []
    expected, wide = (m(images(*X).to(m.dtype), output_attentions=True) for m in (eager, copy.deepcopy(eager).double()))
    assert len(out.attentions) == len(expected.attentions) == 2
    for actual, truth, baseline in zip(out.attentions, wide.attentions, expected.attentions, strict=True):
        assert_close(actual, truth, baseline)
    assert_close(out.last_hidden_state, wide.last_hidden_state, expected.last_hidden_state)
    assert ours(images(*X)).attentions is None


@pytest.mark.skipif(V4, reason="version 4 captures weights of eager attention alone")
def test_weights_under_a_mask() -> None:
    eager, ours = two_towers("CLIP", "eager"), two_towers("CLIP", "vitfast")
    inputs = text_inputs("right")
    actual, expected = (m.text_model(**inputs, output_attentions=True).attentions for m in (ours, eager))
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_dropout_in_training_is_torchs() -> None:
    changes: dict[str, Any] = {"attention_probs_dropout_prob": 0.4}
    sdpa, ours = tower("ViT", "sdpa", **changes), tower("ViT", "vitfast", **changes)
    assert_same(sdpa, ours, images(*X), train=True)
    assert_same(sdpa, ours, images(*X))


@pytest.mark.skipif(V4, reason="version 4 captures weights of eager attention alone")
def test_dropout_with_weights_is_eager_attentions() -> None:
    changes: dict[str, Any] = {"attention_probs_dropout_prob": 0.4}
    results = []
    for implementation in ("eager", "vitfast"):
        model = tower("ViT", implementation, **changes).train()
        torch.manual_seed(3)
        out = model(images(*X), output_attentions=True)
        results.append((out.last_hidden_state, *out.attentions))
    assert (results[0][1] == 0).any()
    torch.testing.assert_close(*results)


# --- with the rest of what vitfast and torch do


@pytest.mark.skipif(V4, reason="version 4's ViT takes no attention mask")
def test_beside_accelerate(launches: list[Tensor | None]) -> None:
    eager, ours = pair("ViT")
    vitfast.accelerate(ours)
    assert vitfast.report(ours).replaced
    assert_same(eager, ours, images(*X), grad=False)
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, 9:] = 0
    launches.clear()
    # masked attention is the original's, which asks for ours by name
    assert_same(eager, ours, images(*X), lambda m, x: m(x, attention_mask=mask), grad=False)
    assert len(launches) == 2
    weights = [m(images(*X), output_attentions=True).attentions for m in (ours, eager)]
    torch.testing.assert_close(*weights)


@pytest.mark.skipif(V4, reason="version 4's own forward breaks the graph")
@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("ViT", {}),
        ("ViT", {"attention_mask": torch.ones(2, 17, dtype=torch.long).tril(12)}),
        ("ViT", {"output_attentions": True}),
        ("SigLIP", {"output_attentions": True}),
    ],
    ids=["plain", "mask", "weights", "weights of SigLIP"],
)
def test_compiled_whole(name: str, given: dict[str, Any]) -> None:
    model = tower(name, "vitfast")
    with torch.no_grad():
        expected = model(images(*X), **given)
        actual = torch.compile(model, fullgraph=True, backend="aot_eager")(images(*X), **given)
    torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state)
    if "output_attentions" in given:
        assert len(actual.attentions) == 2
        torch.testing.assert_close(actual.attentions, expected.attentions)


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="unknown library 'flax'; expected some of transformers, timm"):
        vitfast.register("flax")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"vitfast\[transformers\]"):
        vitfast.register()
