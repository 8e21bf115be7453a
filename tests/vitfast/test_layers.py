"""What a fused layer must not skip: hooks, stand-ins, parametrisations, dropouts of another kind."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm
from torchvision.models.feature_extraction import create_feature_extractor

import vitfast
from tests.vitfast._models import BUILDERS, assert_equal, assert_same, images, randomise, run
from vitfast.layers import FusedAttention, FusedBlock, FusedLayer, FusedMlp, hooked

MODULES = [
    "",
    "patch_embed",
    "patch_embed.proj",
    "pos_drop",
    "norm_pre",
    "blocks",
    "blocks.0",
    "blocks.0.norm1",
    "blocks.0.attn",
    "blocks.0.attn.qkv",
    "blocks.0.attn.q_norm",
    "blocks.0.attn.k_norm",
    "blocks.0.attn.attn_drop",
    "blocks.0.attn.proj",
    "blocks.0.attn.proj_drop",
    "blocks.0.ls1",
    "blocks.0.drop_path1",
    "blocks.0.norm2",
    "blocks.0.mlp",
    "blocks.0.mlp.fc1",
    "blocks.0.mlp.act",
    "blocks.0.mlp.drop1",
    "blocks.0.mlp.fc2",
    "blocks.0.mlp.drop2",
    "blocks.1.ls2",
    "blocks.1.drop_path2",
    "norm",
    "head",
]
OPTIONS = {
    "plain": {},
    "LayerScale, drop_path, qk_norm": {"init_values": 0.3, "drop_path_rate": 0.2, "qk_norm": True, "pre_norm": True},
}


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def pair(build, **changes) -> tuple[nn.Module, nn.Module]:
    plain = build(**changes)
    return plain, vitfast.accelerate(copy.deepcopy(plain))


def watch(model: nn.Module, name: str, seen: dict, *, before: bool = False) -> list:
    """Register every kind of hook on a module; each notes what it is given."""
    module = model.get_submodule(name)
    log = seen.setdefault(name, [])
    handles = [
        module.register_forward_hook(
            lambda m, args, kwargs, out: log.append(("forward", args, dict(kwargs), out)), with_kwargs=True
        ),
        module.register_forward_pre_hook(
            lambda m, args, kwargs: log.append(("before", args, dict(kwargs))), with_kwargs=True
        ),
    ]
    # torch refuses backward hooks where the pixels need no gradient, and they clone what they are given
    if name not in ("", "patch_embed", "patch_embed.proj"):
        handles.append(module.register_full_backward_hook(lambda m, gin, gout: log.append(("backward", gin, gout))))
        handles.append(module.register_full_backward_pre_hook(lambda m, gout: log.append(("pre", gout))))
    return handles


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    (out * images(*out.shape, seed=9)).sum().backward()
    return out.detach()


def assert_same_log(got: list, expected: list) -> None:
    assert [entry[0] for entry in got] == [entry[0] for entry in expected]
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[1:], b[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", MODULES)
def test_a_hook_sees_what_the_plain_models_sees(build, name, option, when):
    plain, fused = build(**OPTIONS[option]), build(**OPTIONS[option])
    expected, seen = {}, {}
    watch(plain, name, expected)
    if when == "after":
        vitfast.accelerate(fused)
    handles = watch(fused, name, seen)
    if when == "before":
        vitfast.accelerate(fused)
    x = images(2, 3, 24, 32)
    torch.testing.assert_close(logits(fused, x), logits(plain, x))
    # timm's fused attention reads the rate of attn_drop without calling it; the reference model too
    assert expected[name] or name.endswith("attn_drop")
    assert_same_log(seen[name], expected[name])
    # removed again, it is not called again
    for handle in handles:
        handle.remove()
    seen[name].clear()
    logits(fused, x)
    assert not seen[name]
    assert not hooked(fused.get_submodule(name))


@pytest.mark.parametrize("kind", ["full_backward", "full_backward_pre"])
@pytest.mark.parametrize("name", ["attn", "attn.qkv", "attn.proj", "mlp", "mlp.fc1", "mlp.act", "ls1", "ls2", "norm2"])
def test_a_backward_hook_alone_takes_effect(build, name, kind):
    # no forward hook beside it that would have the module called anyway
    results = []
    for model in pair(build, init_values=0.3):
        module = model.blocks[0].get_submodule(name)
        if kind == "full_backward":
            module.register_full_backward_hook(lambda m, gin, gout: tuple(g if g is None else 3.0 * g for g in gin))
        else:
            module.register_full_backward_pre_hook(lambda m, gout: tuple(3.0 * g for g in gout))
        results.append(run(model, lambda m, x: m(x), images(2, 3, 24, 32)))
    untouched = run(build(init_values=0.3), lambda m, x: m(x), images(2, 3, 24, 32))
    name = "gradient of the pixels"
    assert not torch.allclose(results[0][name], untouched[name], atol=1e-3)
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["blocks.0.attn", "blocks.0.mlp.fc1", "blocks.1.ls2", "patch_embed.proj"])
def test_all_hooks_at_once_and_restore(build, name):
    plain, fused = pair(build, init_values=0.3)
    expected, seen = {}, {}
    for other in MODULES:
        watch(plain, other, expected)
        watch(fused, other, seen)
    x = images(2, 3, 24, 32)
    for model in (fused, vitfast.restore(fused)):
        for log in (*expected.values(), *seen.values()):
            log.clear()
        torch.testing.assert_close(logits(model, x), logits(plain, x))
        assert_same_log(seen[name], expected[name])


@pytest.mark.parametrize("name", [m for m in MODULES if not m.endswith("attn_drop")])
def test_a_hook_that_changes_the_output_takes_effect(build, name):
    plain, fused = pair(build, init_values=0.3)
    x = images(2, 3, 24, 32)
    untouched = plain(x)
    for model in (plain, fused):
        model.get_submodule(name).register_forward_hook(lambda m, args, out: out + 0.5 * out.roll(1, -1))
    assert not torch.allclose(plain(x), untouched, atol=1e-3)
    assert_same(plain, fused, x, truth=_double(plain))


def _double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


@pytest.mark.parametrize(
    "name", ["blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.0.mlp", "blocks.1.attn", "patch_embed"]
)
def test_a_hook_that_changes_the_input_takes_effect(build, name):
    plain, fused = pair(build)
    for model in (plain, fused):
        model.get_submodule(name).register_forward_pre_hook(lambda m, args: (args[0] * 1.5, *args[1:]))
    assert_equal(plain, fused, images(2, 3, 24, 32))
    assert not torch.allclose(fused(images(2, 3, 24, 32)), build()(images(2, 3, 24, 32)), atol=1e-3)


def test_a_hook_on_attention_weights_of_the_unfused_path_fires():
    # attention maps are read from attn_drop's input in a model built without fused attention
    plain, fused = pair(BUILDERS["timm"])
    maps = []
    for model in (plain, fused):
        for block in model.blocks:
            block.attn.fused_attn = False
        model.blocks[1].attn.attn_drop.register_forward_hook(lambda m, args, out: maps.append(args[0].detach()))
    x = images(2, 3, 24, 32)
    torch.testing.assert_close(fused(x), plain(x))
    assert len(maps) == 2 and maps[0].shape == (2, 4, 13, 13)
    torch.testing.assert_close(maps[0], maps[1])


@pytest.mark.parametrize(
    "name", ["blocks.0", *(f"blocks.0.{m}" for m in ("attn", "attn.qkv", "mlp", "mlp.act")), "norm", "patch_embed"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_replaced_on_one_object_takes_effect(build, name, when):
    # attention visualisers and offloading do this instead of registering a hook
    def patch(model):
        module = model.get_submodule(name)
        original = module.forward
        module.forward = lambda *args, **kwargs: original(*args, **kwargs) * 1.5

    plain, fused = build(), build()
    patch(plain)
    if when == "after":
        vitfast.accelerate(fused)
    patch(fused)
    if when == "before":
        vitfast.accelerate(fused)
    x = images(2, 3, 24, 32)
    torch.testing.assert_close(fused(x), plain(x))
    if isinstance(fused.get_submodule(name), FusedLayer) or when == "before":
        assert "forward" in str(vitfast.report(fused)) or name in ("blocks.0.attn.qkv", "blocks.0.mlp.act")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_forward_that_was_put_back_is_the_class_s(build, when):
    # Transformers 4.57 captures outputs so, and leaves the class's forward on the object
    plain, model = build(), build()
    blocks = [module for module in model.modules() if hasattr(module, "norm1")]
    if when == "after":
        vitfast.accelerate(model)
    x = images(2, 3, 24, 32)
    seen = []
    forwards = [block.forward for block in blocks]
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = lambda *args, _forward=forward, **kwargs: seen.append(1) or _forward(*args, **kwargs)
    model(x)
    for block, forward in zip(blocks, forwards, strict=True):
        block.forward = forward
    assert len(seen) == len(blocks) > 0
    vitfast.accelerate(model)
    assert all(isinstance(block, FusedBlock) and block.make_plan().complete for block in blocks)
    assert "forward" not in str(vitfast.report(model))
    torch.testing.assert_close(model(x), plain(x))
    vitfast.restore(model)
    assert torch.equal(model(x), plain(x))


class LoRA(nn.Module):
    """What adapter libraries put in the place of a linear layer."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        randomise(self.up)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def bias(self) -> Tensor:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class LoRALinear(nn.Linear):
    """The other way to write it: a subclass that has the weight itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + x.mean(dim=-1, keepdim=True)


LINEARS = ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["wrapper", "subclass"])
@pytest.mark.parametrize("name", LINEARS)
def test_a_stand_in_for_a_linear_layer_takes_effect(build, name, kind, when):
    def adapt(model):
        torch.manual_seed(3)
        for block in model.blocks:
            parent, _, child = name.partition(".")
            linear = block.get_submodule(name)
            if kind == "wrapper":
                setattr(block.get_submodule(parent), child, LoRA(linear))
            else:
                linear.__class__ = LoRALinear
        return model

    plain = adapt(build(init_values=0.3))
    fused = build(init_values=0.3)
    fused = vitfast.accelerate(adapt(fused)) if when == "before" else adapt(vitfast.accelerate(fused))
    x = images(2, 3, 24, 32)
    assert_same(plain, fused, x)
    assert not torch.allclose(fused(x), build(init_values=0.3)(x), atol=1e-3)
    # an MLP whose first layer is no nn.Linear when `accelerate` looks at it stays as it is
    stand_in = "LoRA" if kind == "wrapper" else "LoRALinear"
    assert f"{name.rpartition('.')[2]} is a {stand_in}" in str(vitfast.report(fused))


class Scale(nn.Module):
    def forward(self, w: Tensor) -> Tensor:
        return 1.5 * w


PARAMETRISED = {
    "attn.qkv": "weight",
    "mlp.fc2": "bias",
    "norm1": "weight",
    "norm2": "weight",
    "ls1": "gamma",
    "ls2": "gamma",
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", PARAMETRISED)
def test_parametrisations_take_effect(build, name, when):
    def change(model):
        parametrize.register_parametrization(model.blocks[0].get_submodule(name), PARAMETRISED[name], Scale())
        return model

    plain = change(build(init_values=0.3))
    fused = build(init_values=0.3)
    fused = vitfast.accelerate(change(fused)) if when == "before" else change(vitfast.accelerate(fused))
    x = images(2, 3, 24, 32)
    assert_same(plain, fused, x, grad=True)
    # taken out again, the layer is what it was
    for model in (plain, fused):
        parametrize.remove_parametrizations(model.blocks[0].get_submodule(name), PARAMETRISED[name])
    assert_same(plain, vitfast.restore(fused), x)
    assert not any(isinstance(m, FusedLayer) for m in fused.modules())


REPARAMETRISED = {
    "weight_norm hook": weight_norm,
    "spectral_norm hook": spectral_norm,
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda module: prune.random_unstructured(module, "weight", amount=0.5),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", REPARAMETRISED)
def test_reparametrised_weights_take_effect(build, method, when):
    def change(model):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name in LINEARS:
                REPARAMETRISED[method](model.blocks[0].get_submodule(name))
        # the power iteration of spectral_norm moves in training mode
        return model.eval()

    # the gradients' conditioning is such that fp32 leaves three digits of them
    plain = change(build().double())
    fused = build().double()
    fused = vitfast.accelerate(change(fused)) if when == "before" else change(vitfast.accelerate(fused))
    x = images(2, 3, 24, 32).double()
    plain_out, fused_out = logits(plain, x), logits(fused, x)
    torch.testing.assert_close(fused_out, plain_out, rtol=1e-9, atol=1e-9)
    grads = {name: p.grad for name, p in plain.named_parameters()}
    assert any("original" in name or name.endswith(("_orig", "_g")) for name in grads)
    for name, p in fused.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-8, atol=1e-8)


class MonteCarlo(nn.Dropout):
    """Drops in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, True)


