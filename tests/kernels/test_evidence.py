"""The committed record of machine code is what the compiler makes, and docs/kernels.md is made of it."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import triton

import vitfast.kernels
from tests.kernels import _evidence as evidence
from tests.kernels._compiler import meta
from vitfast.kernels import _config

RECORD = evidence.load()
REGENERATE = "`python -m tests.kernels._evidence` writes both anew"
VIT_B = "vit_base_patch16_224"
DOTS = ("patch_embed", "patch_embed, uint8", "qkv", "attention", "proj", "fc1", "fc2")


@pytest.mark.compile_only
@pytest.mark.slow
def test_record_is_what_the_compiler_makes() -> None:
    record, now = copy.deepcopy(RECORD), evidence.collect()
    before, after = evidence.every_row(record), evidence.every_row(now)
    assert list(before) == list(after), REGENERATE
    worse = [f"{name}: {line}" for name in before for line in evidence.regressions(before[name], after[name])]
    assert worse == [], f"worse than {evidence.RECORD.name} says:\n" + "\n".join(worse)
    if triton.__version__ != record["triton"]:
        # another compiler may count other registers and instructions; what is to be done is the same
        for row in (*before.values(), *after.values()):
            row.pop("machine")
        now |= {"triton": record["triton"], "gelu": record["gelu"]}
    changed = evidence.differences(record, now)
    assert changed == [], f"{REGENERATE}:\n" + "\n".join(changed)


def test_page_is_made_of_the_record() -> None:
    text = evidence.PAGE.read_text(encoding="utf-8")
    assert evidence.page(text, RECORD) == text, REGENERATE
    assert evidence.dump(RECORD) == evidence.RECORD.read_text(encoding="utf-8"), REGENERATE


def test_nothing_spills_and_products_run_on_tensor_cores() -> None:
    # what a new record may not hold either
    for name, row in evidence.every_row(RECORD).items():
        machine = row["machine"]
        if machine is None:
            continue
        assert machine["spills"] == 0, name
        assert machine["blocks"] >= 1, name
        if name.partition(" b")[2].partition(" ")[2] in DOTS:
            assert machine["hgmma"] > 0, name
        if "tma" in machine["kernel"]:
            assert machine["utmaldg"] > 0 and machine["ldgsts"] == 0, name


@pytest.mark.compile_only
@pytest.mark.parametrize("batch", evidence.BATCHES)
@pytest.mark.parametrize("name", evidence.MODELS)
def test_rows_are_what_the_model_launches(name: str, batch: int) -> None:
    keys = {}
    for label, op, _, arguments in evidence.calls(name, batch):
        with evidence.counting() as launched, _config.listen() as heard, torch.inference_mode():
            getattr(vitfast.kernels, op)(**arguments)
        assert len(launched) == 1, label
        (keys[label],) = heard
    folded, unfolded = (set(evidence.forward(name, batch, form)[2]) for form in ("fold", "modules"))
    for label, key in keys.items():
        if label not in ("layer_norm", "add_layer_norm"):
            assert key in folded, label
    assert keys["layer_norm"] in unfolded
    # and nothing else is launched in a block, but the last one's fc2, whose statistics nobody reads
    extra = {key for key in folded - set(keys.values()) if key[0] != "layer_norm"}
    assert extra == {(keys["fc2"][0], keys["fc2"][1].removesuffix(",stats"))}


@pytest.mark.compile_only
def test_a_spill_and_a_lost_tensor_core_are_seen() -> None:
    label, op, _, arguments = next(call for call in evidence.calls(VIT_B, 256) if call[0] == "attention")
    row = {"op": op, "machine": RECORD["models"][VIT_B]["batches"]["256"]["rows"][label]["machine"]}
    key = "n=197,s=197,d=64,bfloat16"
    found = {}
    # 64 x 256 scores in four warps leave no register for anything else; 16 rows are too few for HGMMA
    for block_m, warps in ((64, 4), (16, 4)):
        entry = {"block_m": block_m, "block_s": 256, "num_warps": warps, "num_stages": 1}
        with _config.override("attention", key, entry):
            machine = evidence.machine(op, arguments)
        assert machine is not None and machine.config["block_m"] == block_m
        found[block_m] = " ".join(evidence.regressions(row, {"machine": dataclasses.asdict(machine)}))
    assert "spills" in found[64]
    assert "no HGMMA" in found[16]


@pytest.mark.compile_only
def test_torch_s_own_routine_is_a_row_without_machine_code() -> None:
    _, op, _, arguments = next(call for call in evidence.calls(VIT_B, 1) if call[0] == "attention")
    entry = {"block_m": 0, "block_s": 0, "num_warps": 0, "num_stages": 0, "library": True}
    with _config.override("attention", "n=197,s=197,d=64,bfloat16", entry):
        assert evidence.machine(op, arguments) is None
    record = copy.deepcopy(RECORD)
    for row in evidence.every_row(record).values():
        row["machine"] = None
    page = evidence.page(evidence.PAGE.read_text(encoding="utf-8"), record)
    assert "| attention | torch's own |" in page


@pytest.mark.compile_only
def test_committed_configs_are_what_is_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "layer_norm"
    folder.mkdir()
    text = '{"device": "%s", "configs": {"rows=197,width=768,bfloat16": {"block_m": 8, "num_warps": 8}}}'
    (folder / _config.file_name(evidence.DEVICE)).write_text(text % evidence.DEVICE)
    monkeypatch.setattr(_config, "_FOLDER", tmp_path)
    x = meta(1, 197, 768, dtype=torch.bfloat16)
    machine = evidence.machine("layer_norm", {"x": x})
    assert machine is not None and machine.tuned
    assert (machine.config, machine.threads, machine.programs) == ({"block_m": 8, "num_warps": 8}, 256, 25)


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (256, 32, 0, 8),  # 64 warps
        (32, 32, 0, 32),  # 32 blocks
        (256, 255, 0, 1),  # 8192 registers a warp, two in each quarter
        (128, 255, 0, 2),
        (256, 128, 0, 2),
        (256, 129, 0, 1),  # registers come in eights
        (1024, 64, 0, 1),
        (128, 32, 227 * 1024, 1),
        (128, 32, 75 * 1024, 3),  # the system's own kilobyte makes it 76
        (128, 32, 75 * 1024 + 1, 2),
    ],
)
def test_programs_a_multiprocessor_holds(threads: int, registers: int, shared: int, blocks: int) -> None:
    assert evidence.blocks_per_multiprocessor(threads, registers, shared) == blocks


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("spills", 8, "spills 8 bytes"),
        ("blocks", 0, "0 programs"),
        ("hgmma", 0, "no HGMMA"),
        ("utmaldg", 0, "no UTMALDG"),
        ("registers", 250, None),
        ("hgmma", 2, None),
    ],
)
def test_what_counts_as_worse(field: str, value: int, sentence: str | None) -> None:
    before = RECORD["models"][VIT_B]["batches"]["256"]["rows"]["fc1"]
    after = {**before, "machine": {**before["machine"], field: value}}
    found = evidence.regressions(before, after)
    assert len(evidence.differences(before, after)) == 1
    assert (sentence is None and found == []) or (len(found) == 1 and sentence in found[0])


def test_a_thread_s_widest_access() -> None:
    code = [("LDG", frozenset({"E", "U16"})), ("LDG", frozenset({"E"})), ("STG", frozenset({"E", "128"}))]
    assert evidence._widest(code, "LDG", "LDGSTS") == 4
    assert evidence._widest([*code, ("LDGSTS", frozenset({"E", "LTC128B", "128"}))], "LDG", "LDGSTS") == 16
    assert evidence._widest(code, "LDGSTS") == 0


# the page's arithmetic


def test_units_of_a_block() -> None:
    chains = evidence.chains(RECORD["models"][VIT_B]["sizes"], 256)
    units = {form: sum(read + written for _, read, written, _ in chain) for form, chain in chains.items()}
    assert units == {"separate": 38, "add + norm": 28, "epilogues": 26, "folded": 22.25}


@pytest.mark.parametrize("batch", evidence.BATCHES)
@pytest.mark.parametrize("name", evidence.MODELS)
def test_chains_are_the_registry_s_work(name: str, batch: int) -> None:
    size = RECORD["models"][name]["sizes"]
    rows = RECORD["models"][name]["batches"][str(batch)]["rows"]
    known = evidence.workloads(name, batch)
    vectors = 8 * 4 * size["dim"]
    for kernel, _, _, work in evidence.chains(size, batch)["folded"]:
        assert work.flops == rows[kernel]["work"]["flops"], kernel
        # beside them only what belongs to a column: bias and column sums
        assert 0 <= rows[kernel]["work"]["bytes"] - work.bytes <= vectors, kernel
    for kernel, (n, k) in evidence.gemms(size).items():
        work = evidence.gemm(batch * size["tokens"], n, k, residual=kernel in ("proj", "fc2"))
        assert work == evidence.Work(known[f"linear.{kernel}"].flops, known[f"linear.{kernel}"].bytes)
    stem, stats = (evidence.Work(**rows[label]["work"]) for label in ("patch_embed", "row_stats"))
    forwards = evidence.forwards(size, batch, stem, stats)
    # torch's own count of the model's FLOPs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evidence.registry, "reference_model", evidence.plain_model)
        flops = batch * evidence.registry.model_flops(name)
    for form in ("plain", "modules", "fold"):
        assert forwards[form][0].flops - stats.flops * (form == "fold") == pytest.approx(flops, rel=1e-9), form


def test_the_tail_saves_five_sixths_of_a_block() -> None:
    n, d = 197, 768
    whole, tail = 24 * n * d * d + 4 * n * n * d, (4 * n + 20) * d * d + 4 * n * d
    size = RECORD["models"][VIT_B]["sizes"]
    assert sum(work.flops for *_, work in evidence.chains(size, 1)["folded"]) == whole
    assert sum(work.flops for _, work in evidence.tail_chain(size, 1)) == tail
    assert round(1 - tail / whole, 3) == 0.836


def test_main_says_what_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RECORD", "PAGE"):
        path = tmp_path / getattr(evidence, name).name
        path.write_text(getattr(evidence, name).read_text(encoding="utf-8"), encoding="utf-8")
        monkeypatch.setattr(evidence, name, path)
    monkeypatch.setattr(evidence, "collect", lambda: copy.deepcopy(RECORD))
    assert evidence.main(["--check"]) == 0
    changed = copy.deepcopy(RECORD)
    changed["models"][VIT_B]["batches"]["1"]["rows"]["qkv"]["machine"]["spills"] = 16
    monkeypatch.setattr(evidence, "collect", lambda: changed)
    capsys.readouterr()
    assert evidence.main(["--check"]) == 1
    printed = capsys.readouterr().out
    assert "WORSE: ViT-B/16 b1 qkv: spills 16 bytes a thread, were 0" in printed
    assert str(evidence.RECORD) in printed and str(evidence.PAGE) in printed
    assert evidence.load() == RECORD
    assert evidence.main([]) == 0
    assert evidence.load() == changed
    assert evidence.main(["--check"]) == 0


def test_a_page_without_its_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="machine: generated"):
        evidence.page("# Kernels\n", RECORD)
