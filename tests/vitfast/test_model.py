"""The reference model against timm, torchvision and formulas written out by hand."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from tests._close import assert_close
from vitfast.reference.architectures import create_model
from vitfast.reference.parts import Block, DropPath, PatchEmbed
from vitfast.reference.positions import resize_pos_embed
from vitfast.reference.vit import VisionTransformer

# small enough for a test, odd enough that swapped sizes show: 3 x 4 patches, head width 12
TINY = {"img_size": (48, 64), "patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 7}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter values that matter: no zero heads, unit norms or vanishing LayerScale."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                centre = 1.0 if ("norm" in name and name.endswith("weight")) or "gamma" in name else 0.0
                p.copy_(centre + 0.3 * noise)
            elif name.endswith("weight"):
                p.copy_(noise / p[0].numel() ** 0.5)
            else:
                p.copy_(0.5 * noise)
    return model


def images(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Trio:
    """The model under test, a peer with the same weights, and that peer in float64."""

    def __init__(self, ours: nn.Module, peer: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.peer = randomise(peer).eval().to(dtype)
        self.truth = copy.deepcopy(self.peer).double()
        self.ours = ours.eval().to(dtype)
        self.ours.load_state_dict(self.peer.state_dict())
        self.dtype = dtype

    def check(self, call, x: Tensor, name: str) -> None:
        """Holds `call(model, x)` to the tolerance rule; it may return a tensor or nested lists of them."""
        x = x.to(self.dtype)
        with torch.no_grad():
            results = (call(self.ours, x), call(self.truth, x.double()), call(self.peer, x))
        self._compare(*results, name)

    def _compare(self, actual, truth, baseline, name: str) -> None:
        assert type(actual) is type(truth), name
        if isinstance(actual, Tensor):
            assert_close(actual, truth, baseline, name=name)
        elif isinstance(actual, dict):
            assert actual.keys() == truth.keys()
            for key in truth:
                self._compare(actual[key], truth[key], baseline[key], f"{name}[{key}]")
        else:
            assert len(actual) == len(truth), name
            for i, parts in enumerate(zip(actual, truth, baseline, strict=True)):
                self._compare(*parts, f"{name}[{i}]")


def swiglu() -> dict:
    return {"mlp_layer": timm.layers.SwiGLUPacked, "act_layer": nn.SiLU, "mlp_ratio": 5.0}


def eps(value: float):
    def norm(dim: int, **factory) -> nn.Module:
        return timm.layers.LayerNorm(dim, eps=value, **factory)

    return norm


# our options and timm's for the same model
OPTIONS: dict[str, tuple[dict, dict]] = {
    "plain": ({}, {}),
    "distilled": ({"distilled": True}, {}),
    "registers": ({"reg_tokens": 4}, {"reg_tokens": 4}),
    "registers_no_embed_class": 2 * ({"reg_tokens": 3, "no_embed_class": True},),
    "no_embed_class": 2 * ({"no_embed_class": True},),
    "layer_scale": 2 * ({"init_values": 1e-5},),
    "mean_pool": 2 * ({"global_pool": "avg"},),
    "mean_pool_no_class_token": 2 * ({"global_pool": "avg", "class_token": False, "fc_norm": False},),
    "mean_pool_registers": 2 * ({"global_pool": "avg", "class_token": False, "reg_tokens": 2},),
    "token_pool_fc_norm": 2 * ({"fc_norm": True},),
    "map_pool": 2 * ({"global_pool": "map", "class_token": False, "act_layer": "gelu_tanh"},),
    "map_pool_class_token": 2 * ({"global_pool": "map", "reg_tokens": 1},),
    "no_pool": 2 * ({"global_pool": ""},),
    "no_head": 2 * ({"num_classes": 0},),
    "clip": (
        {"pre_norm": True, "act_layer": "quick_gelu", "norm_eps": 1e-5},
        {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": eps(1e-5)},
    ),
    "large_eps": ({"norm_eps": 1e-2, "qk_norm": True}, {"norm_layer": eps(1e-2), "qk_norm": True}),
    "qk_norm": 2 * ({"qk_norm": True},),
    "swiglu": ({"mlp_layer": "swiglu", "mlp_ratio": 5.0}, swiglu()),
    "no_biases": 2 * ({"qkv_bias": False, "proj_bias": False},),
    "no_positions": 2 * ({"pos_embed": "none"},),
    "gray_patch_8x16": 2 * ({"in_chans": 1, "patch_size": (8, 16)},),
}


def pair(case: str, dynamic: bool = False, dtype: torch.dtype = torch.float32) -> Trio:
    ours, theirs = OPTIONS[case]
    peer = VisionTransformerDistilled if case == "distilled" else TimmVisionTransformer
    return Trio(VisionTransformer(**{**TINY, **ours}), peer(**{**TINY, **theirs}, dynamic_img_size=dynamic), dtype)


def batch(case: str, size: tuple[int, int] = (48, 64)) -> Tensor:
    return images(2, OPTIONS[case][0].get("in_chans", 3), *size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", OPTIONS)
def test_every_option_equals_timm(case: str, dtype: torch.dtype) -> None:
    trio, x = pair(case, dtype=dtype), batch(case)
    trio.check(lambda m, x: m.forward_features(x), x, "features")
    trio.check(lambda m, x: m.forward_head(m.forward_features(x), pre_logits=True), x, "pre_logits")
    trio.check(lambda m, x: m(x), x, "logits")
    assert trio.ours.num_features == trio.peer.num_features
    assert trio.ours.num_prefix_tokens == trio.peer.num_prefix_tokens
    assert trio.ours.no_weight_decay() == trio.peer.no_weight_decay()


@pytest.mark.parametrize(
    ("name", "overrides", "timm_name"),
    [
        ("vit_tiny_patch16_224", {}, "vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", {"patch_size": 32}, "vit_tiny_patch16_224"),
        ("vit_small_patch16_224", {}, "vit_small_patch16_224"),
        ("vit_small_patch32_224", {}, "vit_small_patch32_224"),
        ("vit_base_patch16_224", {}, "vit_base_patch16_224"),
        ("vit_base_patch32_224", {}, "vit_base_patch32_224"),
        ("deit_tiny_distilled_patch16_224", {}, "deit_tiny_distilled_patch16_224"),
    ],
    ids=["Ti16", "Ti32", "S16", "S32", "B16", "B32", "DeiT-Ti16-distilled"],
)
def test_whole_models_equal_timm(name: str, overrides: dict, timm_name: str) -> None:
    trio = Trio(create_model(name, **overrides), timm.create_model(timm_name, **overrides))
    x = images(1, 3, 224, 224)
    with torch.no_grad():
        ours, truth, peer = trio.ours(x), trio.truth(x.double()), trio.peer(x)
    assert_close(ours, truth, peer, name="logits")
    assert ours.argmax() == truth.argmax()


def from_torchvision(state: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "class_token": "cls_token",
        "conv_proj": "patch_embed.proj",
        "encoder.pos_embedding": "pos_embed",
        "encoder.layers.encoder_layer_": "blocks.",
        "ln_1": "norm1",
        "self_attention.in_proj_": "attn.qkv.",
        "self_attention.out_proj": "attn.proj",
        "ln_2": "norm2",
        "mlp.0": "mlp.fc1",
        "mlp.3": "mlp.fc2",
        "encoder.ln": "norm",
        "heads.pre_logits": "pre_logits.fc",
        "heads.head": "head",
    }
    renamed = {}
    for name, tensor in state.items():
        for old, new in names.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    return renamed


def check_against_torchvision(model: nn.Module, peer: nn.Module) -> None:
    randomise(peer.eval())
    model.eval().load_state_dict(from_torchvision(peer.state_dict()))
    x = images(1, 3, peer.image_size, peer.image_size)
    with torch.no_grad():
        assert_close(model(x), copy.deepcopy(peer).double()(x.double()), peer(x))


def test_equals_torchvision_vit_b_16() -> None:
    check_against_torchvision(create_model("vit_base_patch16_224"), torchvision.models.vit_b_16(weights=None))


def test_pre_training_head_equals_torchvision() -> None:
    peer = torchvision.models.VisionTransformer(48, 16, 3, 4, 48, 192, num_classes=7, representation_size=96)
    check_against_torchvision(VisionTransformer(**{**TINY, "img_size": 48}, representation_size=96), peer)


# ---------------------------------------------------------------------------------------------- resolution


@pytest.mark.parametrize("size", [(64, 48), (96, 80), (32, 32), (48, 64)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("case", ["plain", "distilled", "registers_no_embed_class", "map_pool"])
def test_other_resolutions_equal_timm(case: str, size: tuple[int, int]) -> None:
    trio, x = pair(case, dynamic=True), batch(case, size)
    trio.check(lambda m, x: m.forward_features(x), x, "features")
    trio.check(lambda m, x: m(x), x, "logits")


def test_resize_to_the_same_grid_changes_nothing() -> None:
    table = torch.randn(2, 3 + 5 * 11, 8)
    assert torch.equal(resize_pos_embed(table, (5, 11), (5, 11), 3), table)


def test_resize_defaults_are_timms_rule() -> None:
    table = torch.randn(1, 2 + 5 * 6, 8)
    expected = timm.layers.resample_abs_pos_embed(table, new_size=[3, 7], old_size=[5, 6], num_prefix_tokens=2)
    assert torch.equal(resize_pos_embed(table, (3, 7), (5, 6), 2), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_positions_are_resized_in_fp32(dtype: torch.dtype) -> None:
    model = randomise(VisionTransformer(**TINY)).to(dtype)
    pos = model.pos_embed
    patches = pos[:, 1:].float().reshape(1, 3, 4, 48).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=(5, 7), mode="bicubic", antialias=True)
    expected = torch.cat([pos[:, :1], patches.permute(0, 2, 3, 1).reshape(1, 35, 48).to(dtype)], dim=1)
    resized = model.pos_embed_for((5, 7))
    assert resized.dtype == dtype
    assert torch.equal(resized, expected)
    assert model.pos_embed_for((3, 4)) is pos


def test_resize_rule_is_an_option() -> None:
    model = randomise(VisionTransformer(**TINY, pos_interpolation="bilinear", pos_antialias=False))
    patches = model.pos_embed[:, 1:].reshape(1, 3, 4, 48).permute(0, 3, 1, 2)
    expected = F.interpolate(patches, size=(2, 9), mode="bilinear").permute(0, 2, 3, 1).reshape(1, 18, 48)
    assert torch.equal(model.pos_embed_for((2, 9))[:, 1:], expected)
    assert not torch.equal(VisionTransformer.pos_embed_for(reruled(model), (2, 9))[:, 1:], expected)


def reruled(model: VisionTransformer) -> VisionTransformer:
    default = VisionTransformer(**TINY)
    default.load_state_dict(model.state_dict())
    return default


def test_embed_is_the_stem_and_nothing_else() -> None:
    trio = pair("registers")
    stem = VisionTransformer(**{**TINY, "reg_tokens": 4, "pre_norm": True, "pos_drop_rate": 0.9}).train()
    stem.load_state_dict(trio.ours.state_dict(), strict=False)
    # a pre-norm stem has no patch bias
    with torch.no_grad():
        trio.peer.patch_embed.proj.bias.zero_()
    x = batch("registers")
    assert torch.equal(stem.embed(x), trio.peer._pos_embed(trio.peer.patch_embed(x)))


def test_prefix_tokens_are_class_distillation_registers() -> None:
    options = {"distilled": True, "reg_tokens": 2, "no_embed_class": True}
    model = randomise(VisionTransformer(**TINY, **options))
    prefix = torch.cat([model.cls_token, model.dist_token, model.reg_token], dim=1).expand(2, -1, -1)
    tokens = model.embed(batch("plain"))
    assert torch.equal(tokens[:, :4], prefix)
    assert torch.equal(tokens[:, 4:], model.patch_embed(batch("plain")) + model.pos_embed)


# ----------------------------------------------------------------------------------------------- timm's methods


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"indices": 2},
        {"indices": [0, -1], "norm": True},
        {"indices": [1], "stop_early": True, "output_fmt": "NLC"},
        {"return_prefix_tokens": True, "intermediates_only": True},
        {"indices": (2, 0), "return_prefix_tokens": True, "output_dict": True, "norm": True},
        {"indices": 1, "output_dict": True, "intermediates_only": True},
    ],
    ids=["default", "last_two", "listed_norm", "stop_early_nlc", "prefix", "dict", "dict_only"],
)
@pytest.mark.parametrize("case", ["registers", "map_pool"])
def test_forward_intermediates_equals_timm(case: str, arguments: dict) -> None:
    trio = pair(case, dynamic=True)
    trio.check(lambda m, x: m.forward_intermediates(x, **arguments), batch(case, (64, 48)), "intermediates")


@pytest.mark.parametrize(
    "arguments",
    [{}, {"n": 2, "norm": True}, {"n": [0, 2], "reshape": True, "return_prefix_tokens": True}],
    ids=["last", "last_two_norm", "listed_reshaped"],
)
def test_get_intermediate_layers_equals_timm(arguments: dict) -> None:
    pair("distilled").check(lambda m, x: m.get_intermediate_layers(x, **arguments), batch("distilled"), "layers")


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients_equal_timm(checkpointing: bool) -> None:
    trio, x = pair("layer_scale", dynamic=True), batch("layer_scale", (64, 48))
    calls = 0

    def count(*_) -> None:
        nonlocal calls
        calls += 1

    trio.ours.blocks[1].register_forward_pre_hook(count)
    trio.ours.set_grad_checkpointing(checkpointing)
    for model, pixels in ((trio.ours, x), (trio.truth, x.double()), (trio.peer, x)):
        model.train()
        model(pixels).square().sum().backward()
    # recomputing a block calls it a second time
    assert calls == (2 if checkpointing else 1)
    truth, baseline = dict(trio.truth.named_parameters()), dict(trio.peer.named_parameters())
    for name, p in trio.ours.named_parameters():
        assert_close(p.grad, truth[name].grad, baseline[name].grad, name=name)


def test_checkpointing_also_covers_intermediates() -> None:
    trio, x = pair("plain"), batch("plain")
    plain = trio.ours.forward_intermediates(x, 2)
    trio.ours.set_grad_checkpointing()
    final, taken = trio.ours.forward_intermediates(x, 2)
    assert torch.equal(final, plain[0])
    assert all(torch.equal(a, b) for a, b in zip(taken, plain[1], strict=True))


def test_dropout_sits_where_timm_has_it() -> None:
    rates = {f"{where}_rate": 0.4 for where in ("drop", "pos_drop", "proj_drop", "attn_drop", "drop_path")}
    ours, peer = VisionTransformer(**TINY, **rates), randomise(TimmVisionTransformer(**TINY, **rates))
    ours.load_state_dict(peer.state_dict())
    outputs = []
    for model in (ours.train(), peer.train()):
        torch.manual_seed(3)
        outputs.append(model(batch("plain")))
    assert torch.equal(*outputs)
    # and none of it is left in evaluation
    ours.eval()
    assert torch.equal(ours(batch("plain")), ours(batch("plain")))


def test_drop_path_drops_whole_samples_and_keeps_the_mean() -> None:
    layer, x = DropPath(0.25).train(), torch.ones(4000, 2, 3)
    y = layer(x)
    kept = y[:, 0, 0] != 0
    assert torch.equal(y, torch.where(kept, 4 / 3, 0.0)[:, None, None].expand_as(x))
    assert abs(kept.float().mean().item() - 0.75) < 0.03
    assert layer.eval()(x) is x


def test_drop_path_grows_linearly_from_nothing() -> None:
    blocks = VisionTransformer(**TINY, drop_path_rate=0.2).blocks
    assert isinstance(blocks[0].drop_path1, nn.Identity)
    assert [block.drop_path2.drop_prob for block in blocks[1:]] == pytest.approx([0.1, 0.2])


def test_hooks_on_the_block_container_fire() -> None:
    model, seen = VisionTransformer(**TINY), []
    model.blocks.register_forward_hook(lambda module, args, output: seen.append(output))
    features = model.forward_features(batch("plain"))
    assert torch.equal(model.norm(seen[0]), features)


# ----------------------------------------------------------------------------------------------------- heads


def test_new_heads_are_zero_and_reset_puts_a_fresh_one() -> None:
    model = VisionTransformer(**TINY, representation_size=20).eval()
    x = batch("plain")
    assert not model(x).any()
    assert model.head.weight.shape == (7, 20)
    randomise(model)
    hidden = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.equal(hidden, torch.tanh(model.pre_logits.fc(model.forward_features(x)[:, 0])))
    assert torch.equal(model(x), model.head(hidden))
    assert model(x).abs().min() > 0

    model.double().reset_classifier(5)
    assert model.head.weight.shape == (5, 48)
    assert model.head.weight.dtype == torch.float64
    assert not model.head.training
    assert torch.equal(model(x.double()), torch.zeros(2, 5, dtype=torch.float64))
    assert model.get_classifier() is model.head
    assert not any(name.startswith("pre_logits") for name in model.state_dict())
    assert torch.equal(
        model.forward_head(model.forward_features(x.double()), pre_logits=True),
        model.forward_features(x.double())[:, 0],
    )


@pytest.mark.parametrize("pool", ["avg", "", "token"])
def test_reset_classifier_changes_the_pooling_as_timm_does(pool: str) -> None:
    trio, x = pair("map_pool_class_token"), batch("plain")
    for model in (trio.ours, trio.peer, trio.truth):
        model.reset_classifier(4, pool)
        randomise(model.head)
    trio.check(lambda m, x: m(x), x, "logits")
    assert trio.ours.state_dict().keys() == trio.peer.state_dict().keys()


def test_distilled_heads_come_apart_only_in_distilled_training() -> None:
    trio, x = pair("distilled"), batch("distilled")
    cls, dist = (trio.ours.forward_features(x)[:, i] for i in range(2))
    trio.ours.set_distilled_training()
    assert isinstance(trio.ours(x), Tensor)
    first, second = trio.ours.train()(x)
    head, head_dist = trio.ours.get_classifier()
    assert torch.equal(first, head(cls))
    assert torch.equal(second, head_dist(dist))
    trio.ours.reset_classifier(3)
    assert [h.weight.shape[0] for h in trio.ours.get_classifier()] == [3, 3]
    assert not trio.ours.head_dist.weight.any()


# -------------------------------------------------------------------------------- position embedding ablation


def layer_norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def stretch(table: Tensor, count: int) -> Tensor:
    """`[M, d]` to `[count, d]`: straight lines between neighbours, ends kept, computed in fp32."""
    at = torch.arange(count) * ((table.shape[0] - 1) / (count - 1))
    low = at.floor().long().clamp(max=table.shape[0] - 2)
    part = (at - low)[:, None].float()
    return ((1 - part) * table.float()[low] + part * table.float()[low + 1]).to(table.dtype)


def by_hand(w: dict[str, Tensor], x: Tensor, kind: str, at: str, patches_only: bool) -> Tensor:
    """Features of a TINY model with a class token and one register, straight from the paper's equations."""
    heads, width, prefix = 4, 48, 2
    rows, cols = x.shape[2] // 16, x.shape[3] // 16
    tokens = torch.stack(
        [
            (w["patch_embed.proj.weight"] * x[:, None, :, 16 * i : 16 * i + 16, 16 * j : 16 * j + 16]).sum((2, 3, 4))
            for i in range(rows)
            for j in range(cols)
        ],
        dim=1,
    )
    tokens = tokens + w["patch_embed.proj.bias"]
    tokens = torch.cat([w["cls_token"].expand(len(x), -1, -1), w["reg_token"].expand(len(x), -1, -1), tokens], dim=1)
    n = tokens.shape[1]

    def positions(layer: int) -> Tensor:
        pos = torch.zeros(n, width, dtype=x.dtype)
        if kind == "learn":
            table = w["pos_embed"][layer]
            grid = table[0 if patches_only else prefix :].reshape(3, 4, width)
            if not patches_only:
                pos[:prefix] = table[:prefix]
        else:
            grid = torch.zeros(3, 4, width, dtype=x.dtype)
            for i in range(3):
                for j in range(4):
                    grid[i, j] = torch.cat([w["pos_embed_row"][layer, i], w["pos_embed_col"][layer, j]])
            if not patches_only:
                pos[:prefix] = w["pos_embed_prefix"][layer]
        if (rows, cols) != (3, 4):
            image = grid.float().permute(2, 0, 1)[None]
            image = F.interpolate(image, size=(rows, cols), mode="bicubic", antialias=True)
            grid = image[0].permute(1, 2, 0).to(x.dtype)
        pos[prefix:] = grid.reshape(-1, width)
        return pos

    absolute = kind in ("learn", "learn_2d")
    z = tokens + positions(0) if absolute and at == "stem" else tokens
    for layer in range(3):
        if absolute and at != "stem":
            z = z + positions(layer if at == "every_layer" else 0)
        y = layer_norm(z, w, f"blocks.{layer}.norm1")
        qkv = y @ w[f"blocks.{layer}.attn.qkv.weight"].T + w[f"blocks.{layer}.attn.qkv.bias"]
        q, k, v = (t.reshape(len(x), n, heads, 12).transpose(1, 2) for t in qkv.split(width, dim=-1))
        logits = q @ k.mT
        if kind == "relative":
            table = w[f"blocks.{layer}.attn.rel_pos_embed"]
            if len(table) != 2 * n - 1:
                table = stretch(table, 2 * n - 1)
            # the key of the pair (i, j) is the embedding of its offset
            keys = torch.stack([torch.stack([table[i - j + n - 1] for j in range(n)]) for i in range(n)])
            logits = logits + (q[..., :, None, :] * keys).sum(-1)
        mixed = torch.softmax(logits / 12**0.5, dim=-1) @ v
        mixed = mixed.transpose(1, 2).reshape(len(x), n, width)
        z = z + mixed @ w[f"blocks.{layer}.attn.proj.weight"].T + w[f"blocks.{layer}.attn.proj.bias"]
        y = layer_norm(z, w, f"blocks.{layer}.norm2")
        y = y @ w[f"blocks.{layer}.mlp.fc1.weight"].T + w[f"blocks.{layer}.mlp.fc1.bias"]
        y = y * 0.5 * (1 + torch.erf(y / 2**0.5))
        z = z + y @ w[f"blocks.{layer}.mlp.fc2.weight"].T + w[f"blocks.{layer}.mlp.fc2.bias"]
    return layer_norm(z, w, "norm")


