"""The committed record of machine code is what the compiler makes, and docs/kernels.md shows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

import vitfast
from tests.kernels import _evidence as evidence
from tests.kernels._compiler import compiling, meta
from tests.kernels._data import FILES
from vitfast.kernels import _config

RECORD = evidence.load()
ROWS = {(batch, label): row for batch, rows in RECORD["batches"].items() for label, row in rows.items()}
REGENERATE = "`python -m tests.kernels._evidence` writes both anew"
# rows whose products belong on the tensor cores
DOTS = ("patch_embed", "patch_embed, uint8", "qkv", "attention", "proj", "fc1", "fc2")


@pytest.mark.compile_only
@pytest.mark.slow
def test_record_is_what_the_compiler_makes() -> None:
    now = evidence.collect()
    made = {(batch, label): row for batch, rows in now["batches"].items() for label, row in rows.items()}
    if triton.__version__ == RECORD["triton"]:
        assert made == ROWS, REGENERATE
    # another compiler may count other registers and instructions; none may spill or lose those that matter
    for at, row in made.items():
        assert (row["key"], row["config"]) == (ROWS[at]["key"], ROWS[at]["config"]), at
        check(at[1], row)


def check(label: str, row: dict[str, Any]) -> None:
    """What no record may hold."""
    if "kernel" not in row:
        return
    assert row["spills"] == 0, row
    assert row["hgmma"] > 0 or label not in DOTS, row
    if "tma" in row["kernel"]:
        assert row["utmaldg"] > 0 and row["ldgsts"] == 0, row


def test_record_and_page() -> None:
    for (_, label), row in ROWS.items():
        check(label, row)
    text = evidence.PAGE.read_text(encoding="utf-8")
    assert evidence.page(text, RECORD) == text, REGENERATE
    assert evidence.dump(RECORD) == evidence.RECORD.read_text(encoding="utf-8"), REGENERATE


@pytest.mark.compile_only
@pytest.mark.parametrize("batch", evidence.BATCHES)
def test_rows_are_what_the_model_launches(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        model = vitfast.create_model("vit_base_patch16_224").eval().to(torch.bfloat16)
    vitfast.accelerate(model, frozen=True, normalize=([0.5] * 3, [0.5] * 3))
    # they ask for a CUDA tensor
    for room in ("block", "model"):
        monkeypatch.setattr(f"vitfast.layers.{room}.deriving", lambda x: True)
    with (
        compiling(evidence.TARGET, monkeypatch, *FILES),
        _config.listen() as heard,
        torch.inference_mode(),
        monkeypatch.context() as patch,
    ):
        # neither compiled nor run
        patch.setattr(JITFunction, "__getitem__", lambda kernel, grid: lambda **arguments: None)
        model(meta(batch, 3, 224, 224, dtype=torch.bfloat16))
        model(meta(batch, 3, 224, 224, dtype=torch.uint8).contiguous(memory_format=torch.channels_last))
    launched = {str(key) for key in heard}
    recorded = {row["key"] for (b, label), row in ROWS.items() if b == str(batch) and "layer_norm" not in label}
    assert recorded <= launched
