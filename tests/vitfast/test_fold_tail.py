"""What works on a whole model: LayerNorms folded into GEMMs, and a last block that computes what the head reads."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vitfast
from tests._close import assert_close
from tests.vitfast._models import BUILDERS, assert_same, images, reference, timm_deit, timm_vit
from vitfast import kernels
from vitfast.kernels import _derived
from vitfast.layers import FusedBlock

X = (2, 3, 24, 32)


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def pair(build, **changes) -> tuple[nn.Module, nn.Module]:
    plain = build(**changes)
    return plain, vitfast.accelerate(copy.deepcopy(plain))


@pytest.fixture
def calls(monkeypatch) -> list:
    """Names of the block's ways that ran, with the number of tokens kept."""
    seen = []
    first, folded = FusedBlock.first, FusedBlock.folded_attention

    def note_first(self, x, kept):
        seen.append(kept)
        return first(self, x, kept)

    def note_folded(self, x, stats):
        seen.append("folded")
        return folded(self, x, stats)

    monkeypatch.setattr(FusedBlock, "first", note_first)
    monkeypatch.setattr(FusedBlock, "folded_attention", note_folded)
    return seen


# --- tail


OPTIONS = {
    "plain": {},
    "LayerScale": {"init_values": 0.3},
    "qk_norm, no qkv bias": {"qk_norm": True, "qkv_bias": False},
    "registers": {"reg_tokens": 3},
    "no_embed_class, pre-norm": {"no_embed_class": True, "pre_norm": True},
    "one block": {"depth": 1},
    "no head": {"num_classes": 0},
    "norm after pooling": {"fc_norm": True},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_tail(build, option, calls):
    plain, fused = pair(build, **OPTIONS[option])
    # a shift of all keys changes no softmax: the gradient of k_norm's bias is rounding alone
    assert_same(plain, fused, images(*X), grad="qk_norm" not in OPTIONS[option])
    assert calls == [1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tail_in_16_bits(build, dtype, calls):
    plain = build(init_values=0.3)
    fused = vitfast.accelerate(copy.deepcopy(plain), precision={torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype])
    x = images(*X, dtype=dtype)
    with torch.no_grad():
        rounded = copy.deepcopy(plain).to(dtype)
        assert_close(fused(x), copy.deepcopy(rounded).double()(x.double()), rounded(x))
    assert calls == [1]


def test_tail_of_two_tokens(calls):
    for plain in (timm_deit(), reference(distilled=True)):
        fused = vitfast.accelerate(copy.deepcopy(plain))
        assert_same(plain, fused, images(*X))
    assert calls == [2, 2]


def test_tail_of_timm_options(calls):
    plain, fused = pair(timm_vit, scale_attn_norm=True, scale_mlp_norm=True, dynamic_img_size=True)
    assert_same(plain, fused, images(2, 3, 32, 40))
    assert calls == [1]


def test_tail_writes_one_token_s_worth(build):
    _, fused = pair(build)
    hidden = []
    fused.blocks[0].mlp.register_forward_hook(lambda m, args, out: hidden.append(out.shape))
    real = kernels.linear
    try:
        kernels.linear = lambda x, *args, **kwargs: hidden.append(x.shape) or real(x, *args, **kwargs)
        with torch.no_grad():
            fused(images(*X))
    finally:
        kernels.linear = real
    # the first block's mlp is called as a module, so the last five are the tail's: q, k and v, proj, fc1, fc2
    assert [shape[1] for shape in hidden[-5:]] == [1, 13, 1, 1, 1]


@pytest.mark.parametrize("where", ["blocks.1", "blocks.1.mlp.fc1", "blocks.1.attn.q_norm", "blocks", "norm"])
def test_hooks_see_all_tokens(build, where, calls):
    plain, fused = pair(build)
    shapes = []
    for model in (plain, fused):
        model.get_submodule(where).register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    assert_same(plain, fused, images(*X))
    assert calls == []
    assert len(shapes) == 3
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_hook_elsewhere_costs_nothing(build, calls):
    _, fused = pair(build)
    fused.blocks[0].register_forward_hook(lambda m, args, out: None)
    fused(images(*X))
    assert calls == [1]


@pytest.mark.parametrize(
    "changes",
    [
        {"global_pool": "avg"},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "map", "class_token": False},
        {"global_pool": ""},
        {"mlp_layer": "swiglu"},
        {"pos_embed": "relative"},
        {"pos_embed_at": "every_layer"},
    ],
    ids=str,
)
def test_all_tokens_where_they_are_read_or_not_known(changes, calls):
    plain, fused = pair(reference, **changes)
    assert_same(plain, fused, images(*X))
    assert calls == []


def test_all_tokens_where_they_are_asked_for(build, calls):
    plain, fused = pair(build)
    for call in (
        lambda model, x: model.forward_features(x),
        lambda model, x: model.forward_intermediates(x, intermediates_only=True),
        lambda model, x: model.get_intermediate_layers(x, 2),
    ):
        assert_same(plain, fused, images(*X), call)
    fused.set_grad_checkpointing(True)
    plain.set_grad_checkpointing(True)
    assert_same(plain, fused, images(*X))
    fused.set_grad_checkpointing(False)
    plain.set_grad_checkpointing(False)
    assert_same(plain, fused, images(*X), train=True)
    assert calls == []


def test_a_step_that_somebody_replaced_is_called(build, calls):
    _, fused = pair(build)
    seen = []
    own = fused.forward_head
    fused.forward_head = lambda x, **kwargs: seen.append(x.shape) or own(x, **kwargs)
    fused(images(*X))
    assert seen == [(2, 13, 48)]
    assert calls == []


def test_a_stranger_in_the_last_block_gets_all_tokens(build, calls):
    class Mixing(nn.Linear):
        def forward(self, x):
            return super().forward(x + x.mean(1, keepdim=True))

    plain, fused = pair(build)
    for model in (plain, fused):
        model.blocks[1].mlp.fc1.__class__ = Mixing
    assert_same(plain, fused, images(*X))
    assert calls == []


def test_tail_is_switched_on_by_name(build, calls):
    plain = build()
    fused = vitfast.accelerate(copy.deepcopy(plain), only={"attention", "mlp", "block"})
    fused(images(*X))
    assert calls == []
    vitfast.accelerate(fused, only={"tail"})
    assert_same(plain, fused, images(*X))
    assert calls == [1]
    vitfast.restore(fused)
    assert not {"tail", "fold"} & set(vars(fused))


# --- fold


def folding(build, **changes) -> tuple[nn.Module, nn.Module]:
    return pair(build, depth=3, **changes)


@pytest.mark.interpret
@pytest.mark.parametrize("changes", [{}, {"init_values": 0.3, "qk_norm": True}, {"qkv_bias": False}], ids=str)
def test_fold(build, changes, calls, poisoned):
    plain, fused = folding(build, **changes)
    assert_same(plain, fused, images(*X), grad=False)
    assert calls == ["folded", "folded", 1]
    del calls[:]
    assert_same(plain, fused, images(*X), lambda model, x: model.forward_features(x), grad=False)
    assert calls == ["folded"] * 3


@pytest.mark.interpret
def test_fold_in_fp16(build, calls, poisoned):
    plain = build(depth=3, init_values=0.3)
    fused = vitfast.accelerate(copy.deepcopy(plain), precision="fp16")
    x = images(*X, dtype=torch.float16)
    with torch.no_grad():
        rounded = copy.deepcopy(plain).half()
        assert_close(fused(x), copy.deepcopy(rounded).double()(x.double()), rounded(x))
    assert calls == ["folded", "folded", 1]


@pytest.mark.interpret
def test_statistics_are_not_handed_past_a_hook(build, calls, poisoned):
    plain, fused = folding(build)
    for model in (plain, fused):
        # in place: what the block before said of these tokens is wrong behind it
        model.blocks[1].register_forward_hook(lambda m, args, out: out.mul_(1.5))
    with torch.inference_mode():
        torch.testing.assert_close(fused(images(*X)), plain(images(*X)), rtol=1e-4, atol=1e-4)
    assert calls == ["folded", 1]


@pytest.mark.interpret
def test_no_fold_in_training_autocast_or_with_gradients(build, calls):
    _, fused = folding(build, global_pool="avg")
    fused(images(*X))
    fused.train()(images(*X))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fused.eval()(images(*X))
    assert calls == []
    with torch.no_grad():
        fused(images(*X))
    assert calls == ["folded"] * 3


@pytest.mark.interpret
@pytest.mark.parametrize("how", ["in place", "load_state_dict", "data", "precision"])
def test_fold_sees_changed_weights(build, how, calls, poisoned):
    plain, fused = folding(build)
    with torch.no_grad():
        fused(images(*X))
        if how == "in place":
            for model in (plain, fused):
                model.blocks[1].norm2.weight.mul_(-1.5)
                model.blocks[1].attn.qkv.weight.add_(0.1)
        elif how == "load_state_dict":
            other = build(depth=3)
            for parameter in other.parameters():
                parameter.mul_(1.1)
            for model in (plain, fused):
                model.load_state_dict(other.state_dict())
        elif how == "data":
            for model in (plain, fused):
                model.blocks[1].mlp.fc1.weight.data = model.blocks[1].mlp.fc1.weight.data * 2
        else:
            vitfast.accelerate(fused, precision="fp16")
            vitfast.restore(fused)
            vitfast.accelerate(fused)
    assert_same(plain, fused, images(*X), grad=False)


@pytest.mark.interpret
def test_training_that_writes_unseen(build, poisoned):
    plain, fused = folding(build)
    with torch.no_grad():
        fused(images(*X))
    fused.train()
    for model in (plain, fused):
        for parameter in model.parameters():
            parameter.data.mul_(1.2)
    fused.eval()
    assert_same(plain, fused, images(*X), grad=False)


@pytest.mark.interpret
def test_restore_releases_what_was_derived(build):
    cache = _derived._cache
    before = len(cache)
    _, fused = folding(build)
    with torch.no_grad():
        fused(images(*X))
    assert len(cache) == before + 4
    vitfast.restore(fused)
    assert len(cache) == before


@pytest.mark.interpret
def test_fold_is_switched_on_by_name(build, calls):
    plain = build(depth=3)
    fused = vitfast.accelerate(copy.deepcopy(plain), only={"layer_norm", "attention", "mlp", "block"})
    with torch.no_grad():
        fused(images(*X))
        assert calls == []
        vitfast.accelerate(fused, only={"fold"})
        fused(images(*X))
    assert calls == ["folded"] * 3


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_on_a_gpu(build, dtype, calls):
    plain = build(depth=3, init_values=0.3).to("cuda", dtype)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(*X, dtype=dtype).cuda()
    with torch.no_grad():
        assert_close(fused(x), copy.deepcopy(plain).double()(x.double()), plain(x))
        assert calls == ["folded", "folded", 1]
        for model in (plain, fused):
            model.blocks[0].norm1.weight.mul_(-1.5)
        assert_close(fused(x), copy.deepcopy(plain).double()(x.double()), plain(x))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_huge_patch14_224"])
def test_both_at_real_sizes_on_a_gpu(name, calls):
    from vitfast.proof.subjects import seed_weights

    with torch.device("cuda"):
        plain = seed_weights(vitfast.create_model(name, depth=3)).eval().bfloat16()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = images(8, 3, 224, 224, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        assert_close(fused(x), copy.deepcopy(plain).double()(x.double()), plain(x))
    assert calls == ["folded", "folded", 1]
