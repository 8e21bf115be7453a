"""Reports of a run that nobody measured: nothing is lost, nothing is made up, and any run can be shown."""

from __future__ import annotations

import csv
import functools
import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.benchmarks._fake import FAKE_CPU, FAKE_GPU, environment, fake_run
from vitfast.benchmarks.report import axes, charts, docs_pages, page, rows, targets
from vitfast.benchmarks.report.markdown import markdown
from vitfast.benchmarks.report.timm_csv import model_sizes, timm_csvs
from vitfast.benchmarks.runner.results import Row, Run
from vitfast.clock.ceilings import Ceilings

ROOT = Path(__file__).resolve().parents[2]

VOID = {"meta", "br"}

ONE = ("vit_tiny_patch16_224",)

RUNS = {
    "everything": lambda: fake_run(models=("vit_base_patch16_224", "vit_large_patch16_224"), batches=(1, 8, 256)),
    "one batch": lambda: fake_run(models=ONE, batches=(8,)),
    "kernels only": lambda: fake_run(layers=("kernel",), models=ONE, batches=(1, 8)),
    "training only": lambda: fake_run(layers=("train",), models=ONE, batches=(1, 8)),
    "blocks and files": lambda: fake_run(layers=("block", "end_to_end"), models=ONE, batches=(8,)),
    "CPU": lambda: fake_run(cpu=True, dtype="fp32", models=ONE, batches=(1, 8)),
    "no ceilings": lambda: _without_ceilings(fake_run(models=ONE, batches=(1, 8))),
    "ceilings of another dtype": lambda: _without_ceilings(
        fake_run(models=ONE, batches=(8,)), Ceilings(1.0, {"fp16": 1.0})
    ),
    "peers only": lambda: _only(fake_run(models=ONE, batches=(8,)), lambda row: not targets.is_ours(row.candidate)),
    "vitfast only": lambda: _only(fake_run(models=ONE, batches=(8,)), lambda row: targets.is_ours(row.candidate)),
    "nothing timed": lambda: _only(fake_run(batches=(1, 8)), lambda row: row.ms is None),
    "no rows": lambda: Run(environment()),
    "bare environment": lambda: Run({}, None, fake_run(models=ONE, batches=(1,)).rows),
    "one timed row": lambda: Run(environment(), None, [_bare()]),
}


def _without_ceilings(run: Run, ceilings: Ceilings | None = None) -> Run:
    rows = [replace(row, floor_ms=None) for row in run.rows]
    return Run(run.environment, ceilings, rows)


def _only(run: Run, keep) -> Run:
    return Run(run.environment, run.ceilings, [row for row in run.rows if keep(row)])


def _bare() -> Row:
    """A timed row with every optional field left out."""
    return Row("model", "a model that this version does not know", {}, "bf16", "somebody", "ok", ms=1.0)


@functools.cache
def page_of(name: str) -> str:
    return page.html(RUNS[name]())


@pytest.fixture(params=RUNS, ids=list(RUNS))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def run(name: str) -> Run:
    return RUNS[name]()