class Doubling(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 2.0 * x


class EvalScaledPath(nn.Module):
    """Stochastic depth in its first form: it scales in evaluation instead of in training."""

    def __init__(self) -> None:
        super().__init__()
        self.drop_prob = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5


STAND_INS = {
    "attn.proj_drop": MonteCarlo,
    "mlp.drop1": MonteCarlo,
    "mlp.drop2": MonteCarlo,
    "drop_path1": EvalScaledPath,
    "drop_path2": EvalScaledPath,
    "ls1": Doubling,
    "ls2": Doubling,
    "attn.q_norm": Doubling,
    "attn.k_norm": Doubling,
    "mlp.act": nn.ReLU,
    "norm2": nn.Identity,
    "mlp": nn.Tanh,
}


@pytest.mark.parametrize("name", STAND_INS)
def test_a_stand_in_for_a_small_module_is_called(build, name):
    plain, fused = pair(build)
    for model in (plain, fused):
        for block in model.blocks:
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, STAND_INS[name]())
    x = images(2, 3, 24, 32)
    results = []
    for model in (plain, fused):
        torch.manual_seed(4)
        results.append(model(x))
    torch.testing.assert_close(results[1], results[0])
    assert not torch.allclose(results[0], build()(x), atol=1e-3)


def test_limits_name_what_a_layer_leaves_to_the_original():
    model = vitfast.accelerate(BUILDERS["reference"](attn_drop_rate=0.1, drop_path_rate=0.2))
    block = model.blocks[1]
    assert isinstance(block, FusedBlock) and isinstance(block.attn, FusedAttention) and isinstance(block.mlp, FusedMlp)
    assert block.attn.limits() == ["attention dropout 0.1: the original forward runs in training"]
    assert block.limits() == [
        f"{name} 0.2: its residual is added outside the kernel in training" for name in ("drop_path1", "drop_path2")
    ]
    handle = block.mlp.act.register_forward_hook(lambda m, args, out: None)
    assert block.mlp.limits() == ["act has hooks: called as a module"]
    handle.remove()
    block.mlp.act = nn.ReLU()
    assert block.mlp.limits() == ["act is a ReLU: called as a module"]
    block.mlp.fc1 = LoRA(block.mlp.fc1)
    assert block.mlp.limits() == ["fc1 is a LoRA: called as a module", "act is a ReLU: called as a module"]
    block.attn.register_forward_hook(lambda m, args, out: None)
    assert "attn has hooks: its residual is added outside it" in block.limits()
    model.patch_embed.proj.register_forward_hook(lambda m, args, out: None)
    assert model.patch_embed.limits() == ["proj has hooks: called as a module"]


