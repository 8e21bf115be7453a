"""The demo on tiny models: what it measures, what the page says, and what it does with odd pictures."""

from __future__ import annotations

import importlib.util
import math
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

import vitfast
from vitfast import kernels
from vitfast.cli.main import main
from vitfast.demo import run
from vitfast.demo.interpret import Interpreted, interpret_in_child
from vitfast.demo.result import how_rough
from vitfast.demo.run import run_demo
from vitfast.demo.throughput import Throughput, measure
from vitfast.images.photo import load_image, sample_image
from vitfast.images.view import look
from vitfast.proof.parity import parity
from vitfast.proof.subjects import build_model, seed_weights
from vitfast.reference.architectures import ARCHITECTURES

TINY = {
    **ARCHITECTURES["vit_tiny_patch16_224"],
    "img_size": 32,
    "patch_size": 8,
    "depth": 2,
    "embed_dim": 24,
    "num_heads": 3,
    "num_classes": 7,
}
VOID = {"meta", "img", "br"}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "vit_test", TINY)


@pytest.fixture
def photo(tmp_path):
    """A picture with structure: a bright square on a gradient."""
    y, x = np.mgrid[0:90, 0:120]
    pixels = np.stack([x, y, x + y], axis=-1).astype(np.uint8)
    pixels[20:50, 30:60] = (250, 240, 60)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def small_demo(photo, tmp_path, **options):
    options = {"model": "vit_test", "seconds": 0.05, "device": "cpu", "interpret": False, **options}
    return run_demo(image=photo, out=tmp_path / "out", **options)