PLACED = [
    (kind, at, patches_only)
    for kind in ("learn", "learn_2d")
    for at in ("stem", "every_layer", "every_layer_shared")
    for patches_only in (False, True)
] + [("relative", "stem", False), ("none", "stem", False)]


@pytest.mark.parametrize("size", [(48, 64), (64, 32)], ids=["native", "resized"])
@pytest.mark.parametrize(
    ("kind", "at", "patches_only"), PLACED, ids=lambda v: ("patches_only" if v else "all_tokens") if v in (0, 1) else v
)
def test_position_variants_follow_the_paper(kind: str, at: str, patches_only: bool, size: tuple[int, int]) -> None:
    options = {"pos_embed": kind, "pos_embed_at": at, "no_embed_class": patches_only, "reg_tokens": 1}
    # in float64 but for the resizing, so that another order of sums does not show
    model = randomise(VisionTransformer(**{**TINY, **options})).double()
    x = images(2, 3, *size).double()
    features = model.forward_features(x)
    expected = by_hand({name: p.detach() for name, p in model.named_parameters()}, x, kind, at, patches_only)
    torch.testing.assert_close(features.detach(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(model.forward_intermediates(x, 1)[0], features)

    tables = {name: p for name, p in model.named_parameters() if "pos_embed" in name}
    expected = {"learn": 1, "learn_2d": 2 + (not patches_only), "relative": 3, "none": 0}
    assert len(tables) == expected[kind]
    assert tables.keys() <= model.no_weight_decay()
    features.square().mean().backward()
    for name, table in tables.items():
        if kind != "relative":
            assert table.shape[0] == (3 if at == "every_layer" else 1)
        assert table.grad.flatten(1).any(dim=1).float().mean() > 0.5, name


# ----------------------------------------------------------------------------------------------------- compile

SIZES = [(64, 48), (48, 64), (96, 96), (32, 80)]  # the second is the native one
VARIANTS = {
    "learn": {"reg_tokens": 2},
    "learn_2d_every_layer": {"pos_embed": "learn_2d", "pos_embed_at": "every_layer", "no_embed_class": True},
    "relative": {"pos_embed": "relative"},
    "map": {"global_pool": "map", "class_token": False},
}


def compiled(model: nn.Module, dynamic: bool | None):
    torch._dynamo.reset()
    counter = CompileCounter()
    return torch.compile(model, backend=counter, dynamic=dynamic, fullgraph=True), counter


def assert_same(actual: Tensor, expected: Tensor) -> None:
    # the counting backend runs torch's own eager kernels
    assert torch.equal(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_one_dynamic_graph_serves_every_resolution(variant: str) -> None:
    model = randomise(VisionTransformer(**{**TINY, **VARIANTS[variant]})).eval()
    fast, counter = compiled(model, dynamic=True)
    for size in SIZES:
        x = images(2, 3, *size)
        assert_same(fast(x), model(x))
        assert counter.frame_count == 1, f"compiled again for {size}"


@torch.no_grad()
def test_tracing_at_the_native_size_does_not_specialise_on_it() -> None:
    model = randomise(VisionTransformer(**TINY)).eval()
    fast, counter = compiled(model, dynamic=True)
    for size in [(48, 64), *SIZES]:
        x = images(2, 3, *size)
        assert_same(fast(x), model(x))
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 64), (64, 64)], ids=["native", "resized"])
def test_static_compile_is_one_graph(size: tuple[int, int]) -> None:
    model = randomise(VisionTransformer(**TINY)).eval()
    fast, counter = compiled(model, dynamic=False)
    x = images(2, 3, *size)
    assert_same(fast(x), model(x))
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("marked", [False, True], ids=["automatic", "marked"])
def test_batch_size_is_dynamic(marked: bool) -> None:
    model = randomise(VisionTransformer(**TINY)).eval()
    fast, counter = compiled(model, dynamic=None)
    for size in (2, 3, 8, 5):
        x = images(size, 3, 48, 64)
        if marked:
            torch._dynamo.mark_dynamic(x, 0)
        assert_same(fast(x), model(x))
    # torch makes a size dynamic when it first sees it change, which costs one more graph
    assert counter.frame_count == (1 if marked else 2)


