"""A layer runs by its plan: made once, made anew when something changed, and the original where no kernel fits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.two_tensor import TwoTensor

import vitfast
from tests.vitfast._models import BUILDERS, images, randomise
from vitfast.layers import FusedLayer, guards
from vitfast.layers.guards import why_not_on, why_not_taken

X = (2, 3, 24, 32)


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def pair(build, **changes) -> tuple[nn.Module, nn.Module]:
    plain = build(**changes)
    return plain, vitfast.accelerate(copy.deepcopy(plain))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


# --- when a plan is made


def test_a_plan_is_made_once(build):
    _, fused = pair(build)
    with torch.inference_mode():
        fused(images(*X))
        plans = [block.plan() for block in fused.blocks]
        fused(images(*X))
    assert all(block.plan() is plan for block, plan in zip(fused.blocks, plans, strict=True))


def _patched(block: nn.Module) -> None:
    original = block.mlp.fc1.forward
    block.mlp.fc1.forward = lambda x: original(x) * 2


def _stand_in(module: nn.Module, like: nn.Linear) -> None:
    module.fc1 = randomise(nn.Linear(like.in_features, like.out_features)).eval()


CHANGES = {
    "hook": lambda block: block.attn.proj.register_forward_hook(lambda m, args, out: out * 2),
    "hook before": lambda block: block.mlp.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
    "forward on an object": _patched,
    "another module": lambda block: _stand_in(block.mlp, block.mlp.fc1),
    "another activation": lambda block: setattr(block.mlp, "act", nn.ReLU()),
    "another parameter": lambda block: setattr(block.ls1, "gamma", nn.Parameter(block.ls1.gamma * 3)),
    "a part that trains": lambda block: block.mlp.drop1.train() and setattr(block.mlp.drop1, "p", 1.0),
    "heads": lambda block: (setattr(block.attn, "num_heads", 2), setattr(block.attn, "head_dim", 24)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_obeyed(build, change):
    plain, fused = pair(build, init_values=0.3)
    x = images(*X)
    with torch.inference_mode():
        before = fused(x)
        for model in (plain, fused):
            CHANGES[change](model.blocks[0])
        close(fused(x), plain(x))
        assert not torch.allclose(fused(x), before, atol=1e-3)


def test_a_forward_put_on_the_class_is_obeyed():
    class Twice(nn.LayerNorm):
        pass

    plain = nn.Sequential(Twice(8), nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)))
    fused = vitfast.accelerate(copy.deepcopy(plain))
    assert isinstance(fused[0], FusedLayer)
    x = images(2, 5, 8)
    close(fused(x), plain(x))
    Twice.forward = lambda self, x: 2 * nn.LayerNorm.forward(self, x)
    close(fused(x), plain(x))
    assert "the forward of Twice was replaced" in str(vitfast.report(fused)) or not vitfast.report(fused).replaced[1:]


def test_a_replica_has_a_plan_of_its_own(build):
    # as DataParallel makes them: another dictionary of modules, with other tensors in it
    _, fused = pair(build, init_values=0.3)
    block = fused.blocks[0]
    plan = block.plan()
    replica = block._replicate_for_data_parallel()
    assert replica.plan() is not plan
    assert block.plan() is plan


# --- what no kernel takes


def test_tensor_subclasses_as_weights(build):
    # as quantised weights are: an arithmetic of their own
    plain, fused = pair(build)
    for model in (plain, fused):
        for layer in (model.blocks[0].attn.qkv, model.blocks[1].mlp.fc2):
            layer.weight = nn.Parameter(TwoTensor(layer.weight.detach(), layer.weight.detach().clone()))

    def out(model: nn.Module) -> Tensor:
        with torch.no_grad():
            y = model(images(*X))
        return y.a if isinstance(y, TwoTensor) else y

    close(out(fused), out(plain))
    assert "qkv holds a TwoTensor: called as a module" in str(vitfast.report(fused))


def test_tensor_subclasses_as_pixels(build):
    plain, fused = pair(build)
    x = TwoTensor(images(*X), images(*X))
    with torch.no_grad():
        close(fused(x).a, plain(x).a)


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout):
    plain = nn.LayerNorm(8)
    fused = vitfast.accelerate(copy.deepcopy(plain))
    x = torch.nested.nested_tensor([images(3, 8), images(5, 8)], layout=layout)
    got, expected = (model(x).to_padded_tensor(0.0) for model in (fused, plain))
    close(got, expected)


def test_sparse_and_inference_weights(build):
    plain, fused = pair(build)
    with torch.inference_mode():
        for model in (plain, fused):
            norm = model.blocks[0].norm1
            norm.weight = nn.Parameter(norm.weight * 2)
        vitfast.accelerate(fused, frozen=True)
        close(fused(images(*X)), plain(images(*X)))
    assert "nothing is derived" in str(vitfast.report(fused))


TRANSFORMS = {
    "grad": lambda model, x: grad(lambda p: functional_call(model, p, (x,)).square().sum())(dict(_parameters(model))),
    "vmap": lambda model, x: vmap(lambda one: model(one[None]))(x),
    "per-sample gradients": lambda model, x: vmap(
        grad(lambda p, one: functional_call(model, p, (one[None],)).sum()), (None, 0)
    )(dict(_parameters(model)), x),
    "jvp": lambda model, x: jvp(model, (x,), (torch.ones_like(x),))[1],
    "jacrev": lambda model, x: jacrev(lambda one: model(one[None]).sum())(x[0]),
    "batched gradients": lambda model, x: _batched(model, x),
}


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "blocks.0" in name}


def _batched(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    out = model(x)
    return torch.autograd.grad(out, x, torch.eye(out.numel()).view(-1, *out.shape), is_grads_batched=True)[0]


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_torch_func(build, transform):
    plain, fused = pair(build, depth=1)
    # the other kernels of torch's attention have no derivative in forward mode
    with sdpa_kernel(SDPBackend.MATH):
        got, expected = (TRANSFORMS[transform](model, images(*X)) for model in (fused, plain))
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def test_dual_numbers(build):
    plain, fused = pair(build)
    tangents = []
    with torch.autograd.forward_ad.dual_level(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for model in (fused, plain):
            out = model(torch.autograd.forward_ad.make_dual(images(*X), torch.ones(X)))
            tangents.append(torch.autograd.forward_ad.unpack_dual(out).tangent)
    assert tangents[1] is not None and tangents[1].abs().max() > 0
    close(*tangents)


def test_torchscript():
    # the reference's forward is not written for it, timm's is
    plain, fused = pair(BUILDERS["timm"])
    x = images(*X)
    kinds = [type(m) for m in fused.modules()]
    for scripted in (torch.jit.script(fused), torch.jit.trace(fused, x, check_trace=False)):
        with torch.no_grad():
            close(scripted(x), plain(x))
    # and the model stays accelerated
    assert [type(m) for m in fused.modules()] == kinds
    close(fused(x), plain(x))


def test_where_kernels_run(monkeypatch):
    fp32, double = torch.float32, torch.float64
    assert not why_not_on(torch.device("cpu"), fp32) and not why_not_on(torch.device("meta"), fp32)
    assert why_not_on(torch.device("mps"), fp32) == "on mps: the kernels run on CUDA and CPU"
    assert why_not_on(torch.device("xpu"), fp32).startswith("on xpu")
    assert why_not_on(torch.device("cuda"), double) == "float64: the kernels compute in fp32, fp16 and bf16"
    monkeypatch.setattr(guards, "HAS_TRITON", False)
    assert why_not_on(torch.device("cuda"), fp32) == "Triton is not installed"
    assert not why_not_on(torch.device("cpu"), fp32)
    assert "TwoTensor" in why_not_taken(TwoTensor(images(2), images(2)))
    assert why_not_taken(images(2, 2).to_sparse()).startswith("a sparse_coo")


def test_reports_say_where_the_original_runs(monkeypatch):
    _, fused = pair(BUILDERS["reference"])
    monkeypatch.setattr("vitfast.layers.base.why_not_on", lambda device, dtype: "on npu")
    norms = [row.note for row in vitfast.report(fused).replaced if row.kind == "layer_norm"]
    assert set(norms) == {"on npu: the original forward runs"}