class Page(HTMLParser):
    """The page's text, tags and attributes; fails on tags that do not close."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        if "style" not in self.open:
            self.words.append(data)


def test_the_result_is_what_the_functions_say(photo, tmp_path) -> None:
    steps: list[str] = []
    result = small_demo(photo, tmp_path, precision="bf16", batch=3, seed=4, log=steps.append)
    assert len(steps) == 4
    assert result.ok
    assert result.seeded
    assert "seed 4" in result.weights
    model = build_model("vit_test", seed=4)
    pixels, _ = look(load_image(photo), vitfast.image_spec(model))
    assert result.parity == parity(model, pixels, "bf16")
    assert len(result.report.replaced) == len(result.parity.modules)
    assert result.report.precision == "bf16"
    assert result.plain.batch == result.fused.batch == 3
    assert len(result.ratios) == len(result.plain.seconds) >= 3

    assert result.top is not None
    assert len(result.top) == 5
    with torch.inference_mode():
        best = model.bfloat16()(pixels.bfloat16()).double().softmax(-1)[0]
    assert result.top[0][0] == int(best.argmax())
    assert result.top[0][1] == pytest.approx(best.max().item(), rel=1e-6)
    text = str(result)
    assert f"{result.parity}" in text
    assert f"{result.plain.rate():.4g} img/s" in text
    assert "No fused kernel ran" in text


def test_the_page_is_whole_and_has_the_numbers(photo, tmp_path) -> None:
    result = small_demo(photo, tmp_path)
    source = result.files["page"].read_text(encoding="utf-8")
    page = Page(source)
    assert "Same answer, with 13 modules replaced" in page.text
    assert "No fused kernel ran" in page.text
    assert "seeded random weights, seed 0" in page.text
    out = result.parity.output
    for value in (out.worst, out.worst_limit, out.relative):
        mantissa = f"{value / 10 ** math.floor(math.log10(value)):.2f}"
        assert mantissa in page.text
    assert f"{out.cosine:.8f}" in page.text
    assert result.top is not None
    assert f"same top-1 yes class {result.top[0][0]}," in page.text
    assert f"{result.plain.rate():.4g} img/s" in page.text
    assert f"{result.fused.rate():.4g} img/s" in page.text
    assert f"{result.ratio():.2f}" in page.text
    assert result.command in page.text
    for row in result.report.replaced:
        assert row.original in page.text
        assert str(row.fused) in page.text
    for index, probability, _ in result.top or ():
        assert f"{index} {100 * probability:.3f}" in page.text.replace("\xa0", " ")
    assert torch.__version__ in page.text

    # nothing is fetched, everything is described
    assert "http" not in source
    assert "url(" not in source
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 2 + TINY["depth"]
    assert all(p["src"].startswith("data:image/jpeg;base64,") and p["alt"] for p in pictures)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    assert "prefers-color-scheme: dark" in source


def test_pictures_show_the_rollout(photo, tmp_path) -> None:
    result = small_demo(photo, tmp_path)
    drawn = np.asarray(Image.open(result.files["overlay"]), dtype=float)
    assert drawn.shape == (64, 64, 3)
    model = build_model("vit_test")
    pixels, view = look(load_image(photo), vitfast.image_spec(model))
    flow = vitfast.rollout(vitfast.attention_maps(model, pixels))[0]
    # the overlay less the photograph's share is the colour, whose red grows with the map
    colour = drawn - 0.4 * np.asarray(view, dtype=float)
    red = np.array(
        [[colour[16 * i + 6 : 16 * i + 10, 16 * j + 6 : 16 * j + 10, 0].mean() for j in range(4)] for i in range(4)]
    )
    order = np.corrcoef(red.ravel(), flow.numpy().ravel())[0, 1]
    assert order > 0.95
    strip = Image.open(result.files["layers"])
    assert strip.size == (2 * 144 + 4, 144)


def test_names_are_escaped(photo, tmp_path) -> None:
    evil = tmp_path / '<script>alert("&")<'
    evil.mkdir()
    file = evil / "script>.png"
    file.write_bytes(photo.read_bytes())
    source = small_demo(file, tmp_path).files["page"].read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in {tag for tag, _ in page.tags}
    assert '<script>alert("&")</script>.png' in page.text


def test_a_wrong_kernel_is_on_the_page_and_in_the_status(photo, tmp_path, monkeypatch, capsys) -> None:
    right = kernels.attention_qkv
    monkeypatch.setattr(kernels, "attention_qkv", lambda *args, **kwargs: right(*args, **kwargs) * 1.01)
    monkeypatch.setattr(run, "interpret_in_child", lambda: Interpreted(True, 1, 0.0, 1.0))
    argv = ["demo", "--model", "vit_test", "--image", str(photo), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main([*argv, "--seconds", "0.05"]) == 1
    captured = capsys.readouterr()
    assert "the rule is broken" in captured.out
    assert "measuring throughput" in captured.err
    page = Page((tmp_path / "out" / "index.html").read_text(encoding="utf-8"))
    assert "Not the same answer" in page.text
    assert "broken" in page.text


def test_weights_from_a_file(photo, tmp_path) -> None:
    file = tmp_path / "tiny.pth"
    torch.save(seed_weights(vitfast.create_model("vit_test"), seed=9).state_dict(), file)
    result = small_demo(photo, tmp_path, weights=file)
    assert not result.seeded
    text = Page(result.files["page"].read_text(encoding="utf-8")).text
    assert str(file) in text
    assert "random" not in text
    assert f"--weights {file}" in result.command


def test_a_model_without_classes_or_class_token(photo, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(
        ARCHITECTURES, "vit_test", {**TINY, "num_classes": 0, "class_token": False, "global_pool": "map"}
    )
    result = small_demo(photo, tmp_path)
    assert result.top is None
    text = Page(result.files["page"].read_text(encoding="utf-8")).text
    assert "likeliest" not in text
    assert "patches look on average" in text
    # the pooling's attention is left alone, and the page says why
    assert "AttentionPool" in text
    assert next(row for row in result.report.kept if row.original == "AttentionPool").note in text


def test_the_page_says_how_images_are_prepared(photo, tmp_path) -> None:
    text = Page(small_demo(photo, tmp_path).files["page"].read_text(encoding="utf-8")).text
    assert "Images become 32 x 32 pixels by ResizeCrop(size=(32, 32), crop_pct=0.9, crop_mode='center'" in text
    assert "with mean 0.5/0.5/0.5 and standard deviation 0.5/0.5/0.5" in text


@pytest.mark.parametrize("size", [(32, 48), (48, 32)])
def test_images_of_any_shape(size, photo, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, "vit_test", {**TINY, "img_size": size})
    result = small_demo(photo, tmp_path)
    assert Image.open(result.files["overlay"]).size == (2 * size[1], 2 * size[0])


@pytest.mark.parametrize("kind", ["text", "truncated", "empty", "folder", "missing"])
def test_what_is_no_picture_is_one_line_with_the_file_and_the_formats(kind, tmp_path, capsys, photo) -> None:
    file = tmp_path / "odd.png"
    if kind == "folder":
        file.mkdir()
    elif kind != "missing":
        whole = photo.read_bytes()
        file.write_bytes({"text": b"not a picture", "truncated": whole[: len(whole) // 2], "empty": b""}[kind])
    status = main(["demo", "--model", "vit_test", "--image", str(file), "--out", str(tmp_path / "out")])
    err = capsys.readouterr().err
    assert status == 2
    assert err.startswith("vitfast: error: ")
    assert err.count("\n") == 1
    assert str(file) in err
    assert "JPEG, PNG" in err or kind in ("folder", "missing")
    assert not (tmp_path / "out").exists()


def test_without_matplotlib_the_error_says_what_to_do(monkeypatch, tmp_path) -> None:
    assert Image.open(sample_image()).size == (512, 600)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install matplotlib, or give --image"):
        run_demo(model="vit_test", out=tmp_path)


def test_an_output_folder_that_is_a_file_is_refused(photo, tmp_path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="expected a folder"):
        small_demo(photo, tmp_path)


def test_throughput_is_taken_in_turns_after_a_warm_up() -> None:
    calls: list[str] = []

    def model(name: str):
        return lambda pixels: calls.append(name)

    plain, fused, ratios = measure(model("p"), model("f"), torch.zeros(5, 1), seconds=1e-9)
    assert "".join(calls) == "pf" + "pf" + "fp" + "pf"
    assert (plain.batch, len(plain.seconds), len(fused.seconds), len(ratios)) == (5, 3, 3, 3)
    assert ratios == tuple(p / f for p, f in zip(plain.seconds, fused.seconds, strict=True))


def test_few_rounds_are_said_to_be_rough(photo, tmp_path) -> None:
    result = small_demo(photo, tmp_path, seconds=1e-9)
    said = "Only 3 rounds fit into the time"
    assert said in str(result)
    assert said in Page(result.files["page"].read_text(encoding="utf-8")).text
    assert how_rough(5) == ""


def test_rates_are_quantiles_of_images_per_second() -> None:
    timing = Throughput(4, (1.0, 2.0, 4.0))
    assert timing.rate() == 2.0
    assert timing.rate(0.0) == 1.0
    assert timing.rate(1.0) == 4.0


@pytest.mark.skipif(not run.HAS_TRITON, reason="needs Triton's interpreter")
def test_the_kernels_themselves_are_interpreted() -> None:
    found = interpret_in_child()
    assert isinstance(found, Interpreted), found
    assert found.ok
    assert found.modules == 13
    assert 0.0 < found.worst <= found.worst_limit


def test_an_interpreter_that_fails_is_told_in_a_sentence(monkeypatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "could not be interpreted: no message" in str(interpret_in_child())


def test_under_the_interpreter_the_demo_declines(monkeypatch, photo, tmp_path) -> None:
    monkeypatch.setattr(kernels, "INTERPRET", True)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set"):
        small_demo(photo, tmp_path)
