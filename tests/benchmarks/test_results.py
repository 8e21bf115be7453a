"""Results files: what goes in comes out, and what cannot be read is refused with a reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks._fake import fake_run
from vitfast.benchmarks.runner.results import SCHEMA, Row, Run, load


@pytest.fixture
def run() -> Run:
    return fake_run(models=("vit_tiny_patch16_224",), batches=(1, 8))


def test_what_is_saved_is_what_is_loaded(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.json"
    run.save(path)
    again = load(path)
    assert again.rows == run.rows
    assert again.environment == run.environment
    assert again.ceilings == run.ceilings
    assert [p.name for p in path.parent.iterdir()] == ["run.json"]


def test_saving_twice_keeps_the_old_file_until_the_new_one_is_whole(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    run.save(path)
    before = path.read_text()
    run.environment["broken"] = object()
    with pytest.raises(TypeError):
        run.save(path)
    assert path.read_text() == before


@pytest.mark.parametrize("schema", [None, 0, SCHEMA + 1, str(SCHEMA)])
def test_another_schema_is_refused_by_its_name(run: Run, tmp_path: Path, schema: object) -> None:
    path = tmp_path / "run.json"
    run.save(path)
    content = json.loads(path.read_text())
    content["schema"] = schema
    path.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=rf"run\.json: results of schema {schema!r}; this version reads schema {SCHEMA}"
    ):
        load(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '"text"', b"\xff\xfe\x00"], ids=str)
def test_what_is_no_results_file_is_refused(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=r"run\.json"):
        load(path)


@pytest.mark.parametrize("damage", ["rows", "environment", "field", "unknown field"])
def test_a_damaged_file_is_refused(run: Run, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "run.json"
    run.save(path)
    content = json.loads(path.read_text())
    if damage in content:
        del content[damage]
    elif damage == "field":
        del content["rows"][0]["candidate"]
    else:
        content["rows"][0]["surprise"] = 1
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="damaged results file"):
        load(path)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("layer", "kernels", r"layer is 'kernels'; expected one of kernel, block"),
        ("status", "fine", r"status is 'fine'; expected one of ok, missing"),
        ("ms", "fast", r"ms is 'fast'; expected a positive number or null"),
        ("ms", 0, r"ms is 0; expected a positive number"),
        ("ms_p20", True, r"ms_p20 is True"),
        ("error", float("nan"), r"error is nan"),
        ("flops", None, r"flops is None; expected a number"),
        ("samples", 2.5, r"samples is 2.5; expected a positive integer"),
        ("shape", [1, 2], r"shape is \[1, 2\]; expected an object"),
        ("shape", {"batch": "8"}, r"shape is \{'batch': '8'\}; expected an object of positive integers"),
        ("candidate", 7, r"candidate is 7; expected a text"),
        ("telemetry", {"power.draw": 1.5}, r"telemetry is .*; expected an object of texts"),
        ("status", "missing", r"ms is .*; expected null where the status is 'missing'"),
    ],
)
def test_a_wrong_value_is_named_with_its_row_and_field(
    run: Run, tmp_path: Path, field: str, value: object, said: str
) -> None:
    path = tmp_path / "run.json"
    run.save(path)
    content = json.loads(path.read_text())
    position = next(i for i, row in enumerate(content["rows"]) if row["ms"] is not None and i > 2)
    content["rows"][position][field] = value
    path.write_text(json.dumps(content))
    workload, name = (content["rows"][position][key] for key in ("workload", "candidate"))
    with pytest.raises(ValueError, match=rf"run\.json: damaged .*: row {position} \(.*\): {said}") as caught:
        load(path)
    assert f"({workload}, {name})" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"rows": {}}, "rows is {}; expected a list"),
        ({"rows": ["row"]}, "row 0 is 'row'; expected an object"),
        ({"environment": None}, "environment is None; expected an object"),
        ({"ceilings": {"copy_gb_s": -1.0, "gemm_tflop_s": {}}}, "ceilings: copy_gb_s is -1.0; expected a positive"),
        ({"ceilings": {"copy_gb_s": 1.0}}, "ceilings: gemm_tflop_s is missing"),
        ({"more": 1}, "more is unknown; expected ceilings, environment, rows, schema"),
    ],
)
def test_what_else_is_wrong_is_named(content: dict[str, object], said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"schema": SCHEMA, "environment": {}, "ceilings": None, "rows": [], **content}))
    with pytest.raises(ValueError) as caught:
        load(path)
    assert f"damaged results file: {said}" in str(caught.value)


def test_no_file_is_no_results_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.json")


def test_a_row_of_the_same_key_is_replaced(run: Run) -> None:
    old = run.rows[0]
    new = Row(old.layer, old.workload, old.shape, old.dtype, old.candidate, "error", note="later")
    run.add([new])
    assert run.find(old.key) is new
    assert len({row.key for row in run.rows}) == len(run.rows)


def test_what_a_row_derives() -> None:
    row = Row("model", "m", {"batch": 4}, "bf16", "c", "ok", flops=2e12, bytes=3e9, ms=20.0, floor_ms=5.0)
    assert row.images_per_s == pytest.approx(200.0)
    assert row.tflop_s == pytest.approx(100.0)
    assert row.gb_s == pytest.approx(150.0)
    assert row.floor_share == pytest.approx(0.25)
    unmeasured = Row("model", "m", {"batch": 4}, "bf16", "c", "missing")
    assert (unmeasured.images_per_s, unmeasured.tflop_s, unmeasured.gb_s, unmeasured.floor_share) == (None,) * 4
    assert Row("kernel", "k", {"rows": 4}, "bf16", "c", "ok", ms=1.0).images_per_s is None
