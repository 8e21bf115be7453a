"""window_attention: both softmaxes, shifts and regions, cosines, and the Swin blocks of three libraries around it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels._cases import WINDOW_ATTENTION, Lane, across_lanes, check
from tests.kernels._data import Case, module
from vitfast.kernels import INTERPRET, window_attention

reference_lane = pytest.mark.skipif(INTERPRET, reason="TRITON_INTERPRET=1 replaces the reference on CPU")
FILE = module("window_attention")
# the comparisons with other libraries, by the reference and by the interpreted kernel
lanes = pytest.mark.parametrize(
    "lane",
    [pytest.param("reference", marks=reference_lane), pytest.param("interpret", marks=pytest.mark.interpret)],
)


@across_lanes("window_attention")
def test_numbers(case: Case, lane: Lane, through_op: None, poisoned: None) -> None:
    check(case, lane.device, lane.dtype)


SMALL = [case for case in WINDOW_ATTENTION if not case.real]


@pytest.mark.interpret
@pytest.mark.parametrize(
    "config",
    [FILE.Config(16, 16, 1, 4, 1), FILE.Config(32, 32, 2, 4, 2), FILE.Config(64, 256, 2, 4, 1)],
    ids=["online-16", "online-32-two-images", "whole-two-images"],
)
@pytest.mark.parametrize("case", SMALL, ids=str)
def test_both_softmaxes(case: Case, config: Any, poisoned: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FILE, "heuristic", lambda *args: config)
    # the backward is torch's own whatever the tiles; three images are no multiple of two
    check(dataclasses.replace(case, wrt=()), "cpu", torch.float32, batch=3)


# the libraries' blocks: their own projections outside, everything between by window_attention


def _close(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(actual, wanted, atol=2e-5, rtol=2e-5)


def _timm(version: int, size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], **kwargs: Any) -> Any:
    from timm.models.swin_transformer import SwinTransformerBlock
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    kind = SwinTransformerBlock if version == 1 else SwinTransformerV2Block
    block = kind(32, size, 2, window_size=window, shift_size=shift, **kwargs).eval()
    return _randomized(block)


def _randomized(block: nn.Module) -> nn.Module:
    # what is initialised as zero or small shows nothing
    for name, parameter in block.named_parameters():
        if "relative_position_bias_table" in name or name.endswith("bias"):
            nn.init.normal_(parameter)
        elif "cpb_mlp" in name or "continuous_position_bias_mlp" in name:
            nn.init.normal_(parameter, std=0.3)
        elif "logit_scale" in name:
            nn.init.uniform_(parameter, 1.0, 5.0)
    return block.requires_grad_(False)


def _v2_table(mlp: nn.Module, coordinates: Tensor) -> Tensor:
    return 16 * torch.sigmoid(mlp(coordinates).flatten(0, -2))


def _v2_scale(logit_scale: Tensor) -> Tensor:
    return logit_scale.clamp(max=math.log(100.0)).exp().flatten()


MAPS = [
    pytest.param((14, 14), (7, 7), (0, 0), id="whole"),
    pytest.param((14, 14), (7, 7), (3, 3), id="shifted"),
    pytest.param((6, 15), (3, 5), (1, 2), id="non-square"),
    pytest.param((6, 15), (3, 5), (2, 4), id="shifted-furthest"),
    pytest.param((6, 15), (3, 5), (0, 2), id="shifted-right"),
    pytest.param((6, 15), (3, 5), (1, 0), id="shifted-down"),
    pytest.param((3, 15), (3, 5), (1, 2), id="one-window-high"),
    pytest.param((18, 8), (9, 8), (4, 4), id="one-window-wide"),
]


@lanes
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("size", "window", "shift"), MAPS)
def test_timm(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], version: int, lane: str, poisoned: None
) -> None:
    _check_timm(_timm(version, size, window, shift), version, size)


@lanes
@pytest.mark.parametrize("version", [1, 2])
def test_timm_with_a_shift_of_the_only_window(version: int, lane: str, poisoned: None) -> None:
    block = _timm(version, (3, 15), (3, 5), (1, 2), always_partition=True)
    assert block.shift_size == (1, 2)
    _check_timm(block, version, (3, 15))


def _check_timm(block: Any, version: int, size: tuple[int, int]) -> None:
    attn = block.attn
    x = torch.randn(2, *size, 32)
    if version == 1:
        qkv, table, scale = attn.qkv(x), attn.relative_position_bias_table, attn.scale
    else:
        qkv = F.linear(x, attn.qkv.weight, torch.cat((attn.q_bias, attn.k_bias, attn.v_bias)))
        table, scale = _v2_table(attn.cpb_mlp, attn.relative_coords_table), _v2_scale(attn.logit_scale)
    out = window_attention(qkv, 2, block.window_size, block.shift_size, table, scale)
    _close(attn.proj(out), block._attn(x))


@lanes
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(("size", "window", "shift"), MAPS)
def test_torchvision(
    size: tuple[int, int], window: tuple[int, int], shift: tuple[int, int], version: int, lane: str, poisoned: None
) -> None:
    from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

    kind = ShiftedWindowAttention if version == 1 else ShiftedWindowAttentionV2
    attn = _randomized(kind(32, list(window), list(shift), 2)).eval()
    bias, table, scale = attn.qkv.bias, None, None
    if version == 1:
        table = attn.relative_position_bias_table
    else:
        bias = torch.cat((bias[:32], torch.zeros(32), bias[64:]))
        table, scale = _v2_table(attn.cpb_mlp, attn.relative_coords_table), _v2_scale(attn.logit_scale)
    x = torch.randn(2, *size, 32)
    steps = tuple(0 if extent >= whole else step for step, extent, whole in zip(shift, window, size, strict=True))
    out = window_attention(F.linear(x, attn.qkv.weight, bias), 2, window, steps, table, scale)
    _close(attn.proj(out), attn(x))


class _Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x)


@lanes
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    ("size", "window", "shift"), [((14, 14), 7, 0), ((14, 14), 7, 3), ((6, 15), 3, 2), ((5, 15), 5, 2)], ids=str
)
def test_transformers(size: tuple[int, int], window: int, shift: int, version: int, lane: str, poisoned: None) -> None:
    from transformers import SwinConfig, Swinv2Config
    from transformers.models.swin.modeling_swin import SwinLayer
    from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

    config = (SwinConfig if version == 1 else Swinv2Config)(window_size=window, attn_implementation="eager")
    layer = _randomized((SwinLayer if version == 1 else Swinv2Layer)(config, 32, size, 2, shift_size=shift)).eval()
    # what is left of the layer: x + attention(x)
    layer.layernorm_before = nn.Identity()
    if version == 1:
        layer.mlp = _Zero()
        attn, proj = layer.attention, layer.attention.o_proj
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        table, scale = attn.relative_position_bias.relative_position_bias_table, None
    else:
        layer.layernorm_after = _Zero()
        attn, proj = layer.attention.self, layer.attention.output.dense
        projections = (attn.query, attn.key, attn.value)
        table = _v2_table(attn.continuous_position_bias_mlp, attn.relative_coords_table)
        # its mask is added twice: as good as -inf either way while the scores are small
        nn.init.constant_(attn.logit_scale, math.log(10.0))
        scale = _v2_scale(attn.logit_scale)
    x = torch.randn(2, *size, 32)
    wanted = layer(x.flatten(1, 2), size)[0].view_as(x) - x
    steps = (int(layer.shift_size),) * 2
    assert steps == ((0, 0) if size[0] == window else (shift, shift))
    qkv = torch.cat([projection(x) for projection in projections], -1)
    _close(proj(window_attention(qkv, 2, (window, window), steps, table, scale)), wanted)


@lanes
def test_the_mask_is_100_and_no_more(lane: str, poisoned: None) -> None:
    # cosines in one dimension are -1 or 1, so a key of another region can be 200 above one's own: it stays 100 above
    block = _timm(2, (6, 8), (3, 4), (1, 2))
    qkv = torch.randn(2, 6, 8, 3)
    table = torch.randn(5 * 7, 1)
    out = window_attention(qkv, 1, (3, 4), (1, 2), table, torch.tensor([100.0]))
    tokens = qkv.roll((-1, -2), (1, 2)).view(2, 2, 3, 2, 4, 3).transpose(2, 3).reshape(2, 4, 12, 3)
    q, k, v = tokens.unbind(-1)
    mask, bias = block.attn_mask, table[block.attn.relative_position_index, 0]
    scores = 100.0 * q.sign()[..., None] * k.sign()[..., None, :] + bias + mask
    foreign = scores.argmax(-1, keepdim=True).eq(torch.arange(12)) & (mask != 0)
    assert foreign.any()
    wanted = (scores.softmax(-1) @ v[..., None]).view(2, 2, 2, 3, 4, 1).transpose(2, 3).reshape(2, 6, 8, 1)
    torch.testing.assert_close(out, wanted.roll((1, 2), (1, 2)), atol=1e-4, rtol=1e-4)


@pytest.mark.interpret
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block_s", [16, 64])
def test_cosines_of_what_fp16_cannot_square(
    block_s: int, dtype: torch.dtype, poisoned: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FILE, "heuristic", lambda *args: FILE.Config(16, block_s, 1, 4, 1))
    # |q|^2 is 160000 in the first image; tokens of the second are zero and so have no direction
    q = torch.cat((torch.full((1, 3, 7, 16), 100.0), torch.zeros(1, 3, 7, 16)))
    v = torch.randn(2, 3, 7, 16)
    table = torch.zeros(5 * 13, 1, dtype=dtype)
    qkv = torch.cat((q, q, v), -1).to(dtype)
    out = window_attention(qkv, 1, (3, 7), (0, 0), table, torch.tensor([10.0]))
    mean = qkv[..., 32:].mean((1, 2), keepdim=True).expand(2, 3, 7, 16)
    torch.testing.assert_close(out, mean, atol=1e-3, rtol=1e-3)


@reference_lane
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    qkv, table = torch.randn(1, 6, 6, 96), torch.randn(25, 2)
    with torch.autocast("cpu", dtype):
        out = window_attention(qkv, 2, (3, 3), (1, 1), table)
    # the table keeps its bits
    assert torch.equal(out, window_attention(qkv.to(dtype), 2, (3, 3), (1, 1), table))
    assert out.dtype == dtype


@pytest.mark.parametrize("size", [(0, 6, 6), (2, 0, 6), (2, 6, 0)], ids=str)
def test_empty(size: tuple[int, ...], through_op: None) -> None:
    qkv = torch.randn(*size, 96, requires_grad=True)
    table = torch.randn(25, 2, requires_grad=True)
    out = window_attention(qkv, 2, (3, 3), (1, 1), table)
    assert out.shape == (*size, 32)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape
    assert torch.equal(table.grad, torch.zeros_like(table))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"qkv": torch.zeros(1, 36, 48)}, ValueError, r"'qkv' has shape \[1, 36, 48\] for 2 heads; expected \[B, H, W"),
        ({"heads": 5}, ValueError, r"'qkv' has shape \[1, 6, 6, 48\] for 5 heads; expected \[B, H, W, 3 \* heads \* d"),
        ({"heads": 0}, ValueError, r"for 0 heads; expected"),
        ({"qkv": torch.zeros(1, 6, 6, 6 * 257)}, ValueError, r"head dim 257; expected 1 to 256"),
        ({"qkv": torch.zeros(1, 6, 6, 0)}, ValueError, r"head dim 0; expected 1 to 256"),
        ({"qkv": torch.zeros(1, 7, 6, 48)}, ValueError, r"a map of height 7; expected a multiple of the window's 3"),
        ({"qkv": torch.zeros(1, 6, 5, 48)}, ValueError, r"a map of width 5; expected a multiple of the window's 2"),
        ({"window": (3, 0)}, ValueError, r"'window' is \[3, 0\]"),
        ({"window": (3,)}, ValueError, r"'window' is \[3\] and 'shift' \[1, 1\]; expected height and width"),
        ({"shift": (1, 2)}, ValueError, r"a shift of 2 in width; expected 0 to 1, less than the window"),
        ({"shift": (-1, 0)}, ValueError, r"a shift of -1 in height; expected 0 to 2, less than the window"),
        ({"table": torch.zeros(15, 3)}, ValueError, r"'table' has shape \[15, 3\]; expected \[15, 2\]"),
        ({"table": torch.zeros(14, 2)}, ValueError, r"'table' has shape \[14, 2\]; expected \[15, 2\]"),
        ({"scale": torch.zeros(3)}, ValueError, r"'scale' has shape \[3\]; expected \[2\]"),
        ({"scale": torch.zeros(2, 1, 1)}, ValueError, r"'scale' has shape \[2, 1, 1\]; expected \[2\]"),
        (
            {"table": torch.zeros(15, 2, dtype=torch.float16)},
            TypeError,
            r"'table' has dtype torch\.float16, 'qkv' torch\.float32; expected the same dtype or float32",
        ),
        ({"scale": torch.zeros(2, dtype=torch.bfloat16)}, TypeError, r"'scale' has dtype torch\.bfloat16, 'qkv'"),
        ({"qkv": torch.zeros(1, 6, 6, 48, dtype=torch.int32)}, TypeError, r"'qkv' has dtype torch\.int32; expected"),
        ({"table": torch.zeros(15, 2, device="meta")}, ValueError, r"'table' is on meta, but 'qkv' is on cpu"),
    ],
)
def test_wrong_input_is_named(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    right = {"qkv": torch.zeros(1, 6, 6, 48), "heads": 2, "window": (3, 2), "shift": (1, 1)}
    with pytest.raises(error, match=f"window_attention: .*{message}"):
        window_attention(**{**right, "table": torch.zeros(15, 2), **arguments})


@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_heuristic_is_a_valid_config(arch: int, dtype: torch.dtype) -> None:
    for windows in (1, 192, 49152):
        for n in (1, 15, 49, 64, 144, 256, 576):
            for d in (5, 32, 72, 256):
                config = FILE.heuristic(windows, n, d, dtype, arch, 132)
                for size in (config.block_m, config.block_s):
                    assert size >= 16 and size & (size - 1) == 0, config
                assert config.images == 1 or n <= config.block_s, "images share nothing but a whole window's bias"


def test_images_share_a_bias_where_there_are_enough() -> None:
    # Swin-T's first stage: 64 windows of 3 heads
    for batch, images in ((1, 1), (8, 1), (16, 2), (64, 8), (256, 8)):
        config = FILE.heuristic(batch * 64 * 3, 49, 32, torch.bfloat16, 90, 132)
        assert (config.block_s, config.images) == (64, images), batch
