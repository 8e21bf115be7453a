"""Accelerated models under torch.compile: few graphs for many shapes, inductor's modes, single blocks, AOTInductor."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import vitfast
from tests.vitfast._models import BUILDERS, images, reference, timm_vit
from vitfast import kernels


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def pair(build, **changes) -> tuple[nn.Module, nn.Module]:
    plain = build(**changes)
    return plain, vitfast.accelerate(copy.deepcopy(plain))


def assert_close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def counts(plain: nn.Module, fused: nn.Module, shapes: list[tuple[int, ...]], dynamic: bool | None) -> list[int]:
    """How many graphs there are after each shape; every output is compared."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, backend=counter, fullgraph=True, dynamic=dynamic)
    found = []
    with torch.no_grad():
        for shape in shapes:
            x = images(*shape)
            assert_close(compiled(x), plain(x))
            found.append(counter.frame_count)
    return found


BATCHES = [(2, 3, 24, 32), (3, 3, 24, 32), (5, 3, 24, 32), (7, 3, 24, 32), (4, 3, 24, 32)]
# no square first: torch takes sizes that are equal at tracing to be equal for good
SIZES = [(2, 3, 24, 40), (3, 3, 24, 32), (2, 3, 32, 32), (4, 3, 40, 24), (3, 3, 48, 64)]
MODELS = {"reference": (reference, {}), "timm": (timm_vit, {"dynamic_img_size": True})}


@pytest.mark.parametrize("dynamic", [None, True], ids=["automatic", "dynamic"])
def test_no_graph_is_added_after_the_second_batch_size(build, dynamic):
    found = counts(*pair(build, init_values=0.3), BATCHES, dynamic)
    assert found[1:] == found[1:2] * 4, found
    assert found[-1] <= 2


@pytest.mark.parametrize("name", MODELS)
def test_no_graph_is_added_after_the_second_resolution(name):
    build, changes = MODELS[name]
    found = counts(*pair(build, **changes), SIZES, True)
    assert found[1:] == found[1:2] * 4, found


@pytest.mark.parametrize("name", MODELS)
def test_one_image_costs_one_graph_more(name):
    # torch traces a size of 1 by itself, whatever the model
    build, changes = MODELS[name]
    found = counts(*pair(build, **changes), [*BATCHES[:2], (1, 3, 24, 32), (1, 3, 24, 32), *BATCHES[2:]], True)
    assert found[2] == found[1] + 1
    assert found[2:] == found[2:3] * 5


@pytest.mark.parametrize("mode", ["max-autotune-no-cudagraphs", "reduce-overhead", "max-autotune"])
def test_inductor_s_modes(mode):
    plain, fused = pair(reference, depth=1)
    compiled = torch.compile(fused, mode=mode, fullgraph=True)
    with torch.inference_mode():
        for seed in (1, 2):
            x = images(2, 3, 24, 32, seed=seed)
            assert_close(compiled(x), plain(x))


def test_blocks_by_themselves(build):
    # what torch calls regional compilation: one graph serves every block
    plain, fused = pair(build, depth=4, global_pool="avg", init_values=0.3)
    counter = CompileCounterWithBackend("aot_eager")
    for block in fused.blocks:
        block.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        x = images(2, 3, 24, 32)
        assert_close(fused(x), plain(x))
    assert counter.frame_count == 1
    vitfast.restore(fused)
    with torch.no_grad():
        assert_close(fused(x), plain(x))


def test_compiled_blocks_see_all_tokens_or_the_pooled_ones(build):
    # the tail computes the last block without calling it; the others stay compiled
    plain, fused = pair(build, depth=3)
    counter = CompileCounterWithBackend("aot_eager")
    for block in fused.blocks:
        block.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        x = images(2, 3, 24, 32)
        assert_close(fused(x), plain(x))
        assert_close(fused.forward_features(x), plain.forward_features(x))
    assert counter.frame_count >= 1


@pytest.mark.skipif(kernels.INTERPRET, reason="exports the reference path")
def test_export_is_saved_and_loaded(build, tmp_path):
    plain, fused = pair(build)
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(fused, (images(2, 3, 24, 32),)), path)
    loaded = torch.export.load(path)
    assert any("vitfast" in str(node.target) for node in loaded.graph.nodes)
    with torch.no_grad():
        assert_close(loaded.module()(images(2, 3, 24, 32)), plain(images(2, 3, 24, 32)))


@pytest.mark.skipif(kernels.INTERPRET, reason="packages the reference path")
def test_aot_inductor_package(tmp_path):
    plain, fused = pair(reference, depth=1)
    x = images(2, 3, 24, 32)
    with torch.no_grad():
        exported = torch.export.export(fused, (x,))
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
        assert_close(torch._inductor.aoti_load_package(package)(x), plain(x))