def test_exports_with_dynamic_sizes() -> None:
    model = randomise(VisionTransformer(**TINY)).eval()
    rows, cols = torch.export.Dim("rows", min=2, max=16), torch.export.Dim("cols", min=2, max=16)
    shapes = ({0: torch.export.Dim("batch"), 2: 16 * rows, 3: 16 * cols},)
    program = torch.export.export(model, (images(2, 3, 48, 64),), dynamic_shapes=shapes).module()
    for shape in ((2, 3, 48, 64), (3, 3, 96, 32)):
        assert_same(program(images(*shape)), model(images(*shape)))


# ------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 50}, "50x50; accepted are heights divisible by 16"),
        ({"img_size": (48, 64, 3)}, "img_size is"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"num_heads": 5}, "accepted are multiples of num_heads=5"),
        ({"global_pool": "max"}, "'token', 'avg', 'map', ''"),
        ({"class_token": False}, "accepted with class_token=False"),
        ({"pos_embed": "sincos"}, "'learn', 'learn_2d', 'relative', 'none'"),
        ({"pos_embed_at": "everywhere"}, "'stem', 'every_layer', 'every_layer_shared'"),
        ({"pos_embed": "relative", "pos_embed_at": "every_layer"}, "pos_embed='relative' is 'stem'"),
        ({"pos_embed": "none", "pos_embed_at": "every_layer_shared"}, "'stem'"),
        ({"pos_embed": "learn_2d", "embed_dim": 45, "num_heads": 5}, "even widths"),
        ({"pos_interpolation": "nearest"}, "'bicubic', 'bilinear'"),
        ({"act_layer": "relu"}, "'gelu', 'gelu_tanh', 'quick_gelu'"),
        ({"mlp_layer": "moe"}, "'mlp', 'swiglu'"),
        ({"mlp_layer": "swiglu", "mlp_ratio": 47 / 48}, "even widths"),
        ({"distilled": True, "global_pool": "avg"}, "global_pool='token'"),
        ({"distilled": True, "representation_size": 8}, "no representation_size"),
        ({"drop_path_rate": 1.0}, "drop_path_rate is 1.0"),
        ({"depth": 0}, "at least 1"),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_bad_options_say_what_is_accepted(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**{**TINY, **options})


