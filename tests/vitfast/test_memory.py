"""Memory that a forward holds at its height, counted on torch's meta device: sizes are a GPU's, and none is needed."""

from __future__ import annotations

import weakref

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import vitfast


class Live(TorchDispatchMode):
    """Bytes of the storages that operators returned and somebody still holds; an operator's own scratch is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in given or storage._cdata in self._known:
                continue
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def peak(model: nn.Module, batch: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """Of activations and whatever else the forward makes; parameters and pixels are not counted."""
    pixels = torch.empty(batch, 3, 224, 224, dtype=dtype, device="meta")
    with torch.inference_mode(), Live() as live:
        model(pixels)
    return live.peak


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    with torch.device("meta"):
        return timm.create_model("vit_base_patch16_224").eval().to(torch.bfloat16)


def test_the_count_is_right() -> None:
    class Two(nn.Module):
        def forward(self, x):
            y = x * 2
            z = torch.cat([y, y])
            del y
            return z.sum() + 1

    x = torch.empty(1000, device="meta")
    with Live() as live:
        Two()(x)
    # x * 2 beside the concatenation of two
    assert live.peak == 3 * 4000


@pytest.mark.parametrize("fold", [False, True], ids=["norms by themselves", "folded"])
def test_three_fifths_of_timm_s(plain: nn.Module, fold: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = peak(plain, 256)
    model = timm.create_model("vit_base_patch16_224").eval().to("meta", torch.bfloat16)
    vitfast.accelerate(model, frozen=fold)
    # on a GPU; meta is none
    for room in ("block", "model", "tables"):
        monkeypatch.setattr(f"vitfast.layers.{room}.deriving", lambda x: fold)
    if fold:
        # derived once, before the forward that is counted
        assert all([block.plan().folded for block in model.blocks])
    ours = peak(model, 256)
    unit = 256 * 197 * 768 * 2
    assert ours <= 0.6 * theirs, (ours / unit, theirs / unit)


def test_nothing_grows_with_the_square_of_tokens(plain: nn.Module) -> None:
    model = vitfast.accelerate(timm.create_model("vit_base_patch16_224").eval().to("meta", torch.bfloat16))
    probabilities = 8 * 12 * 197 * 197 * 2
    sizes = []
    with torch.inference_mode(), Live() as live:
        original = live._free
        live._free = lambda key, size: (sizes.append(size), original(key, size))
        model(torch.empty(8, 3, 224, 224, dtype=torch.bfloat16, device="meta"))
    assert sizes
    assert probabilities not in sizes
