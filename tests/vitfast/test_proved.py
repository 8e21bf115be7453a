"""A class counts when it is proved: what is found, what it costs, and that nothing else changes."""

from __future__ import annotations

import copy
import functools
import pickle
import random
import types

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import vitfast
from tests.vitfast._models import kept_reasons, timm_vit
from vitfast import layers
from vitfast.adapters import match, proved
from vitfast.adapters.alike import alike
from vitfast.adapters.twin import Twin
from vitfast.layers.guards import derive_anywhere, deriving


class Attention(nn.Module):
    """A project's own copy."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.num_heads, self.scale = 2, 8**-0.5
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.attn_drop, self.proj_drop = nn.Dropout(drop), nn.Dropout(drop)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return self.attn_drop((q * self.scale @ k.transpose(-2, -1)).softmax(dim=-1))

    def merge(self, x: Tensor) -> Tensor:
        return self.proj_drop(self.proj(x))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.merge((self.weights(q, k) @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    """A project's own copy: one dropout in both places."""

    def __init__(self, drop: float = 0.0, act: nn.Module | None = None) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 32), act or nn.GELU(), nn.Linear(32, 16)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


def _changed(base: type[nn.Module], **methods: object) -> type[nn.Module]:
    """A class of the same name with other methods."""
    return type(base.__name__, (base,), {**methods, "__module__": __name__})


def _softer_in_training(self, q, k):
    return Attention.weights(self, q * (0.5 if self.training else 1.0), k)


def _scaled_by_length(self, q, k):
    return Attention.weights(self, q * (1.0 if q.shape[2] < 10 else 0.5), k)


def _heads_exchanged(self, q, k):
    return Attention.weights(self, q.flip(1), k)


def _dropout_in_front(self, x):
    return self.proj(self.proj_drop(x))


def _gradient_halved(self, x):
    return Attention.merge(self, x + (x.detach() - x) * 0.5)


def _weight_detached(self, x):
    return self.proj_drop(nn.functional.linear(x, self.proj.weight.detach(), self.proj.bias))


def _decorated(forward):
    @functools.wraps(forward)
    def wrapper(self, x):
        return forward(self, x) * 1.001

    return wrapper


def _reads_values(self, x):
    return Attention.merge(self, x) * (1.0 + 1e-3 * x.std().item())


def _late_dropout(self, x):
    return self.drop(self.fc2(self.act(self.fc1(x))))


def _early_dropout(self, x):
    return self.fc2(self.drop(self.act(self.fc1(x))))


MUTANTS = {
    "softer in training": _changed(Attention, weights=_softer_in_training),
    "scaled by length": _changed(Attention, weights=_scaled_by_length),
    "heads exchanged": _changed(Attention, weights=_heads_exchanged),
    "dropout in front": _changed(Attention, merge=_dropout_in_front),
    "gradient halved": _changed(Attention, merge=_gradient_halved),
    "weight detached": _changed(Attention, merge=_weight_detached),
    "decorated": _changed(Attention, forward=_decorated(Attention.forward)),
    "reads values": _changed(Attention, merge=_reads_values),
    "dropout early alone": _changed(Mlp, forward=_early_dropout),
}
EQUALS = {
    "as it is": Attention,
    "another way to write it": _changed(
        Attention, weights=lambda self, q, k: self.attn_drop(torch.softmax(self.scale * (q @ k.mT), -1))
    ),
    "an argument more": _changed(Attention, forward=lambda self, x, mask=None: Attention.forward(self, x)),
    "dropout twice": Mlp,
    "dropout late alone": _changed(Mlp, forward=_late_dropout),
}


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("name", MUTANTS)
def test_a_class_that_computes_something_else_stays(name, drop):
    module = MUTANTS[name](drop)
    found = match(module)
    assert found is not None and found.fused is None and found.disproved
    model = vitfast.accelerate(nn.ModuleList([module]))
    assert type(model[0]) is MUTANTS[name]
    assert "computes something else" in kept_reasons(model)["0"]
    with pytest.raises(ValueError, match="computes something else"):
        vitfast.accelerate(nn.ModuleList([module]), strict=True)


@pytest.mark.parametrize("drop", [0.0, 0.5])
@pytest.mark.parametrize("name", EQUALS)
def test_a_class_that_computes_the_same_counts(name, drop):
    plain = EQUALS[name](drop)
    model = vitfast.accelerate(nn.ModuleList([copy.deepcopy(plain)]), strict=True)
    x = torch.randn(3, 12, 16)
    for training in (False, True):
        torch.manual_seed(1)
        expected = plain.train(training)(x)
        torch.manual_seed(1)
        torch.testing.assert_close(model.train(training)[0](x), expected)


@pytest.mark.parametrize("change", [lambda y: y * 0.99, lambda y: y.detach(), lambda y: y + torch.rand_like(y) * 1e-3])
def test_an_activation_counts_by_what_it_computes(change):
    class GELU(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.702 * x)

    class Other(nn.Module):
        def forward(self, x):
            return change(x * torch.sigmoid(1.702 * x))

    class OtherGELU(Other):
        pass

    assert layers.epilogue(GELU()) == "quick_gelu"
    assert layers.epilogue(OtherGELU()) is None
    assert (
        kept_reasons(vitfast.accelerate(nn.ModuleList([Mlp(act=Other())])))["0"] == "activation Other is in no epilogue"
    )


