"""patch_embed: pixel formats and layouts, prefix tokens, position embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.kernels._cases import PATCH_EMBED, Lane, across_lanes, check
from tests.kernels._data import Case, module
from vitfast.kernels import INTERPRET, patch_embed

reference_lane = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 replaces the reference on CPU")
FILE = module("patch_embed")


@across_lanes("patch_embed")
def test_numbers(case: Case, lane: Lane, through_op: None, poisoned: None) -> None:
    check(case, lane.device, lane.dtype)


@pytest.mark.interpret
@pytest.mark.parametrize("case", [case for case in PATCH_EMBED if not case.real], ids=str)
def test_small_tiles(case: Case, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # images end inside tiles, tiles inside images, and K takes several steps
    monkeypatch.setattr(FILE, "heuristic", lambda *args: FILE.Config(16, 16, 16, num_warps=4, num_stages=2))
    check(case, "cpu", torch.float32, batch=5)


@reference_lane
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_cpu_it_is_torch(dtype: torch.dtype) -> None:
    pixels, weight, bias = torch.rand(2, 3, 8, 12), torch.randn(13, 3, 4, 4), torch.randn(13)
    pixels, weight, bias = pixels.to(dtype), weight.to(dtype), bias.to(dtype)
    prefix, pos = torch.randn(2, 13).to(dtype), torch.randn(8, 13).to(dtype)
    patches = F.conv2d(pixels, weight, bias, stride=4).flatten(2).transpose(1, 2)
    assert torch.equal(patch_embed(pixels, weight, bias), patches)
    tokens = torch.cat([prefix.expand(2, -1, -1), patches], dim=1)
    assert torch.equal(patch_embed(pixels, weight, bias, prefix), tokens)
    assert torch.equal(patch_embed(pixels, weight, bias, prefix, pos), tokens + pos)
    patches_alone = torch.cat([prefix.expand(2, -1, -1), patches + pos[2:]], dim=1)
    assert torch.equal(patch_embed(pixels, weight, bias, prefix, pos[2:]), patches_alone)


@reference_lane
def test_uint8_is_normalised_as_torchvision_does() -> None:
    pixels = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    weight, mean, std = torch.randn(13, 3, 4, 4), torch.rand(3), torch.rand(3) + 0.1
    normalised = (pixels.float() / 255 - mean[:, None, None]) / std[:, None, None]
    wanted = F.conv2d(normalised, weight, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patch_embed(pixels, weight, scale=1 / (255 * std), shift=-mean / std), wanted)


@reference_lane
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_torch_s(dtype: torch.dtype) -> None:
    pixels, weight, bias = torch.rand(2, 3, 8, 12), torch.randn(13, 3, 4, 4), torch.randn(13)
    with torch.autocast("cpu", dtype):
        wanted = F.conv2d(pixels, weight, bias, stride=4).flatten(2).transpose(1, 2)
        actual = patch_embed(pixels, weight, bias)
        assert actual.dtype == wanted.dtype == dtype
        assert torch.equal(actual, wanted)
        # an fp32 position embedding promotes, as it does in `x + pos_embed`
        assert patch_embed(pixels, weight, bias, pos_embed=torch.zeros(6, 13)).dtype == torch.float32


@pytest.mark.parametrize("prefix", [0, 2])
def test_empty(prefix: int, through_op: None) -> None:
    pixels = torch.randn(0, 3, 8, 12, requires_grad=True)
    weight = torch.randn(13, 3, 4, 4, requires_grad=True)
    tokens = torch.randn(prefix, 13, requires_grad=True)
    out = patch_embed(pixels, weight, prefix=tokens if prefix else None)
    assert out.shape == (0, 6 + prefix, 13)
    out.sum().backward()
    assert torch.equal(weight.grad, torch.zeros_like(weight))
    if prefix:
        assert torch.equal(tokens.grad, torch.zeros_like(tokens))


def _t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"pixels": _t(3, 8, 12)},
            ValueError,
            r"'pixels' has shape \[3, 8, 12\] and 'weight' \[13, 3, 4, 4\]; expected \[B, C, H, W\] and",
        ),
        ({"pixels": _t(2, 4, 8, 12)}, ValueError, r"'pixels' has shape \[2, 4, 8, 12\] and 'weight' \[13, 3, 4, 4\]"),
        ({"weight": _t(13, 48)}, ValueError, r"'weight' \[13, 48\]; expected \[B, C, H, W\] and \[D, C, P, Q\]"),
        (
            {"pixels": _t(2, 3, 9, 12)},
            ValueError,
            r"image of 9 x 12 pixels; expected a height divisible by 4 and a width divisible by 4",
        ),
        ({"pixels": _t(2, 3, 8, 2)}, ValueError, r"image of 8 x 2 pixels; expected a height divisible by 4"),
        ({"pixels": _t(2, 3, 0, 12)}, ValueError, r"image of 0 x 12 pixels; expected a height divisible by 4"),
        ({"bias": _t(12)}, ValueError, r"'bias' has shape \[12\]; expected \[13\]"),
        ({"scale": _t(1)}, ValueError, r"'scale' has shape \[1\]; expected \[3\]"),
        ({"shift": _t(4)}, ValueError, r"'shift' has shape \[4\]; expected \[3\]"),
        ({"prefix": _t(1, 12)}, ValueError, r"'prefix' has shape \[1, 12\]; expected \[T, 13\]"),
        ({"prefix": _t(1, 1, 13)}, ValueError, r"'prefix' has shape \[1, 1, 13\]; expected \[T, 13\]"),
        ({"prefix": _t()}, ValueError, r"'prefix' has shape \[\]; expected \[T, 13\]"),
        ({"pos_embed": _t(7, 13)}, ValueError, r"'pos_embed' has shape \[7, 13\]; expected \[6, 13\]"),
        (
            {"pos_embed": _t(7, 13), "prefix": _t(2, 13)},
            ValueError,
            r"'pos_embed' has shape \[7, 13\]; expected \[6, 13\] or, with the prefix, \[8, 13\]",
        ),
        ({"pixels": _t(2, 3, 8, 12, dtype=torch.int32)}, TypeError, r"'pixels' has dtype torch\.int32; expected uint8"),
        (
            {"bias": _t(13, dtype=torch.float16)},
            TypeError,
            r"'bias' has dtype torch\.float16, but 'weight' has torch\.float32; expected one dtype",
        ),
        (
            {"pixels": torch.zeros(2, 3, 8, 12, device="meta")},
            ValueError,
            r"'pixels' is on meta, but 'weight' is on cpu; expected one device",
        ),
    ],
)
def test_wrong_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"patch_embed: .*{message}"):
        patch_embed(**{"pixels": _t(2, 3, 8, 12), "weight": _t(13, 3, 4, 4), **arguments})


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("patches", [1, 196, 50176])
def test_heuristic_is_a_valid_config(arch: int, dtype: torch.dtype, patches: int) -> None:
    config = FILE.heuristic(patches, 768, 768, dtype, arch)
    assert config == FILE.heuristic(patches, 768, 768, dtype, arch)
    for size in (config.block_m, config.block_n, config.block_k):
        assert size >= 16 and size & (size - 1) == 0, config
