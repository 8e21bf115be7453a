"""The precision policies: what a cast model computes, and what comes back when it is undone."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import vitfast
from tests._close import assert_close
from tests.vitfast._models import BUILDERS, fused_names, images, reference, run, timm_model, timm_vit
from vitfast.swap.precision import PRECISIONS, Precision, get_precision

X = (4, 3, 24, 32)


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


@pytest.fixture(params=PRECISIONS)
def precision(request):
    return request.param


def values(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def objects(model: nn.Module) -> dict[str, int]:
    return {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


def assert_bit_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype, name
        assert torch.equal(value, b[name]), name


MODELS = {
    "plain": {},
    "LayerScale, registers": {"init_values": 0.3, "reg_tokens": 2},
    "qk-norm, average pool": {"qk_norm": True, "global_pool": "avg"},
    "QuickGELU, pre-norm": {"act_layer": "quick_gelu", "pre_norm": True},
    "another image size": {},
}


@pytest.mark.parametrize("option", MODELS)
def test_the_whole_model_holds_the_rule(build, precision, option):
    size, changes = (24, 32), MODELS[option]
    if option == "another image size":
        size, changes = (40, 16), {"dynamic_img_size": True} if build is timm_vit else {}
    dtype = get_precision(precision).dtype
    plain = build(**changes)
    fused = vitfast.accelerate(copy.deepcopy(plain), precision=precision)
    plain = plain.to(dtype)
    truth = copy.deepcopy(plain).double()
    x = images(8, 3, *size).to(dtype)
    got, baseline = (run(m, lambda m, x: (m.forward_features(x), m(x)), x, grad=False) for m in (fused, plain))
    exact = run(truth, lambda m, x: (m.forward_features(x), m(x)), x.double(), grad=False)
    for name in got:
        assert got[name].dtype == dtype
        assert_close(got[name], exact[name], baseline[name], name=name)
    assert torch.equal(got["output 1"].argmax(-1), baseline["output 1"].argmax(-1))


@pytest.mark.parametrize("option", ["LayerScale, registers", "qk-norm, average pool"])
def test_gradients_hold_the_rule(build, precision, option):
    dtype = get_precision(precision).dtype
    plain = build(**MODELS[option])
    fused = vitfast.accelerate(copy.deepcopy(plain), precision=precision)
    plain = plain.to(dtype)
    x = images(*X).to(dtype)
    got, baseline = (run(m, lambda m, x: m(x), x) for m in (fused, plain))
    exact = run(copy.deepcopy(plain).double(), lambda m, x: m(x), x.double())
    for name in got:
        assert_close(got[name], exact[name], baseline[name], name=name)


def test_every_tensor_is_cast_and_integers_are_not(build, precision):
    model = build()
    model.register_buffer("scale", torch.ones(3))
    model.register_buffer("count", torch.tensor(7))
    vitfast.accelerate(model, precision=precision)
    dtype = get_precision(precision).dtype
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.scale.dtype == dtype and model.count.dtype == torch.int64
    assert vitfast.report(model).precision == precision
    vitfast.restore(model)
    assert model.scale.dtype == torch.float32
    assert vitfast.report(model).precision is None


def test_tf32_reaches_every_layer_and_leaves_with_restore(build, monkeypatch):
    # on CPU it changes nothing, so look at what the kernels are told
    seen = []
    for name in ("linear", "attention_qkv", "patch_embed"):
        original = getattr(vitfast.layers.kernels, name)

        def spy(*args, _original=original, _name=name, **kwargs):
            seen.append((_name, kwargs["tf32"]))
            return _original(*args, **kwargs)

        monkeypatch.setattr(vitfast.layers.kernels, name, spy)
    model = vitfast.accelerate(build(), precision="tf32")
    model(images(*X))
    assert {name for name, _ in seen} == {"linear", "attention_qkv", "patch_embed"}
    assert all(tf32 for _, tf32 in seen)
    vitfast.accelerate(vitfast.restore(model), precision="fp32")
    seen.clear()
    model(images(*X))
    assert seen and not any(tf32 for _, tf32 in seen)


# --- and back


def test_restore_gives_the_same_objects_and_bits(build, precision):
    model = build(init_values=0.3)
    before, ids = values(model), objects(model)
    vitfast.accelerate(model, precision=precision)
    model(images(*X).to(get_precision(precision).dtype))
    vitfast.restore(model)
    assert objects(model) == ids
    assert_bit_equal(values(model), before)
    assert not fused_names(model)


def test_parameters_stay_the_same_objects_while_cast(build):
    # an optimiser made before must train the model that is used after
    model = build()
    ids = objects(model)
    for p in model.parameters():
        p.no_weight_decay = True
    vitfast.accelerate(model, precision="bf16")
    assert objects(model) == ids
    assert all(p.no_weight_decay for p in model.parameters())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_an_optimiser_trains_the_model_it_was_given(build, kind, when):
    model = build(init_values=0.3)

    def make():
        return getattr(torch.optim, kind)(model.parameters(), lr=0.1)

    optimizer = make() if when == "before" else None
    before = values(model)
    vitfast.accelerate(model, precision="bf16")
    optimizer = optimizer or make()
    cast = values(model)
    model(images(*X).bfloat16()).float().square().mean().backward()
    optimizer.step()
    trained = values(model)
    assert any(not torch.equal(trained[name], cast[name]) for name in cast)

    vitfast.restore(model)
    restored = values(model)
    for name, value in restored.items():
        assert value.dtype == torch.float32
        # trained values are widened as they are, the others come back bit for bit
        if torch.equal(trained[name], cast[name]):
            assert torch.equal(value, before[name]), name
        else:
            assert torch.equal(value, trained[name].float()), name
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())

    # and goes on training in the original dtype
    optimizer.zero_grad()
    model(images(*X)).square().mean().backward()
    if kind == "SGD":
        optimizer.step()
        assert any(not torch.equal(value, restored[name]) for name, value in values(model).items())


def test_frozen_parameters_keep_their_bits_when_others_train(build):
    model = build()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head"))
    before = values(model)
    vitfast.accelerate(model, precision="bf16")
    assert [p.requires_grad for p in model.parameters()] == [n.startswith("head") for n, _ in model.named_parameters()]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(images(*X).bfloat16()).float().square().mean().backward()
    optimizer.step()
    vitfast.restore(model)
    for name, value in values(model).items():
        assert torch.equal(value, before[name]) is not name.startswith("head")


@pytest.mark.parametrize("tie", ["parameter", "module", "buffer"])
def test_tied_tensors_stay_tied(build, tie):
    model = build()
    if tie == "parameter":
        model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    elif tie == "module":
        model.blocks[1].mlp = model.blocks[0].mlp
    else:
        model.blocks[0].register_buffer("shared", torch.randn(3))
        model.blocks[1].register_buffer("shared", model.blocks[0].shared)

    def tied():
        a, b = model.blocks
        return {"parameter": a.attn.qkv.weight is b.attn.qkv.weight, "module": a.mlp is b.mlp}.get(tie, True) and (
            tie != "buffer" or a.shared is b.shared
        )

    before = values(model)
    vitfast.accelerate(model, precision="bf16")
    assert tied()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images(*X).bfloat16()).float().square().mean().backward()
    vitfast.restore(model)
    assert tied()
    assert_bit_equal(values(model), before)
    vitfast.accelerate(model, precision="bf16")
    optimizer.step()
    vitfast.restore(model)
    assert tied()


def test_tensors_untied_since_do_not_share_memory():
    model = reference()
    model.blocks[1].attn.qkv.weight = model.blocks[0].attn.qkv.weight
    vitfast.accelerate(model, precision="bf16")
    model.blocks[1].attn.qkv.weight = nn.Parameter(model.blocks[0].attn.qkv.weight.detach().clone())
    vitfast.restore(model)
    first, second = (block.attn.qkv.weight for block in model.blocks)
    assert torch.equal(first, second)
    with torch.no_grad():
        first.zero_()
    assert second.any()


@pytest.mark.parametrize("way", ["deepcopy", "torch.save"])
def test_a_copy_of_a_cast_model_can_be_restored(build, way):
    model = build(init_values=0.3)
    before = values(model)
    vitfast.accelerate(model, precision="bf16")
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        twin.head.bias.add_(1.0)
    vitfast.restore(twin)
    after = values(twin)
    assert not torch.equal(after.pop("head.bias"), before["head.bias"])
    assert_bit_equal(after, {name: value for name, value in before.items() if name != "head.bias"})
    # the model that was copied is as it was
    assert vitfast.report(model).precision == "bf16"
    assert_bit_equal(values(vitfast.restore(model)), before)


def test_state_dict_round_trip(build):
    model, other = build(init_values=0.3), build(init_values=0.3)
    before = values(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.3)
    vitfast.accelerate(model, precision="bf16")
    assert list(model.state_dict()) == list(before)
    # its own checkpoint in full precision: nothing changed, so the bits come back
    model.load_state_dict(before)
    assert_bit_equal(values(vitfast.restore(model)), before)
    # another one
    vitfast.accelerate(model, precision="bf16").load_state_dict(other.state_dict())
    expected = {name: value.bfloat16().float() for name, value in values(other).items()}
    assert_bit_equal(values(vitfast.restore(model)), expected)


def test_restore_after_the_model_was_moved_to_another_dtype(build):
    model = build()
    before = values(model)
    vitfast.accelerate(model, precision="bf16").float()
    assert_bit_equal(values(vitfast.restore(model)), before)


def test_new_shapes_keep_their_values_and_the_rest_its_bits():
    # one resized table must not cost the other parameters their precision
    model = timm_vit()
    before = values(model)
    vitfast.accelerate(model, precision="bf16")
    model.set_input_size(img_size=(48, 32))
    model.reset_classifier(3)
    resized, head = model.pos_embed.detach().clone(), model.head.weight.detach().clone()
    vitfast.restore(model)
    after = values(model)
    assert {value.dtype for value in after.values()} == {torch.float32}
    assert torch.equal(after["pos_embed"], resized.float())
    assert torch.equal(after["head.weight"], head.float())
    for name in before.keys() - {"pos_embed", "head.weight", "head.bias"}:
        assert torch.equal(after[name], before[name]), name
    assert model(images(2, 3, 48, 32)).shape == (2, 3)


def test_parameters_added_since_follow_the_model_back():
    model = vitfast.accelerate(timm_vit(num_classes=0), precision="bf16")
    model.reset_classifier(3)
    assert model.head.weight.dtype == torch.bfloat16
    vitfast.restore(model)
    assert model(images(*X)).dtype == torch.float32


def test_a_further_call_casts_what_was_added_since(build):
    model = vitfast.accelerate(build(), precision="bf16")
    model.head = nn.Linear(48, 3)
    weight = model.head.weight.detach().clone()
    vitfast.accelerate(model, precision="bf16")
    assert model(images(*X).bfloat16()).dtype == torch.bfloat16
    vitfast.restore(model)
    assert torch.equal(model.head.weight, weight)


def test_gradients_follow_the_cast(build):
    model = build()
    model(images(*X)).square().mean().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters()}
    vitfast.accelerate(model, precision="bf16")
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, before[name].bfloat16())
    model(images(*X).bfloat16()).float().square().mean().backward()
    vitfast.restore(model)
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


# --- calls in a row, wrong calls


def test_twice_the_same_precision(build, precision):
    model = build()
    before = values(model)
    vitfast.accelerate(vitfast.accelerate(model, precision=precision), precision=precision)
    # nor does a call without one change it
    vitfast.accelerate(model)
    assert vitfast.report(model).precision == precision
    assert_bit_equal(values(vitfast.restore(model)), before)


def test_kinds_switched_on_later_get_the_precision(build):
    model = vitfast.accelerate(build(), precision="tf32", only=["layer_norm"])
    vitfast.accelerate(model)
    assert model.blocks[0].attn.tf32 and model.blocks[0].mlp.tf32 and model.patch_embed.tf32


@pytest.mark.parametrize(("first", "second"), [("bf16", "fp16"), ("fp32", "tf32"), ("fp16", "fp32")])
def test_another_precision_is_an_error(build, first, second):
    model = vitfast.accelerate(build(), precision=first)
    before, kinds = values(model), fused_names(model)
    with pytest.raises(ValueError, match=f"accelerated in {first}; restore it before going to {second}"):
        vitfast.accelerate(model, precision=second)
    assert_bit_equal(values(model), before)
    assert fused_names(model) == kinds
    vitfast.accelerate(vitfast.restore(model), precision=second)
    assert vitfast.report(model).precision == second


@pytest.mark.parametrize("name", ["bfloat16", "BF16", "", "int4"])
def test_an_unknown_precision_names_the_known_ones(name):
    model = reference()
    with pytest.raises(ValueError, match="expected one of fp32, tf32, bf16, fp16"):
        vitfast.accelerate(model, precision=name)
    assert not fused_names(model)


def test_the_policies():
    assert get_precision("bf16") == Precision("bf16", torch.bfloat16)
    assert [name for name, policy in PRECISIONS.items() if policy.tf32] == ["tf32"]
    assert all(name == policy.name for name, policy in PRECISIONS.items())


def test_fp32_takes_pixels_of_any_floating_dtype_to_the_weights(build):
    # the patch embedding casts pixels, so a loader's fp32 images need no change for a bf16 model
    fused = vitfast.accelerate(build(), precision="bf16")
    x = images(*X)
    assert torch.equal(fused(x), fused(x.bfloat16()))


def test_a_model_that_is_bf16_already_comes_back_bf16(build):
    model = build().bfloat16()
    before = values(model)
    vitfast.accelerate(model, precision="fp32")
    assert next(model.parameters()).dtype == torch.float32
    assert_bit_equal(values(vitfast.restore(model)), before)


def test_mixed_dtypes_come_back_mixed(build):
    model = build()
    model.norm.double()
    model.head.bfloat16()
    before = values(model)
    vitfast.accelerate(model, precision="bf16")
    assert model(images(*X)).dtype == torch.bfloat16
    assert_bit_equal(values(vitfast.restore(model)), before)


def test_values_out_of_range_come_back(build):
    model = build()
    with torch.no_grad():
        model.head.weight[0, 0] = 1e30
    before = values(model)
    vitfast.accelerate(model, precision="fp16")
    assert model.head.weight[0, 0].isinf()
    assert_bit_equal(values(vitfast.restore(model)), before)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "beit_base_patch16_224"])
def test_buffers_of_other_models_are_cast_and_come_back(name):
    tiny = {"embed_dim": 48, "depth": 2, "num_heads": 4, "img_size": 64}
    if name.startswith("swin"):
        tiny = {"embed_dim": 24, "depths": (2, 1), "num_heads": (2, 4), "img_size": 112}
    model = timm_model(name, **tiny)
    before = values(model)
    integers = {n: b.clone() for n, b in model.named_buffers() if not b.is_floating_point()}
    floats = {n: b.clone() for n, b in model.named_buffers() if b.is_floating_point()}
    vitfast.accelerate(model, precision="bf16")
    out = model(images(1, 3, tiny["img_size"], tiny["img_size"]).bfloat16())
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    vitfast.restore(model)
    assert_bit_equal(values(model), before)
    for n, b in model.named_buffers():
        assert torch.equal(b, (floats if n in floats else integers)[n])
