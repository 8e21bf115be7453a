"""torchvision's VisionTransformer and nn.MultiheadAttention, plain and accelerated."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from torchvision.models.vision_transformer import ConvStemConfig, EncoderBlock
from torchvision.ops import MLP

import vitfast
from tests._close import assert_close
from tests.vitfast import _contracts
from tests.vitfast._models import assert_same, check, fused_names, images, kept_reasons, randomise
from vitfast import kernels
from vitfast.layers import FusedBlock

X = (2, 3, 32, 32)
# 4 x 4 patches, head width 12
TINY = {
    "image_size": 32,
    "patch_size": 8,
    "num_layers": 2,
    "num_heads": 4,
    "hidden_dim": 48,
    "mlp_dim": 96,
    "num_classes": 7,
}


def vit(**changes) -> nn.Module:
    return randomise(VisionTransformer(**{**TINY, **changes})).eval()


OPTIONS = {
    "plain": {},
    "representation": {"representation_size": 12},
    "LayerNorm of another eps": {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    "BatchNorm": {"norm_layer": lambda width: nn.Identity()},
    "convolutional stem": {"conv_stem_configs": [ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 4)]},
    "one block": {"num_layers": 1},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_outputs_and_gradients(option):
    check(vit, images(4, *X[1:]), **OPTIONS[option])


DROPOUTS = {
    "dropout": {"dropout": 0.3},
    "attention dropout": {"attention_dropout": 0.3},
    "both": {"dropout": 0.2, "attention_dropout": 0.2},
}


@pytest.mark.parametrize("option", DROPOUTS)
def test_dropout_draws_the_same_random_numbers(option):
    _contracts.check_training(vit(**DROPOUTS[option]), images(4, *X[1:]))
    check(vit, images(4, *X[1:]), **DROPOUTS[option])


def test_every_part_of_the_model_is_replaced():
    fused = vitfast.accelerate(vit())
    names = fused_names(fused)
    assert names[""] == "FusedTorchvisionVisionTransformer"
    assert names["encoder.ln"] == "FusedLayerNorm"
    for i in range(2):
        block = f"encoder.layers.encoder_layer_{i}"
        assert names[block] == "FusedTorchvisionBlock"
        assert names[f"{block}.self_attention"] == "FusedMultiheadAttention"
        assert names[f"{block}.mlp"] == "FusedTorchvisionMlp"
        assert names[f"{block}.ln_1"] == names[f"{block}.ln_2"] == "FusedLayerNorm"
    report = vitfast.report(fused)
    assert not report.kept and not any(row.note for row in report.replaced)


def test_what_is_left_to_modules_is_reported():
    stem = vitfast.report(vitfast.accelerate(vit(**OPTIONS["convolutional stem"])))
    assert stem.rows[0].note == "conv_proj is a Sequential: called as a module"
    notes = {
        row.module.rpartition(".")[2]: row.note
        for row in vitfast.report(vitfast.accelerate(vit(**DROPOUTS["both"]))).rows
    }
    assert notes["self_attention"] == "attention dropout 0.2: the original forward runs in training"
    assert notes["encoder_layer_0"] == "drop_path1 0.2: its residual is added outside the kernel in training"


def _seen(monkeypatch, model: nn.Module, x: Tensor) -> list[str]:
    """The kernels that run, by name."""
    seen: list[str] = []
    with monkeypatch.context() as patch:
        for name in ("patch_embed", "layer_norm", "linear", "attention_qkv"):
            original = getattr(kernels, name)
            call = lambda *args, name=name, original=original, **kwargs: seen.append(name) or original(*args, **kwargs)  # noqa: E731
            patch.setattr(kernels, name, call)
        with torch.no_grad():
            model(x)
    return seen


@pytest.mark.parametrize("kind", ["patch_embed", "layer_norm", "mlp", "fold"])
def test_kinds_are_switched_on_one_by_one(kind, monkeypatch):
    model = vitfast.accelerate(vit(), only={kind})
    seen = set(_seen(monkeypatch, model, images(*X)))
    assert (
        seen == {"patch_embed": {"patch_embed"}, "layer_norm": {"layer_norm"}, "mlp": {"linear"}, "fold": set()}[kind]
    )
    with torch.no_grad():
        torch.testing.assert_close(model(images(*X)), vit()(images(*X)), rtol=1e-4, atol=1e-5)


def test_the_last_block_computes_the_class_token_alone(monkeypatch):
    kept = []
    prefix = FusedBlock.fused_prefix
    monkeypatch.setattr(FusedBlock, "fused_prefix", lambda self, x, n, plan: kept.append(n) or prefix(self, x, n, plan))
    plain = vit()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert_same(plain, fused, images(*X), grad=False)
    assert kept == [1]
    # whoever looks at the encoder's output sees all of it
    shapes = []
    fused.encoder.ln.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
    fused(images(*X))
    assert shapes == [(2, 17, 48)] and kept == [1]


def test_the_encoder_and_the_steps_of_the_model_work_by_themselves():
    def steps(model, x):
        x = model._process_input(x)
        return model.encoder(torch.cat((model.class_token.expand(x.shape[0], -1, -1), x), dim=1))

    check(vit, images(*X), steps)


@pytest.mark.parametrize("what", ["encoder", "_process_input", "encoder.layers"])
def test_what_is_replaced_on_the_model_takes_effect(what):
    def patch(model):
        if what == "encoder":
            model.encoder.forward = lambda x: torch.tanh(x)
        elif what == "_process_input":
            model._process_input = lambda x: 2.0 * VisionTransformer._process_input(model, x)
        else:
            model.encoder.layers.append(nn.Tanh())
        return model

    x = images(*X)
    expected = patch(vit())(x)
    torch.testing.assert_close(patch(vitfast.accelerate(vit()))(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vitfast.accelerate(patch(vit()))(x), expected, rtol=1e-4, atol=1e-5)


def test_hooks():
    _contracts.check_hooks(vit(), images(*X))


def test_copies_pickles_and_state_dicts():
    _contracts.check_copies(vit(), images(*X))


def test_compiles_in_one_graph():
    _contracts.check_compile(vit(), images(*X))


def test_memory_layouts():
    _contracts.check_layouts(vit(), images(*X))


def test_wrong_images_get_torchvisions_own_error():
    _contracts.check_errors(vit(), images(2, 3, 40, 32), images(2, 3, 32, 40), images(2, 4, 32, 32), images(3, 32, 32))
    block = EncoderBlock(4, 48, 96, 0.0, 0.0).eval()
    _contracts.check_errors(block, images(17, 48))


def test_uint8_pixels():
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)
    x = torch.randint(0, 256, X, dtype=torch.uint8)
    normal = (x / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    fused = vitfast.accelerate(vit(), normalize=(mean, std))
    with torch.no_grad():
        torch.testing.assert_close(fused(x), vit()(normal), rtol=1e-4, atol=1e-5)
        folding = vitfast.accelerate(vit(), only={"fold"}, normalize=(mean, std))
        torch.testing.assert_close(folding(x), vit()(normal), rtol=1e-4, atol=1e-5)
    assert "pixel_affine" not in fused.state_dict()
    with pytest.raises(ValueError, match="conv_proj is a Sequential"):
        vitfast.accelerate(vit(**OPTIONS["convolutional stem"]), normalize=(mean, std))


def test_16_bits():
    plain = vit()
    fused = vitfast.accelerate(copy.deepcopy(plain), precision="bf16")
    x = images(*X, dtype=torch.bfloat16)
    with torch.no_grad():
        rounded = copy.deepcopy(plain).bfloat16()
        assert_close(fused(x), copy.deepcopy(rounded).double()(x.double()), rounded(x))
        pixels = x.float()
        with torch.autocast("cpu", torch.bfloat16):
            out, expected = vitfast.accelerate(vit())(pixels), plain(pixels)
        assert out.dtype == expected.dtype
        assert_close(out, copy.deepcopy(plain).double()(pixels.double()), expected)


@pytest.mark.interpret
def test_kernels():
    _contracts.check_folds(vit(num_layers=3), images(*X), 2)
    _contracts.check_folds(vit(num_layers=2), images(*X), 2, lambda model, x: features(model, x))


def features(model, x):
    seen = []
    handle = model.encoder.ln.register_forward_hook(lambda m, args, out: seen.append(out))
    model(x)
    handle.remove()
    return seen


@pytest.mark.interpret
@pytest.mark.parametrize("setting", ["batch first", "batch second", "three heads"])
def test_multihead_attention_by_kernels(setting):
    plain = mha(**SETTINGS[setting])
    assert_same(plain, vitfast.accelerate(copy.deepcopy(plain)), images(5, 7, 48), CALLS["self"])


# --- torch.fx


NODES = ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1.mlp", "encoder.ln", "heads"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_feature_extraction(when):
    x = images(*X)
    plain = create_feature_extractor(vit(), NODES)
    if when == "after":
        extractor = create_feature_extractor(vitfast.accelerate(vit()), NODES)
    else:
        extractor = vitfast.accelerate(create_feature_extractor(vit(), NODES))
    assert fused_names(extractor)
    for train in (False, True):
        _contracts.assert_trees(extractor.train(train)(x), plain.train(train)(x))


def test_a_trace_has_the_same_steps_and_stays_fused(monkeypatch):
    assert get_graph_node_names(vitfast.accelerate(vit())) == get_graph_node_names(vit())
    traced = torch.fx.symbolic_trace(vitfast.accelerate(vit()))
    assert "attention_qkv" in _seen(monkeypatch, traced, images(*X))
    torch.testing.assert_close(traced(images(*X)), vit()(images(*X)), rtol=1e-4, atol=1e-5)


# --- torchvision's MLP, which other models hold


MLPS = {
    "relu": (lambda: MLP(8, [16, 8], dropout=0.1), "activation ReLU is in no epilogue"),
    "tanh": (lambda: MLP(8, [16, 8], activation_layer=partial(nn.GELU, approximate="tanh"), inplace=None), None),
    "three layers": (lambda: MLP(8, [16, 16, 8], activation_layer=nn.GELU, inplace=None), "-"),
    "norm": (lambda: MLP(8, [16, 8], norm_layer=nn.LayerNorm, activation_layer=nn.GELU, inplace=None), "-"),
}


@pytest.mark.parametrize("name", MLPS)
def test_mlps(name):
    build, reason = MLPS[name]
    plain = randomise(build()).eval()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert (type(fused) is MLP) == (reason is not None)
    # what is no MLP of the known form looks like one
    reason = "no fused layer is offered for MLP" if reason == "-" else reason
    assert kept_reasons(fused) == ({} if reason is None else {"": reason})
    x = images(3, 8)
    torch.testing.assert_close(fused(x), plain(x))


# --- nn.Sequential


class QuickGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


class SlowGELU(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.7 * x)


def mlp(activation: nn.Module) -> nn.Sequential:
    return randomise(nn.Sequential(nn.Linear(8, 16), activation, nn.Linear(16, 8)))


@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), QuickGELU()], ids=["gelu", "tanh", "quick"])
def test_sequential_mlp(act, monkeypatch):
    plain = mlp(act)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert fused_names(fused) == {"": "FusedSequential"}
    assert _seen(monkeypatch, fused, images(3, 8)) == ["linear", "linear"]
    assert_same(plain, fused, images(3, 8))
    _contracts.check_compile(plain, images(3, 8))


@pytest.mark.parametrize("act", [nn.ReLU(), SlowGELU()], ids=["relu", "slow"])
def test_other_sequentials_are_of_no_interest(act):
    for model in (mlp(act), nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Sequential()):
        assert not vitfast.report(vitfast.accelerate(model)).rows


def test_a_sequential_mlp_that_was_changed():
    fused = vitfast.accelerate(mlp(nn.GELU()))
    x = images(3, 8)
    torch.testing.assert_close(fused[:2](x), nn.GELU()(fused[0](x)))
    fused.append(nn.Tanh())
    torch.testing.assert_close(fused(x), torch.tanh(mlp(nn.GELU())(x)))
    assert "has other modules than it had" in str(vitfast.report(fused))
    block = vitfast.accelerate(randomise(EncoderBlock(4, 48, 96, 0.0, 0.0)).eval())
    plain = vitfast.restore(copy.deepcopy(block))
    for model in (block, plain):
        model.mlp.insert(1, nn.Tanh())
    torch.testing.assert_close(block(images(2, 5, 48)), plain(images(2, 5, 48)))


# --- nn.MultiheadAttention


def mha(**changes) -> nn.MultiheadAttention:
    return randomise(nn.MultiheadAttention(**{"embed_dim": 48, "num_heads": 4, "batch_first": True, **changes})).eval()


def _self(model, x, **kwargs):
    return model(x, x, x, **kwargs)


def _keys(model, x):
    return torch.zeros(x.shape[0] if model.batch_first else x.shape[1], x.shape[1] if model.batch_first else x.shape[0])


def _masked(model, x):
    mask = _keys(model, x).bool()
    mask[:, -2:] = True
    return mask


CALLS = {
    "self": lambda m, x: _self(m, x, need_weights=False),
    "weights": lambda m, x: _self(m, x),
    "weights of each head": lambda m, x: _self(m, x, average_attn_weights=False),
    "padding": lambda m, x: _self(m, x, need_weights=False, key_padding_mask=_masked(m, x)),
    "mask": lambda m, x: _self(m, x, need_weights=False, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1)),
    "additive mask": lambda m, x: _self(m, x, need_weights=False, attn_mask=images(5, 5).to(x.dtype)),
    "causal": lambda m, x: _self(
        m, x, need_weights=False, is_causal=True, attn_mask=torch.full((5, 5), -torch.inf, dtype=x.dtype).triu(1)
    ),
    "other keys": lambda m, x: m(x, x.flip(1), x.flip(1), need_weights=False),
    "other values": lambda m, x: m(x, x, 2.0 * x, need_weights=False),
    "one image": lambda m, x: _self(m, x[:, 0], need_weights=False),
    "strided": lambda m, x: _self(m, x.transpose(0, 1).contiguous().transpose(0, 1), need_weights=False),
    "positional": lambda m, x: m(x, x, x, None, False),
}
SETTINGS = {
    "batch first": {},
    "batch second": {"batch_first": False},
    "no bias": {"bias": False},
    "three heads": {"num_heads": 3},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("call", CALLS)
def test_multihead_attention(call, setting):
    fused = check(lambda: mha(**SETTINGS[setting]), images(5, 5, 48), CALLS[call])
    plain = vitfast.restore(copy.deepcopy(fused))
    with torch.no_grad():
        outputs, expected = CALLS[call](fused, images(5, 5, 48)), CALLS[call](plain, images(5, 5, 48))
    assert type(outputs) is tuple and (outputs[1] is None) is (expected[1] is None)


def test_which_calls_run_the_kernel(monkeypatch):
    for setting in SETTINGS:
        fused = vitfast.accelerate(mha(**SETTINGS[setting]))
        ran = [name for name, call in CALLS.items() if _ran(monkeypatch, fused, call)]
        assert ran == ["self", "strided", "positional"], setting


def _ran(monkeypatch, model, call) -> bool:
    with monkeypatch.context() as patch:
        seen = []
        original = kernels.attention_qkv
        patch.setattr(kernels, "attention_qkv", lambda *args, **kwargs: seen.append(1) or original(*args, **kwargs))
        call(model, images(5, 5, 48))
    return bool(seen)


def test_multihead_attention_dropout():
    _contracts.check_training(mha(dropout=0.4), images(5, 5, 48), CALLS["self"])
    check(lambda: mha(dropout=0.4), images(5, 5, 48), CALLS["self"])


KEPT = {
    "kdim": ({"kdim": 24, "vdim": 24}, "separate weights for q, k and v"),
    "bias_k": ({"add_bias_kv": True}, "adds a key and a value of its own (add_bias_kv, add_zero_attn)"),
    "zero": ({"add_zero_attn": True}, "adds a key and a value of its own (add_bias_kv, add_zero_attn)"),
    "wide": ({"embed_dim": 1024, "num_heads": 1}, f"head dim 1024; the kernel takes up to {kernels.MAX_HEAD_DIM}"),
}


@pytest.mark.parametrize("case", KEPT)
def test_declined_attention(case):
    changes, reason = KEPT[case]
    fused = vitfast.accelerate(mha(**changes))
    assert type(fused) is nn.MultiheadAttention and kept_reasons(fused) == {"": reason}


def test_a_transformer_encoder_of_torch():
    layer = nn.TransformerEncoderLayer(48, 4, 96, activation="gelu", batch_first=True, norm_first=True)
    plain = randomise(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)).eval()
    padding = torch.zeros(5, 5, dtype=torch.bool)
    padding[:, -1] = True
    for train in (False, True):
        for module in plain.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        fused = vitfast.accelerate(copy.deepcopy(plain))
        assert_same(plain, fused, images(5, 5, 48), train=train)
        assert_same(plain, fused, images(5, 5, 48), lambda m, x: m(x, src_key_padding_mask=padding), train=train)


def test_a_module_around_the_attention_is_called():
    class Wrapper(nn.Module):
        """As LoRA of peft: another class in the attention's place that calls it."""

        def __init__(self, base):
            super().__init__()
            self.base = base
            self.more = nn.Linear(48, 48)

        def forward(self, query, *args, **kwargs):
            out, weights = self.base(query, *args, **kwargs)
            return out + self.more(query), weights

    plain = vit()
    for block in plain.encoder.layers:
        block.self_attention = Wrapper(block.self_attention)
    randomise(plain)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert "encoder.layers.encoder_layer_0.self_attention.base" in fused_names(fused)
    assert "attn is a Wrapper: its residual is added outside it" in str(vitfast.report(fused))
    assert_same(plain, fused, images(*X))


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(when):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=2, target_modules=["self_attention", "0"], init_lora_weights=False)

    def adapt(model):
        torch.manual_seed(0)
        return peft.get_peft_model(model, config)

    plain = adapt(vit()).eval()
    fused = adapt(vitfast.accelerate(vit())) if when == "after" else vitfast.accelerate(adapt(vit()))
    fused.eval()
    assert any(name.endswith("self_attention.base_layer") for name in fused_names(fused))
    x = images(*X)
    results = []
    for model in (plain, fused):
        out = model(x)
        out.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((out, grads))
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-4, atol=1e-4)
    assert results[1][1].keys() == results[0][1].keys() != set()
    for name, grad in results[1][1].items():
        torch.testing.assert_close(grad, results[0][1][name], rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        merged = fused.merge_and_unload()
        torch.testing.assert_close(merged(x), results[0][0], rtol=1e-4, atol=1e-4)
