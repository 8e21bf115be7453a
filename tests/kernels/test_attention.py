"""attention, attention_qkv and relative_attention: the whole and the online softmax, biases, head dims, layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import vitfast.kernels as kernels
from tests.kernels._cases import ATTENTION, ATTENTION_LSE, ATTENTION_QKV, RELATIVE_ATTENTION, Lane, across_lanes, check
from tests.kernels._data import Case, module
from vitfast.kernels import INTERPRET, attention, attention_lse, attention_qkv, relative_attention

reference_lane = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 replaces the reference on CPU")
FILE = module("attention")
relative_index = module("relative_attention").relative_index


@across_lanes("attention", "attention_lse", "attention_qkv", "relative_attention")
def test_numbers(case: Case, lane: Lane, through_op: None, poisoned: None) -> None:
    check(case, lane.device, lane.dtype)


SMALL = [case for case in (*ATTENTION, *ATTENTION_LSE, *ATTENTION_QKV, *RELATIVE_ATTENTION) if not case.real]


@pytest.mark.interpret
@pytest.mark.parametrize(
    "config",
    [
        FILE.Config(16, 16, 4, 1),
        FILE.Config(32, 32, 4, 2),
        FILE.Config(64, 256, 4, 1),
        FILE.Config(16, 16, 4, 1, resident=True),
    ],
    ids=["online-16", "online-32", "whole", "resident"],
)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_every_softmax(case: Case, config: Any, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FILE, "heuristic", lambda *args: config)
    arguments = case.arguments(torch.float32, "meta")
    d = arguments["q"].shape[-1] if "q" in arguments else arguments["qkv"].shape[-1] // (3 * arguments["heads"])
    biased = any(arguments.get(name) is not None for name in ("bias", "table"))
    if config.resident and (biased or FILE.split_head_dim(d)[1]):
        with pytest.raises(ValueError, match="expected a power of two, without bias"):
            getattr(kernels, case.op)(**case.arguments(torch.float32, "cpu"))
        return
    # the backward is torch's own whatever the tiles
    check(dataclasses.replace(case, wrt=()), "cpu", torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in SMALL if case.op != "relative_attention"], ids=str)
def test_resident_keys_of_any_size(
    case: Case, dtype: torch.dtype, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = FILE.heuristic

    def heuristic(n: int, s: int, d: int, dtype: torch.dtype, biased: bool, arch: int) -> Any:
        if biased or FILE.split_head_dim(d)[1] or s > FILE.RESIDENT_KEYS:
            return usual(n, s, d, dtype, biased, arch)
        return FILE.Config(64, 16, 4, 2, resident=True)

    monkeypatch.setattr(FILE, "heuristic", heuristic)
    check(dataclasses.replace(case, wrt=()), "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in ATTENTION_QKV if case.real], ids=str)
def test_numbers_of_a_large_batch(case: Case, dtype: torch.dtype, poisoned: None) -> None:
    check(dataclasses.replace(case, wrt=()), "cuda", dtype, batch=32)


@reference_lane
def test_what_torch_s_kernels_for_cuda_read() -> None:
    x = torch.randn(2, 3, 7, 72)
    assert FILE.aligned(x) is x
    # 67 columns are padded by torch itself, whatever their rows' addresses
    whole = torch.randn(2, 3, 7, 67)
    assert FILE.aligned(whole) is whole
    odd = [torch.randn(2, 3, 7, 75)[..., :72], torch.randn(2 * 3 * 7 * 72 + 1)[1:].view(2, 3, 7, 72)]
    odd += [torch.randn(2, 3, 72, 7).mT, torch.randn(7, 1).expand(7, 72), whole[..., 1:]]
    for y in odd:
        good = FILE.aligned(y)
        assert good.is_contiguous() and good.storage_offset() == 0 and torch.equal(good, y)
        y.requires_grad_()
        FILE.aligned(y).sum().backward()
        assert y.grad is not None


@pytest.mark.interpret
@pytest.mark.parametrize("block_s", [16, 64])
def test_probabilities_from_the_saved_denominator(
    block_s: int, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FILE, "heuristic", lambda *args: FILE.Config(16, block_s, 4, 1))
    q, k, v = (torch.randn(1, 2, 37, 24) for _ in range(3))
    bias = torch.randn(37, 37)
    bias[5] = float("-inf")
    out, lse = attention_lse(q, k, v, bias=bias)
    assert (lse[:, :, 5] == float("-inf")).all()
    p = (q @ k.mT * 24**-0.5 + bias - lse[..., None]).exp()
    p[:, :, 5] = 0.0
    torch.testing.assert_close(p.sum(-1)[:, :, 6:], torch.ones(1, 2, 31))
    torch.testing.assert_close(p @ v, out)
    torch.testing.assert_close(out, attention(q, k, v, bias=bias))


@pytest.mark.interpret
def test_library_route_of_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FILE, "heuristic", lambda *args: FILE.Config(16, 16, 4, 1, library=True))
    monkeypatch.setattr(FILE, "_attention_fwd_kernel", None)
    qkv = torch.randn(2, 31, 3 * 4 * 16)
    q, k, v = qkv.view(2, 31, 3, 4, 16).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attention_qkv(qkv, 4), wanted)
    table = torch.randn(9 * 11 + 3, 4)
    bias = timm_bias(table, (5, 6), True)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    torch.testing.assert_close(relative_attention(q, k, v, table, (5, 6)), wanted)


# relative positions, held to the libraries that define them

GRIDS = [(1, 1), (1, 7), (7, 1), (3, 5), (5, 3), (6, 6)]


def timm_bias(table: torch.Tensor, grid: tuple[int, int], class_token: bool) -> torch.Tensor:
    """`[H, N, N]` as timm gathers it."""
    layers = pytest.importorskip("timm.layers")
    index = layers.pos_embed_rel.gen_relative_position_index(grid, class_token=class_token)
    return table[index.view(-1).to(table.device)].view(*index.shape, -1).permute(2, 0, 1)


@reference_lane
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_relative_index_is_the_libraries_own(grid: tuple[int, int]) -> None:
    beit = pytest.importorskip("timm.models.beit")
    hf = pytest.importorskip("transformers.models.beit.modeling_beit")
    layers = pytest.importorskip("timm.layers.pos_embed_rel")
    ours = relative_index(*grid, 1, torch.device("cpu"))
    assert torch.equal(ours, beit.gen_relative_position_index(grid))
    assert torch.equal(ours, layers.gen_relative_position_index(grid, class_token=True))
    assert torch.equal(ours, hf.BeitRelativePositionBias.generate_relative_position_index(grid))
    without = relative_index(*grid, 0, torch.device("cpu"))
    assert torch.equal(without, layers.gen_relative_position_index(grid))


@pytest.mark.parametrize("class_token", [False, True], ids=["patches", "class"])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_relative_attention_is_timm_s(
    grid: tuple[int, int], class_token: bool, poisoned: None, through_op: None
) -> None:
    # 4 heads of 16, a table whose rows all differ
    n = grid[0] * grid[1] + class_token
    q, k, v = torch.randn(2, n, 3, 4, 16).permute(2, 0, 3, 1, 4)
    table = 3 * torch.randn((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3 * class_token, 4)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=timm_bias(table, grid, class_token))
    torch.testing.assert_close(relative_attention(q, k, v, table, grid), wanted)
    torch.testing.assert_close(relative_attention(q, k, v, table.t().contiguous().t(), grid), wanted)


def test_relative_attention_of_whole_layers(through_op: None) -> None:
    # what stands between the projections of timm's and Transformers' layers
    beit = pytest.importorskip("timm.models.beit")
    hf = pytest.importorskip("transformers.models.beit.modeling_beit")
    transformers = pytest.importorskip("transformers")
    x = torch.randn(2, 17, 64)
    layer = beit.Attention(64, num_heads=4, qkv_bias=True, window_size=(4, 4)).eval()
    torch.nn.init.normal_(layer.relative_position_bias_table)
    torch.nn.init.normal_(layer.q_bias)
    torch.nn.init.normal_(layer.v_bias)
    qkv = F.linear(x, layer.qkv.weight, torch.cat([layer.q_bias, layer.k_bias, layer.v_bias]))
    q, k, v = qkv.view(2, 17, 3, 4, 16).permute(2, 0, 3, 1, 4)
    out = relative_attention(q, k, v, layer.relative_position_bias_table, (4, 4))
    torch.testing.assert_close(layer.proj(out.transpose(1, 2).flatten(2)), layer(x))
    config = transformers.BeitConfig(
        hidden_size=64, num_attention_heads=4, image_size=64, patch_size=16, use_relative_position_bias=True
    )
    bias = hf.BeitRelativePositionBias(config)
    torch.nn.init.normal_(bias.relative_position_bias_table)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=bias((4, 4)))
    torch.testing.assert_close(relative_attention(q, k, v, bias.relative_position_bias_table, (4, 4)), wanted)


@reference_lane
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_relative_attention_on_cpu_is_torch(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(2, 16, 3, 4, 16).to(dtype).permute(2, 0, 3, 1, 4)
    table = torch.randn(5 * 9 + 3, 4).to(dtype)
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=timm_bias(table, (3, 5), True)[None])
    assert torch.equal(relative_attention(q, k, v, table, (3, 5)), wanted)


@pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=reference_lane), pytest.param("cuda", marks=pytest.mark.gpu)]
)
def test_gradient_of_a_table_is_as_good_under_autocast(device: str) -> None:
    # timm casts what it has gathered, so its sums of up to 196 terms are of the parameter's fp32; we cast the table
    q, k, v = torch.randn(8, 197, 3, 2, 16, device=device).permute(2, 0, 3, 1, 4)
    table = torch.randn(27 * 27 + 3, 2, device=device, requires_grad=True)

    def gradient(function: Callable[[], torch.Tensor]) -> torch.Tensor:
        out = function()
        return torch.autograd.grad((out.float() * out.detach().float()).sum(), table)[0]

    def timm_s() -> torch.Tensor:
        bias = timm_bias(table, (14, 14), True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    truth = gradient(timm_s)
    with torch.autocast(device, torch.bfloat16):
        wanted = gradient(timm_s)
        actual = gradient(lambda: relative_attention(q, k, v, table, (14, 14)))
    assert actual.dtype == torch.float32
    assert (actual - truth).norm() <= 1.2 * (wanted - truth).norm()


def test_relative_attention_of_no_images(through_op: None) -> None:
    q = torch.randn(0, 2, 7, 16, requires_grad=True)
    table = torch.randn(3 * 5 + 3, 2, requires_grad=True)
    out = relative_attention(q, q, q, table, (2, 3))
    assert out.shape == (0, 2, 7, 16)
    out.sum().backward()
    assert torch.equal(table.grad, torch.zeros_like(table))


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_scores_past_fp16_do_not_overflow(dtype: torch.dtype, poisoned: None) -> None:
    # q k^T is 160000 here, more than fp16 holds; the scores are fp32
    q, k = torch.full((1, 1, 3, 16), 100.0, dtype=dtype), torch.full((1, 1, 40, 16), 100.0, dtype=dtype)
    v = torch.randn(1, 1, 40, 16).to(dtype)
    out = attention(q, k, v, scale=1.0)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand(1, 1, 3, 16), atol=1e-3, rtol=1e-3)


@pytest.mark.interpret
@pytest.mark.parametrize("block_s", [16, 64])
def test_rows_that_a_bias_masks_whole_are_zero(block_s: int, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FILE, "heuristic", lambda *args: FILE.Config(16, block_s, 4, 1))
    q, k, v = (torch.randn(1, 2, 37, 16) for _ in range(3))
    bias = torch.zeros(37, 37)
    bias[5] = float("-inf")
    out = attention(q, k, v, bias=bias)
    assert torch.equal(out[:, :, 5], torch.zeros(1, 2, 16))
    wanted = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out[:, :, 6:], wanted[:, :, 6:])


@reference_lane
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_on_cpu_it_is_torch(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, n, 16).to(dtype) for n in (7, 13, 13))
    bias = torch.randn(3, 7, 13).to(dtype)
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    wanted = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.3)
    assert torch.equal(attention(q, k, v, 0.3, bias), wanted)
    qkv = torch.randn(2, 7, 3 * 3 * 16).to(dtype)
    q, k, v = qkv.unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
    wanted = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.equal(attention_qkv(qkv, 3), wanted)


def test_heads_merge_without_a_copy(through_op: None) -> None:
    q = torch.randn(2, 3, 7, 16)
    out = attention(q, q, q)
    assert out.transpose(1, 2).is_contiguous()
    assert attention_qkv(torch.randn(2, 7, 144), 3).is_contiguous()


@reference_lane
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_torch_s(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(2, 3, 7, 16) for _ in range(3))
    with torch.autocast("cpu", dtype):
        wanted = F.scaled_dot_product_attention(q, k, v)
        actual = attention(q, k, v)
        assert actual.dtype == wanted.dtype
        assert torch.equal(actual, wanted)
        assert attention_qkv(torch.randn(2, 7, 144), 3).dtype == dtype


@pytest.mark.parametrize(("b", "h", "n"), [(0, 2, 7), (2, 0, 7), (2, 2, 0)])
def test_empty(b: int, h: int, n: int, through_op: None) -> None:
    q = torch.randn(b, h, n, 16, requires_grad=True)
    k = torch.randn(b, h, 5, 16, requires_grad=True)
    out = attention(q, k, k)
    assert out.shape == (b, h, n, 16)
    out.sum().backward()
    assert q.grad.shape == q.shape
    assert torch.equal(k.grad, torch.zeros_like(k))


def _t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"q": _t(2, 7, 8)}, ValueError, r"'q' has shape \[2, 7, 8\]; expected \[B, H, N, d\]"),
        (
            {name: _t(1, 2, 7, 257) for name in "qkv"},
            ValueError,
            r"head dim 257; expected 1 to 256",
        ),
        ({name: _t(1, 2, 7, 0) for name in "qkv"}, ValueError, r"head dim 0; expected 1 to 256"),
        (
            {"k": _t(1, 3, 7, 8)},
            ValueError,
            r"'q' has shape \[1, 2, 7, 8\], 'k' \[1, 3, 7, 8\].*expected \[B, H, N, d\] and twice \[B, H, S, d\]",
        ),
        ({"v": _t(1, 2, 6, 8)}, ValueError, r"'v' \[1, 2, 6, 8\]; expected \[B, H, N, d\]"),
        ({"k": _t(1, 2, 0, 8), "v": _t(1, 2, 0, 8)}, ValueError, r"'k' \[1, 2, 0, 8\].*with S >= 1"),
        (
            {"bias": _t(2, 7, 6)},
            ValueError,
            r"'bias' has shape \[2, 7, 6\]; expected one that broadcasts to \[1, 2, 7, 7\]",
        ),
        ({"bias": _t(1, 1, 1, 7, 7)}, ValueError, r"'bias' has shape \[1, 1, 1, 7, 7\]; expected"),
        (
            {"bias": _t(7, 7, dtype=torch.float16)},
            TypeError,
            r"'bias' has dtype torch\.float16, but 'q' has torch\.float32; expected one dtype",
        ),
        ({"bias": _t(7, 7, dtype=torch.bool)}, TypeError, r"'bias' has dtype torch\.bool; expected float16"),
        ({"k": _t(1, 2, 7, 8, dtype=torch.float16)}, TypeError, r"'k' has dtype torch\.float16, but 'q'"),
        (
            {"k": torch.zeros(1, 2, 7, 8, device="meta")},
            ValueError,
            r"'k' is on meta, but 'q' is on cpu; expected one device",
        ),
    ],
)
def test_wrong_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"attention: .*{message}"):
        attention(**{**{name: _t(1, 2, 7, 8) for name in "qkv"}, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"grid": (2, 4)}, ValueError, r"7 queries and 7 keys for a grid of 2 x 4 patches; expected one of each"),
        ({"grid": (1, 5)}, ValueError, r"7 queries and 7 keys for a grid of 1 x 5 patches"),
        ({"grid": (-2, -3)}, ValueError, r"a grid of -2 x -3 patches"),
        ({"k": _t(1, 2, 8, 8), "v": _t(1, 2, 8, 8)}, ValueError, r"7 queries and 8 keys for a grid of 2 x 3"),
        ({"q": _t(2, 7, 8)}, ValueError, r"'q' has shape \[2, 7, 8\]; expected \[B, H, N, d\]"),
        ({"table": _t(15, 2)}, ValueError, r"'table' has shape \[15, 2\]; expected \[18, 2\]"),
        ({"table": _t(18, 3)}, ValueError, r"'table' has shape \[18, 3\]; expected \[18, 2\]"),
        ({"table": _t(18, 2, dtype=torch.float16)}, TypeError, r"'table' has dtype torch\.float16, but 'q'"),
        (
            {"table": torch.zeros(18, 2, device="meta")},
            ValueError,
            r"'table' is on meta, but 'q' is on cpu; expected one device",
        ),
    ],
)
def test_wrong_relative_positions_are_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {**{name: _t(1, 2, 7, 8) for name in "qkv"}, "table": _t(18, 2), "grid": (2, 3)}
    with pytest.raises(error, match=f"relative_attention: .*{message}"):
        relative_attention(**{**right, **arguments})


@pytest.mark.parametrize(
    ("shape", "heads"), [((2, 7, 143), 3), ((7, 144), 3), ((2, 7, 144), 0), ((2, 7, 144), -1)], ids=str
)
def test_wrong_packing_is_named(shape: tuple[int, ...], heads: int) -> None:
    with pytest.raises(ValueError, match=rf"attention_qkv: .*({shape[-1]}|{heads}).*expected"):
        attention_qkv(torch.zeros(shape), heads)


@pytest.mark.parametrize("d", range(1, 257))
def test_head_dims_are_covered(d: int) -> None:
    main, tail = FILE.split_head_dim(d)
    assert main >= 16 and main & (main - 1) == 0
    assert tail == 0 or (tail >= 16 and tail & (tail - 1) == 0)
    assert d <= main + tail < 2 * max(d, 16)


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_heuristic_is_a_valid_config(arch: int, dtype: torch.dtype, biased: bool) -> None:
    for n in (1, 17, 197, 1370):
        for d in (5, 64, 72, 104, 256):
            config = FILE.heuristic(n, n, d, dtype, biased, arch)
            assert config == FILE.heuristic(n, n, d, dtype, biased, arch)
            for size in (config.block_m, config.block_s):
                assert size >= 16 and size & (size - 1) == 0, config


@pytest.mark.parametrize("arch", [90, 100])
def test_keys_of_a_vit_stay_on_chip(arch: int) -> None:
    # ViT-B at 224: 197 keys of 64 in one tile
    assert FILE.heuristic(197, 197, 64, torch.bfloat16, False, arch).block_s >= 197