def test_hooks_for_all_modules_see_all_of_them(build):
    # torch's module trackers register these
    plain, fused = pair(build, init_values=0.3)
    x = images(2, 3, 24, 32)
    logs = []
    for model in (plain, fused):
        log = []
        names = {id(module): name for name, module in model.named_modules()}
        handle = nn.modules.module.register_module_forward_hook(
            lambda m, args, out, log=log, names=names: log.append((names[id(m)], out.detach()))
        )
        model(x)
        handle.remove()
        logs.append(log)
    assert [name for name, _ in logs[1]] == [name for name, _ in logs[0]]
    for (_, got), (_, expected) in zip(*reversed(logs), strict=True):
        torch.testing.assert_close(got, expected)


def test_feature_extraction_by_tracing():
    # torchvision's and timm's feature extractors trace timm's model with torch.fx
    plain, fused = pair(BUILDERS["timm"], init_values=0.3)
    x = images(2, 3, 24, 32)
    nodes = ["blocks.0.attn.qkv", "blocks.1.mlp.act", "blocks.1.add", "norm"]
    got, expected = (create_feature_extractor(model, nodes)(x) for model in (fused, plain))
    assert got.keys() == expected.keys() == set(nodes)
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name])


def test_an_attention_behind_a_wrapper_is_called(build):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args, **kwargs):
            return 2.0 * self.inner(*args, **kwargs)

    plain, fused = pair(build, init_values=0.3)
    for model in (plain, fused):
        model.blocks[0].attn = Wrapper(model.blocks[0].attn)
        model.blocks[1].mlp = Wrapper(model.blocks[1].mlp)
    assert_same(plain, fused, images(2, 3, 24, 32))
    assert fused.blocks[0].limits() == ["attn is a Wrapper: its residual is added outside it"]


@pytest.mark.parametrize("first", ["lora", "accelerate"])
@pytest.mark.parametrize("library", BUILDERS)
def test_lora_of_peft_on_the_packed_projection(library, first):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    plain = BUILDERS[library]()
    fused = copy.deepcopy(plain)
    if first == "accelerate":
        vitfast.accelerate(fused)
    adapted = []
    for model in (plain, fused):
        torch.manual_seed(3)
        adapted.append(get_peft_model(model, config).eval())
    if first == "lora":
        vitfast.accelerate(adapted[1])
    x = images(2, 3, 24, 32)
    assert_same(*adapted, x)
    notes = {row.note for row in vitfast.report(adapted[1]).replaced if row.kind == "attention"}
    assert notes == {"qkv is a peft.Linear: called as a module"}
    merged = [model.merge_and_unload() for model in adapted]
    assert_same(*merged, x, grad=False)
    assert {row.note for row in vitfast.report(merged[1]).replaced if row.kind == "attention"} == {""}