def test_bad_images_say_what_is_accepted() -> None:
    layer = PatchEmbed(48, 16, 3, 8)
    with pytest.raises(ValueError, match=r"\(1, 4, 48, 48\); accepted is \[B, 3, H, W\]"):
        layer(images(1, 4, 48, 48))
    with pytest.raises(ValueError, match="48x50; accepted are heights divisible by 16 and widths by 16"):
        layer(images(1, 3, 48, 50))


@pytest.mark.parametrize("indices", [0, 4, [], [3], [-4]], ids=str)
def test_bad_block_indices_say_what_is_accepted(indices) -> None:
    with pytest.raises(ValueError, match="accepted are"):
        VisionTransformer(**TINY).forward_intermediates(batch("plain"), indices)


@pytest.mark.parametrize(
    ("case", "pool", "message"),
    [
        ("plain", "map", "built with it"),
        ("plain", "sum", "accepted are"),
        ("distilled", "avg", "distilled model is 'token'"),
        ("mean_pool_no_class_token", "token", "class_token=False"),
    ],
)
def test_bad_reset_leaves_the_model_alone(case: str, pool: str, message: str) -> None:
    model = pair(case).ours
    before = model(batch(case))
    with pytest.raises(ValueError, match=message):
        model.reset_classifier(3, pool)
    assert torch.equal(model(batch(case)), before)


def test_block_is_the_pre_norm_formula() -> None:
    block = randomise(Block(48, 4, init_values=0.1)).eval()
    x = images(2, 5, 48)
    y = x + block.ls1.gamma * block.attn(block.norm1(x))
    assert torch.equal(block(x), y + block.ls2.gamma * block.mlp(block.norm2(y)))