class Page(HTMLParser):
    """Checks nesting, and keeps attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def _svgs(text: str) -> Iterator[ET.Element]:
    for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        yield ET.fromstring(found)


def _markdown_tables(text: str) -> list[list[list[str]]]:
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            tables[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


# --- any run


def test_any_run_is_a_page_that_is_whole_and_asks_nobody_for_anything(name: str, run: Run) -> None:
    text = page_of(name)
    page = Page(text)
    assert {"script", "link", "img", "iframe"}.isdisjoint(page.tags)
    ids = [value for _, attribute, value in page.attributes if attribute == "id"]
    for tag, attribute, value in page.attributes:
        assert attribute not in ("src", "srcset", "action") and not attribute.startswith("on"), (tag, attribute)
        if attribute in ("href", "xlink:href"):
            assert value[0] == "#" and value[1:] in ids
    assert "@import" not in text
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{value}" for value in ids}
    names = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert set(re.findall(r"https?://[^\"'\s<]*", text)) <= names
    assert not re.search(r"\b(nan|None|inf)\b", page.text)
    for svg in _svgs(text):
        assert svg.get("role") == "img" and svg.get("aria-label")
        assert float(svg.get("viewBox", "").split()[2]) == 288.0, "narrow enough for a phone"
        # colours are the page's, light or dark
        drawn = ET.tostring(svg, "unicode")
        assert "var(--" in drawn and not re.search("#[0-9a-f]{6}", drawn)


def test_markdown_tables_have_equal_lines_and_every_row_is_there(run: Run) -> None:
    text = markdown(run)
    tables = _markdown_tables(text)
    for table in tables:
        assert len({len(line) for line in table}) == 1, table[0]
    # by heading rather than by content: every timed row is a line of some table
    lines = sum(len(t) - 2 for t in tables if "candidate" in t[0] and "status" not in t[0])
    assert lines == len(run.rows)
    assert "None" not in text and "nan" not in text


def test_everything_is_written_and_nothing_else(tmp_path: Path) -> None:
    written = page.write(RUNS["training only"](), tmp_path / "new" / "folder")
    assert written[0].name == "index.html"
    assert sorted(written) == sorted(path for path in tmp_path.rglob("*") if path.is_file())


def test_every_chart_is_a_file_of_its_own_too() -> None:
    found = charts.figures(RUNS["everything"]())
    assert list(found) == ["throughput", "ladder", "memory", "roofline", "error"]
    for figure in found.values():
        assert figure.caption
        text = axes.standalone(figure.svg)
        assert ET.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "prefers-color-scheme: dark" in text


def test_a_chart_says_what_its_rows_say() -> None:
    run = fake_run(layers=("model",), models=("vit_base_patch16_224",), batches=(8,))
    drawn = "".join(ET.fromstring(charts.ladder(run.rows).svg).itertext())
    for row in run.rows:
        assert row.candidate in drawn
        assert (rows.number(row.images_per_s) if row.ms else row.status) in drawn


# --- what is shown


def test_sections_are_those_that_the_run_has_rows_for() -> None:
    def headings(name: str) -> set[str]:
        return set(re.findall(r'<section id="([^"]+)"', page_of(name)))

    everything = {"targets", "summary", "throughput", "ladder", "roofline", "kernels", "memory", "error"}
    everything |= {"rows-model", "rows-train", "failures", "method"}
    assert headings("everything") == everything
    assert headings("one batch") == everything - {"throughput"}
    assert headings("kernels only") == {"targets", "roofline", "kernels", "error", "failures", "method"}
    assert headings("CPU") == everything - {"targets", "memory"}
    assert headings("no ceilings") == everything - {"roofline"}
    assert headings("no rows") == {"targets", "method"}


def test_what_was_not_timed_is_listed_with_its_reason() -> None:
    run = RUNS["everything"]()
    reasons = {(row.status, row.note) for row in run.rows if row.status != "ok"}
    assert {status for status, _ in reasons} == {"missing", "out of memory", "failed parity", "error"}
    shown = Page(page_of("everything"))
    text = markdown(run)
    for status, note in reasons:
        assert note in shown.text
        assert f"| {status} |" in text
        assert note.replace("<", r"\<").replace(">", r"\>").replace("|", r"\|") in text


def test_names_and_notes_are_escaped() -> None:
    run = fake_run(cpu=True, dtype="fp32", batches=(1,))
    text = page.html(run)
    assert "<script" not in text and "<b>|" not in text
    assert FAKE_CPU in Page(text).text
    assert "<script" not in markdown(run).replace(r"\<script", "")


def test_ratios_are_over_the_fastest_compiled_peer_and_torch_eager() -> None:
    shape = {"batch": 10}
    times = {"torch eager": 40.0, "timm eager": 15.0, "torch compiled": 30.0, "OpenVINO": 20.0, "vitfast +block": 10.0}
    timed = [Row("model", "m", shape, "bf16", name, "ok", flops=1e12, ms=ms) for name, ms in times.items()]
    run = Run(environment(), Ceilings(1.0, {"bf16": 200.0}), timed)
    table = next(t for t in _markdown_tables(markdown(run)) if "candidate" in t[0])
    columns = {name: [line[i].strip("*") for line in table[2:]] for i, name in enumerate(table[0])}
    assert columns["candidate"] == ["torch eager", "torch compiled", "timm eager", "OpenVINO", "vitfast +block"]
    assert columns["× peer"] == ["0.50×", "0.67×", "1.33×", "1.00×", "2.00×"]
    assert columns["× eager"] == ["1.00×", "1.33×", "2.67×", "2.00×", "4.00×"]
    assert columns["img/s"] == ["250", "333", "667", "500", "1,000"]
    # 1e12 operations in 10 ms are 100 TFLOP/s, half of the ceiling
    assert columns["MFU"] == ["12.5 %", "16.7 %", "33.3 %", "25.0 %", "50.0 %"]
    assert rows.mfu(timed[-1], run) == pytest.approx(0.5)
    assert [line for line in table[2:] if line[0].startswith("**")] == [table[-1]], "the fastest stands out"


def test_the_headline_is_the_known_model_at_the_largest_batch_that_both_were_timed_at() -> None:
    run = fake_run()
    lead = rows.headline(run)
    assert lead is not None
    assert (lead[0].workload, lead[0].shape["batch"]) == ("vit_base_patch16_224", 256)
    run.rows = [r for r in run.rows if r.shape.get("batch") != 256 or not targets.is_ours(r.candidate)]
    lead = rows.headline(run)
    assert lead is not None
    assert lead[0].shape["batch"] == 128


def test_each_candidate_in_one_chart_looks_different() -> None:
    """Colour and dash together, for all names that can meet in one workload."""
    from tests.benchmarks._fake import CANDIDATES, KERNEL_CANDIDATES

    for names in (CANDIDATES, *KERNEL_CANDIDATES.values()):
        peers = [name for name in names if not targets.is_ours(name)]
        for colour in {axes.family(name) for name in peers}:
            assert sum(axes.family(name) == colour for name in peers) <= len(axes.DASHES)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.05578, "0.0558"),
        (1.0, "1.00"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.6, "12,346"),
        (1e-7, "1.00e-07"),
    ],
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert rows.number(value) == text


# --- timm's files


def test_timm_columns_and_names_are_timms_own() -> None:
    files = timm_csvs(fake_run())
    name = "benchmark-infer-bf16-nchw-pt2110-cu130-fake-h100-not-a-device-vitfast-compile-graph.csv"
    lines = list(csv.reader(io.StringIO(files[name])))
    # the first line of timm's results/benchmark-infer-bf16-nchw-pt291-cu130-pro6000maxq-dynamo.csv
    header = "model,infer_img_size,infer_samples_per_sec,infer_step_time,infer_batch_size"
    assert lines[0] == f"{header},param_count,infer_gmacs,infer_macts".split(",")
    speeds = [float(line[2]) for line in lines[1:]]
    assert speeds == sorted(speeds, reverse=True)
    train = "benchmark-train-bf16-nchw-pt2110-cu130-fake-h100-not-a-device-timm-compiled.csv"
    # the first line of timm's results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv
    assert files[train].splitlines()[0] == (
        "model,train_samples_per_sec,train_step_time,train_batch_size,train_img_size,param_count"
    )
    assert not any("onnx" in name for name in files), "who was not timed has no file"


def test_timm_values_are_those_of_the_rows() -> None:
    shape = {"batch": 8, "height": 224, "width": 224}
    row = Row("model", "vit_tiny_patch16_224", shape, "bf16", "torch eager", "ok", flops=8 * 2.5e9, ms=4.0)
    (text,) = timm_csvs(Run(environment(), None, [row])).values()
    # parameters and activations as in timm's published files
    assert text.splitlines()[1] == "vit_tiny_patch16_224,224,2000.0,4.0,8,5.72,1.25,5.97"


@pytest.mark.parametrize(
    ("model", "parameters", "activations"),
    [
        ("vit_tiny_patch16_224", 5.72, 5.97),
        ("vit_base_patch32_224", 88.22, 5.01),
        ("vit_base_patch16_224", 86.57, 23.9),
    ],
)
def test_sizes_agree_with_timms_published_files(model: str, parameters: float, activations: float) -> None:
    found = model_sizes(model)
    assert found == pytest.approx((parameters, activations), abs=0.006)


def test_an_unknown_model_has_no_sizes() -> None:
    row = replace(_bare(), shape={"batch": 2}, flops=4e9)
    (text,) = timm_csvs(Run(environment(), None, [row])).values()
    assert text.splitlines()[1] == "a model that this version does not know,,2000.0,1.0,2,,1.0,"


@pytest.mark.parametrize(
    ("device", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia-h100-80gb-hbm3"),
        ("Intel(R) Xeon(R) Platinum 0000 CPU @ 2.00GHz, 2 threads", "intel-xeon-platinum-0000-2-threads"),
        ("AMD EPYC 0000 64-Core Processor, 8 threads", "amd-epyc-0000-64-core-8-threads"),
        ("../../etc", "etc"),
        ("", "unknown-device"),
    ],
)
def test_device_slugs(device: str, slug: str) -> None:
    assert rows.device_slug({"device": device}) == slug


# --- targets


def _h100(rows: list[Row]) -> Run:
    return Run(environment(), None, rows)


def test_targets_stand_beside_what_was_measured() -> None:
    shape = {"batch": 256}
    peer = Row("model", "vit_base_patch16_224", shape, "bf16", "torch compiled", "ok", ms=256 / 10.0)
    ours = replace(peer, candidate="vitfast +block", ms=256 / 17.0)
    found = {(s.target.model, s.target.kind): s for s in targets.standings(_h100([peer, ours]))}
    speed = found["vit_base_patch16_224", "img/s"]
    assert (speed.measured, speed.met) == (pytest.approx(17_000), True)
    ratio = found["vit_base_patch16_224", "x"]
    assert (ratio.measured, ratio.met, ratio.against) == (pytest.approx(1.7), True, "torch compiled")
    assert found["vit_base_patch16_224", "ms"].met is None
    assert found["vit_large_patch16_224", "img/s"].measured is None
    slower = replace(ours, ms=256 / 13.0)
    found = {(s.target.model, s.target.kind): s for s in targets.standings(_h100([peer, slower]))}
    assert found["vit_base_patch16_224", "img/s"].met is False
    assert found["vit_base_patch16_224", "x"].met is False
    alone = {(s.target.model, s.target.kind): s for s in targets.standings(_h100([ours]))}
    assert alone["vit_base_patch16_224", "x"].met is None, "no peer, no ratio"


def test_a_latency_target_is_met_from_below() -> None:
    row = Row("model", "vit_base_patch16_224", {"batch": 1}, "bf16", "vitfast +graph", "ok", ms=0.39)
    (met,) = (s.met for s in targets.standings(_h100([row])) if s.target.kind == "ms")
    (missed,) = (s.met for s in targets.standings(_h100([replace(row, ms=0.41)])) if s.target.kind == "ms")
    assert (met, missed) == (True, False)


def test_every_target_is_in_its_source() -> None:
    for target in targets.TARGETS["H100"]:
        text = f"{target.value:,.0f}" if target.kind == "img/s" else f"{target.value:.2f}"
        assert text in targets.SOURCE


@pytest.mark.parametrize(
    ("device", "has"),
    [
        ("NVIDIA H100 80GB HBM3", True),
        (FAKE_GPU, True),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", False),
        ("NVIDIA H200", False),
        ("NVIDIA GH200 480GB", False),
        ("", False),
    ],
)
def test_targets_are_for_their_device(device: str, has: bool) -> None:
    assert bool(targets.targets_of(device)) is has


# --- pages of the docs


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for folder, name, run in (
        ("fake-gpu", "a-headline", fake_run(models=ONE, layers=("model",), batches=(1, 8))),
        ("fake-gpu", "b-kernels", fake_run(models=ONE, layers=("kernel",), batches=(1, 8))),
        ("fake-cpu", "quick", fake_run(cpu=True, dtype="fp32", models=ONE, batches=(1,))),
    ):
        run.save(tmp_path / "benchmarks" / "results" / folder / f"{name}.json")
    return tmp_path


def test_pages_are_written_checked_and_removed_with_their_results(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    svg = "<svg viewBox='0 0 1 1'>".replace("'", '"') + "<text>a chart</text></svg>"
    monkeypatch.setattr(docs_pages, "figures", lambda run: {"chart": charts.Figure(svg, "A chart.")})
    folder = repository / "docs" / "results"
    assert docs_pages.main(["--root", str(repository), "--check"]) == 1
    assert docs_pages.main(["--root", str(repository)]) == 0
    assert docs_pages.main(["--root", str(repository), "--check"]) == 0
    assert docs_pages.write(repository) == []
    assert {path.name for path in folder.glob("*.md")} == {"index.md", "fake-gpu.md", "fake-cpu.md"}
    text = (folder / "fake-gpu.md").read_text()
    (folder / "fake-gpu.md").write_text(text.replace("1", "2", 1))
    assert docs_pages.stale(repository, docs_pages.pages(repository)) == [folder / "fake-gpu.md"]
    docs_pages.write(repository)
    assert (folder / "fake-gpu.md").read_text() == text
    (repository / "benchmarks" / "results" / "fake-cpu" / "quick.json").unlink()
    assert folder / "fake-cpu.md" in docs_pages.stale(repository, docs_pages.pages(repository))
    docs_pages.write(repository)
    assert not (folder / "fake-cpu.md").exists()
    assert "fake-cpu" not in (folder / "index.md").read_text()


def test_links_and_pictures_of_pages_are_there(repository: Path) -> None:
    docs_pages.write(repository)
    folder = repository / "docs" / "results"
    links = 0
    for file in folder.glob("*.md"):
        for link in re.findall(r"(?<!\\)\]\(([^)]+)\)", file.read_text()):
            links += 1
            assert (file.parent / link).resolve().is_file(), link
    assert links > 8
    for picture in folder.rglob("*.svg"):
        ET.parse(picture)


def test_a_results_file_of_another_schema_stops_the_pages(repository: Path) -> None:
    (repository / "benchmarks" / "results" / "fake-gpu" / "old.json").write_text('{"schema": 0}')
    with pytest.raises(ValueError, match=r"old\.json: results of schema 0"):
        docs_pages.pages(repository)


def test_the_root_must_be_a_repository(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        docs_pages.main(["--root", str(tmp_path)])
    assert "--root" in capsys.readouterr().err


def test_committed_pages_are_what_the_committed_results_give() -> None:
    stale = [path.relative_to(ROOT) for path in docs_pages.stale(ROOT, docs_pages.pages(ROOT))]
    assert stale == [], "run python -m vitfast.benchmarks.report.docs_pages"