def test_a_proof_is_kept_by_what_decides_it(monkeypatch):
    tried = []
    inner = proved._try
    monkeypatch.setattr(proved, "_try", lambda module, *rest: tried.append(type(module)) or inner(module, *rest))

    kind = _changed(Attention)
    for _ in range(2):
        assert match(kind(0.1)).fused
    other = kind()
    other.scale = 0.3
    assert match(other).fused
    wider = kind()
    wider.qkv, wider.proj = nn.Linear(32, 96), nn.Linear(32, 32)
    assert match(wider).fused
    # rates are forced, and what no method mentions says nothing
    named = kind(0.7)
    named.layer_idx = 7
    assert match(named).fused
    assert tried == [kind] * 3
    monkeypatch.setattr(kind, "weights", _scaled_by_length)
    assert match(kind()).fused is None
    # both fused layers that might stand for it
    assert tried == [kind] * 5


def test_a_method_put_on_the_class_later_shows():
    model = vitfast.accelerate(timm_vit(depth=1))
    block = model.blocks[0]
    original = type(block).replaces
    forward = original.forward
    assert not block.make_plan().original
    try:
        original.forward = lambda self, x, *args, **kwargs: forward(self, x[:, ::2], *args, **kwargs)
        assert block.make_plan().original == "the forward of Block was replaced"
        row = next(row for row in vitfast.report(model).kept if row.module == "blocks.0")
        assert row.note.startswith("changed since it was replaced: computes something else")
        vitfast.accelerate(model)
        assert type(block) is original
    finally:
        original.forward = forward
    vitfast.accelerate(model)
    assert type(block) is not original and not block.make_plan().original


def test_nothing_else_changes():
    class Norm(nn.BatchNorm1d):
        def forward(self, x):
            return super().forward(x.mT).mT

    class Loud(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.q_norm = Norm(16)
            self.calls = 0

        def forward(self, x):
            self.calls += 1
            random.random(), np.random.rand(), torch.rand(1)
            return super().forward(self.q_norm(x))

    module = Loud().train()
    seen = []
    module.register_forward_hook(lambda *args: seen.append(args))
    module.proj.register_full_backward_hook(lambda *args: seen.append(args))
    before = copy.deepcopy({k: v.clone() for k, v in module.state_dict().items()})
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        assert match(module).reason
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu") and torch.empty(1).is_meta
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])
    assert not seen and module.calls == 0 and module.training
    assert all(p.grad is None for p in module.parameters())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("make", [Attention, lambda: timm_vit(depth=2)], ids=["copy", "timm"])
def test_modules_on_the_meta_device(make):
    with torch.device("meta"):
        model = nn.ModuleList([make()])
    vitfast.accelerate(model, strict=True)
    assert any(row.fused for row in vitfast.report(model).rows)


def test_what_cannot_be_copied_stays(monkeypatch):
    def cpu(tensor: Tensor) -> Tensor:
        raise NotImplementedError("Could not run 'aten::_copy_from' on this backend. And much more.")

    model = nn.Sequential(nn.LayerNorm(23))
    model[0].extra = torch.ones(3)
    monkeypatch.setattr(Tensor, "cpu", cpu)
    vitfast.accelerate(model)
    reasons = " ".join(row.note for row in vitfast.report(model).rows)
    assert "cannot be copied from cpu: Could not run 'aten::_copy_from' on this backend" in reasons


def test_a_twin_has_no_two_rows_alike():
    twin = Twin(nn.Linear(64, 4096), None)
    assert len(torch.unique(twin.root.weight, dim=0)) == 4096
    assert twin.root.weight.dtype == torch.float64


def test_names_and_pickles():
    model = vitfast.accelerate(timm_vit(depth=1))
    block = model.blocks[0]
    assert type(block).__name__ == "Block" and isinstance(block, timm.models.vision_transformer.Block)
    assert "FusedTimmBlock(" in repr(model)
    again = pickle.loads(pickle.dumps(block))
    assert type(again) is type(block) is type(copy.deepcopy(block))
    assert not again.make_plan().original


def test_what_looks_alike_is_a_row():
    class MyAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.kv = nn.Linear(8, 8), nn.Linear(8, 16)

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = MyAttention(), nn.Linear(8, 8)

    class MyFeedForward(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    class MyBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn, self.ff = Wrapper(), MyFeedForward()

    Wrapper.__name__ = "WrapperAttention"
    model = nn.ModuleDict({"embed": type("PatchEmbed3D", (nn.Conv3d,), {})(3, 8, 2), "block": MyBlock()})
    rows = {row.module: row.kind for row in vitfast.report(model).rows}
    assert rows == {
        "embed": "patch_embed",
        "block": "block",
        "block.attn.attention": "attention",
        "block.ff": "mlp",
    }
    with pytest.raises(ValueError, match="no fused layer is offered for MyFeedForward"):
        vitfast.accelerate(model, strict=True)


@pytest.mark.parametrize(
    "model", [nn.TransformerEncoderLayer(8, 2), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), nn.Conv2d(3, 8, 2)]
)
def test_torchs_own_look_like_nothing(model):
    assert alike(model) is None


def test_xcit_shows_rows():
    model = vitfast.accelerate(timm.create_model("xcit_nano_12_p8_224", img_size=32, depth=1, num_classes=3))
    originals = {(row.kind, row.original) for row in vitfast.report(model).kept}
    assert ("attention", "XCA") in originals


def test_a_method_held_by_a_module_is_the_twins():
    module = Attention()
    module.helper = types.MethodType(Attention.merge, module)
    twin = Twin(module, None)
    assert twin.root.helper.__self__ is twin.root


def test_a_proof_inside_a_proof_leaves_the_outer_ones_state():
    x = torch.zeros(1)
    assert not deriving(x)
    with derive_anywhere():
        with derive_anywhere():
            pass
        assert deriving(x)
    assert not deriving(x)
