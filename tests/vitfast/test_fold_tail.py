"""What works on a whole model: LayerNorms folded into GEMMs, and a last block that computes what the head reads."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from torch import nn

import vitfast
from tests._close import assert_close
from tests.vitfast._models import BUILDERS, assert_same, images, randomise, reference, timm_deit, timm_vit
from vitfast import kernels
from vitfast.layers import FusedBlock
from vitfast.watch import PLAN

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
    prefix, folded = FusedBlock.fused_prefix, FusedBlock.folded_attention

    def note_prefix(self, x, count, plan):
        seen.append(count)
        return prefix(self, x, count, plan)

    def note_folded(self, x, stats, plan):
        seen.append("folded")
        return folded(self, x, stats, plan)

    monkeypatch.setattr(FusedBlock, "fused_prefix", note_prefix)
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
    assert set(calls) == {1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_tail_in_16_bits(build, dtype, calls):
    plain = build(init_values=0.3)
    fused = vitfast.accelerate(copy.deepcopy(plain), precision={torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype])
    x = images(*X, dtype=dtype)
    with torch.no_grad():
        rounded = copy.deepcopy(plain).to(dtype)
        assert_close(fused(x), copy.deepcopy(rounded).double()(x.double()), rounded(x))
    assert set(calls) == {1}


def test_tail_of_two_tokens(calls):
    for plain in (timm_deit(), reference(distilled=True)):
        fused = vitfast.accelerate(copy.deepcopy(plain))
        assert_same(plain, fused, images(*X))
    assert set(calls) == {2}


def test_tail_of_timm_options(calls):
    plain, fused = pair(timm_vit, scale_attn_norm=True, scale_mlp_norm=True, dynamic_img_size=True)
    assert_same(plain, fused, images(2, 3, 32, 40))
    assert set(calls) == {1}


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
    assert_same(plain, fused, images(*X), grad=False)
    assert calls == []
    assert len(shapes) == 3
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_hook_elsewhere_costs_nothing(build, calls):
    _, fused = pair(build)
    fused.blocks[0].register_forward_hook(lambda m, args, out: None)
    fused(images(*X))
    assert set(calls) == {1}


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
    assert set(calls) == {1}
    vitfast.restore(fused)
    assert not {"tail", "fold"} & set(vars(fused))


# --- fold


H = torch.float16


def folding(build, **changes) -> tuple[nn.Module, nn.Module]:
    """In 16 bits, since folding keeps the rule there, and frozen, since it is derived from weights."""
    plain = build(depth=3, **changes).half()
    return plain, vitfast.accelerate(copy.deepcopy(plain), frozen=True)


def assert_follows(plain, fused, call=lambda model, x: model(x)) -> None:
    assert_same(plain, fused, images(*X, dtype=H), call, grad=False)


@pytest.mark.interpret
@pytest.mark.parametrize("changes", [{}, {"init_values": 0.3, "qk_norm": True}, {"qkv_bias": False}], ids=str)
def test_fold(build, changes, calls, poisoned):
    plain, fused = folding(build, **changes)
    assert_follows(plain, fused)
    assert calls == ["folded", "folded", 1]
    del calls[:]
    assert_follows(plain, fused, lambda model, x: model.forward_features(x))
    assert calls == ["folded"] * 3


@pytest.mark.interpret
def test_nothing_is_kept_of_weights_that_are_not_frozen(build, calls, poisoned):
    plain = build(depth=3).half()
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert_follows(plain, fused)
    assert calls == [1]
    # written where torch does not see it
    for model in (plain, fused):
        for parameter in model.parameters():
            parameter.data.mul_(1.2)
    assert_follows(plain, fused)


@pytest.mark.interpret
def test_fp32_is_not_folded(build, calls):
    plain = build(depth=3)
    fused = vitfast.accelerate(copy.deepcopy(plain), frozen=True)
    assert_same(plain, fused, images(*X), grad=False)
    assert calls == [1]


@pytest.mark.interpret
def test_statistics_are_not_handed_past_a_hook(build, calls, poisoned):
    plain, fused = folding(build)
    for model in (plain, fused):
        # in place: what the block before said of these tokens is wrong behind it
        model.blocks[1].register_forward_hook(lambda m, args, out: out.mul_(1.5))
    assert_follows(plain, fused)
    assert calls == ["folded", 1]


@pytest.mark.interpret
def test_no_fold_in_training_autocast_or_with_gradients(build, calls):
    _, fused = folding(build, global_pool="avg")
    x = images(*X, dtype=H)
    fused(x)
    fused.train()(x)
    with torch.no_grad(), torch.autocast("cpu", H):
        fused.eval()(x)
    assert calls == []
    with torch.no_grad():
        fused(x)
    assert calls == ["folded"] * 3


def _scale(*models, by: float = 1.2) -> None:
    for model in models:
        for parameter in model.parameters():
            parameter.data.mul_(by)


CHANGES = {
    "in place": lambda model: model.blocks[1].attn.qkv.weight.add_(0.1),
    "a norm in place": lambda model: model.blocks[1].norm2.weight.mul_(-1.5),
    "load_state_dict": lambda model: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}),
    "assigned": lambda model: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}, assign=True),
    "other data": lambda model: setattr(model.blocks[1].mlp.fc1.weight, "data", model.blocks[1].mlp.fc1.weight * 2),
    "another parameter": lambda model: setattr(
        model.blocks[0].norm1, "weight", nn.Parameter(model.blocks[0].norm1.weight * 2)
    ),
    "another layer": lambda model: setattr(
        model.blocks[0].mlp, "fc1", randomise(copy.deepcopy(model.blocks[0].mlp.fc1))
    ),
    "another LayerScale": lambda model: setattr(
        model.blocks[0].ls1, "gamma", nn.Parameter(model.blocks[0].ls1.gamma * 3)
    ),
    "an optimiser's step": lambda model: _step(model),
    "training that writes unseen": lambda model: (model.train(), _scale(model), model.eval()),
    "moved and written": lambda model: (model.to(torch.float64).to(H), _scale(model)),
    "unseen, and refreshed": lambda model: (_scale(model), vitfast.refresh(model)),
}


def _step(model: nn.Module) -> None:
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = images(*parameter.shape, seed=i, dtype=parameter.dtype)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


@pytest.mark.interpret
@pytest.mark.parametrize("change", CHANGES)
def test_fold_follows_weights(build, change, calls, poisoned):
    plain, fused = folding(build, init_values=0.3)
    with torch.no_grad():
        before = fused(images(*X, dtype=H))
        for model in (plain, fused):
            CHANGES[change](model)
        assert not torch.allclose(plain(images(*X, dtype=H)), before, rtol=0.02)
    del calls[:]
    assert_follows(plain, fused)
    assert calls == ["folded", "folded", 1]


@pytest.mark.interpret
def test_other_tensors_for_one_call(build, poisoned):
    plain, fused = folding(build)
    x = images(*X, dtype=H)
    with torch.no_grad():
        first = fused(x)
        for i in range(3):
            # what lies where something else lay is not that
            other = {f"blocks.{b}.attn.qkv.bias": torch.full((144,), float(i), dtype=H) for b in range(3)}
            got, expected = (torch.func.functional_call(model, other, (x,)) for model in (fused, plain))
            torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
        assert torch.equal(fused(x), first)


@pytest.mark.interpret
def test_a_norm_without_weight_leaves_the_layer_behind_it_alone(poisoned):
    weight = images(32, 64)
    before, x = weight.clone(), images(3, 64)
    for norm_weight in (None, torch.full((64,), 3.0)):
        y = kernels.norm_linear(x, kernels.row_stats(x), norm_weight, None, 1e-6, weight)
        expected = nn.functional.layer_norm(x, (64,), norm_weight, None, 1e-6) @ weight.t()
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(weight, before)


@pytest.mark.interpret
def test_what_is_derived_goes_with_training_copies_and_restore(build):
    _, fused = folding(build)
    x = images(*X, dtype=H)
    with torch.no_grad():
        fused(x)
    folded = [block.plan().folded for block in fused.blocks]
    assert all(folded)
    copied = [vars(module)[PLAN] for module in copy.deepcopy(fused).modules() if PLAN in vars(module)]
    assert not any(held.plan for held in copied)
    alive = [weakref.ref(pair[0].weight) for pair in folded]
    del folded
    fused.train()
    assert not any(ref() for ref in alive)
    with torch.no_grad():
        fused.eval()(x)
    assert all(block.plan().folded for block in fused.blocks)
    vitfast.restore(fused)
    assert not any(PLAN in vars(module) or "frozen" in vars(module) for module in fused.modules())


@pytest.mark.interpret
def test_fold_is_switched_on_by_name(build, calls):
    plain = build(depth=3).half()
    modules = {"layer_norm", "attention", "mlp", "block"}
    fused = vitfast.accelerate(copy.deepcopy(plain), only=modules, frozen=True)
    with torch.no_grad():
        fused(images(*X, dtype=H))
        assert calls == []
        vitfast.accelerate(fused, only={"fold"})
        fused(images(*X, dtype=H))
    assert calls == ["folded"] * 3


@pytest.mark.interpret
def test_one_folded_block_in_inference_mode(build):
    plain = build(depth=2).half()
    fused = vitfast.accelerate(copy.deepcopy(plain), frozen=True)
    # a tensor that says when it changes goes in, one that does not comes out
    x = images(2, 13, fused.blocks[0].norm1.weight.shape[0], dtype=H)
    with torch.inference_mode():
        out = fused.blocks[1](fused.blocks[0](x))
    with torch.no_grad():
        assert fused.blocks[0].plan().folded
        torch.testing.assert_close(out, fused.blocks[1](fused.blocks[0](x)))


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_both_on_a_gpu(build, dtype, calls):
    plain = build(depth=3, init_values=0.3).to("cuda", dtype)
    fused = vitfast.accelerate(copy.deepcopy(plain), frozen=True)
    x = images(*X, dtype=dtype).cuda()
    with torch.no_grad():
        assert_close(fused(x), copy.deepcopy(plain).double()(x.double()), plain(x))
        assert calls == ([1] if dtype == torch.float32 else ["folded", "folded", 1])
        for model in (plain, fused):
            model.blocks[0].norm1.weight.mul_(-1.5)
        assert_close(fused(x), copy.deepcopy(plain).double()(x.double()), plain(x))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["vit_base_patch16_224", "vit_huge_patch14_224"])
def test_both_at_real_sizes_on_a_gpu(name, calls):
    from vitfast.proof.subjects import seed_weights

    plain = seed_weights(vitfast.create_model(name, depth=3)).eval().to("cuda", torch.bfloat16)
    fused = vitfast.accelerate(copy.deepcopy(plain), frozen=True)
    x = images(8, 3, 224, 224, dtype=torch.bfloat16).cuda()
    with torch.no_grad():
        assert_close(fused(x), copy.deepcopy(plain).double()(x.double()), plain(x))
    assert calls == ["folded", "folded", 1]
