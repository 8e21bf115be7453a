"""`run_demo`: a photograph through a plain and an accelerated model, and a page that shows what came of it.

Everything on the page is measured in the run that writes it. The page is one file: styles, pictures and chart are
inside, and nothing is fetched.
"""

from __future__ import annotations

import base64
import copy
import dataclasses
import html
import importlib.util
import io
import json
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from .. import __version__, kernels
from ..accelerate import Report, accelerate, report
from ..architectures import create_model
from ..doctor import doctor, how_ops_run
from ..images.transforms import ImageSpec, image_spec, preprocess, reading
from ..kernels._triton import HAS_TRITON
from ..maps.maps import attention_maps, overlay, rollout
from ..parity import FACTOR, Comparison, Parity, build_model, fp32_products, parity, pick_device, seed_weights
from ..precision import get_precision

# what each kind of replacement calls, and what that fuses
_FUSED = {
    "layer_norm": ("layer_norm", "statistics in fp32 and the normalisation in one read and one write"),
    "patch_embed": ("patch_embed", "patches read where they lie (no im2col copy), projection and bias"),
    "attention": (
        "linear, attention, linear",
        "scores, softmax and values in one kernel that reads packed q, k, v; residual and LayerScale in the "
        "projection's epilogue",
    ),
    "mlp": ("linear, linear", "activation in the first epilogue; residual and LayerScale in the second"),
    "block": ("those of its branches", "hands residual and LayerScale to the last kernel of each branch"),
    "model": (
        "patch_embed, norm_linear, linear_stats",
        "prefix tokens and position embedding in the patch-embed kernel; on a GPU LayerNorm in the GEMM behind it; "
        "in the last block only the tokens that the head reads",
    ),
}


@dataclass(frozen=True)
class Timing:
    """Throughput of one model.

    Attributes:
        batch: images in a forward.
        seconds: of each timed forward.
    """

    batch: int
    seconds: tuple[float, ...]

    def rate(self, quantile: float = 0.5) -> float:
        """Images per second, that quantile of them (0.5: median)."""
        return self.batch / float(np.quantile(self.seconds, 1.0 - quantile))


@dataclass(frozen=True)
class Interpreted:
    """What Triton's interpreter says of the kernels, by a small model in fp32 on the CPU.

    Attributes:
        ok: whether output and modules keep the rule.
        modules: number of replaced modules.
        worst: largest error.
        worst_limit: what the rule allows.
    """

    ok: bool
    modules: int
    worst: float
    worst_limit: float


@dataclass(frozen=True)
class DemoResult:
    """What the demo found. `str()` gives the summary that the command prints.

    Attributes:
        model: its name.
        weights: where they come from, in words.
        seeded: whether they are random.
        image: the photograph's file.
        precision: name of the policy, of both models.
        device: where it ran.
        device_name: what that is.
        report: what was replaced.
        parity: the rule on every replaced module and on the output.
        plain, fused: throughput.
        ratios: plain over accelerated seconds, one per round of measurement.
        top: (class, plain probability, accelerated probability) of the plain model's five best, None without classes.
        interpreted: the kernels in Triton's interpreter; where that was not done, why.
        files: written files by what they are: "page", "overlay", "layers".
        environment: (what, value).
        command: that repeats it.
        seconds: the whole run took.
    """

    model: str
    weights: str
    seeded: bool
    image: str
    precision: str
    device: str
    device_name: str
    report: Report
    parity: Parity
    plain: Timing
    fused: Timing
    ratios: tuple[float, ...]
    top: tuple[tuple[int, float, float], ...] | None
    interpreted: Interpreted | str
    files: dict[str, Path]
    environment: tuple[tuple[str, str], ...]
    command: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether the rule holds."""
        return self.parity.ok and (isinstance(self.interpreted, str) or self.interpreted.ok)

    def ratio(self, quantile: float = 0.5) -> float:
        """Speed of the accelerated model over the plain one's, that quantile of the rounds."""
        return float(np.quantile(self.ratios, quantile))

    def __str__(self) -> str:
        lines = [
            f"{self.model} ({self.weights}), {self.precision} on {self.device_name}",
            "",
            str(self.report),
            "",
            str(self.parity),
            "",
        ]
        for name, timing in (("plain", self.plain), ("accelerated", self.fused)):
            lines.append(
                f"{name:<12} {timing.rate():.4g} img/s (p20 {timing.rate(0.2):.4g}, p80 {timing.rate(0.8):.4g}; "
                f"batch {timing.batch}, {len(timing.seconds)} runs)"
            )
        lines.append(f"speed ratio  {self.ratio():.3f} (p20 {self.ratio(0.2):.3f}, p80 {self.ratio(0.8):.3f})")
        lines += [rough] if (rough := _how_rough(len(self.ratios))) else []
        lines.append(_what_ran(self.device))
        if isinstance(self.interpreted, Interpreted):
            lines.append(_interpreted_sentence(self.interpreted))
        elif self.interpreted:
            lines.append(self.interpreted)
        lines += ["", *(f"{kind:<8} {path}" for kind, path in self.files.items()), f"took {self.seconds:.0f} s"]
        return "\n".join(lines)


def _what_ran(device: str) -> str:
    if device.startswith("cuda"):
        return "The fused Triton kernels ran on this GPU."
    return (
        "No fused kernel ran in this comparison: they need a CUDA GPU. On a CPU the replaced layers make the same "
        "calls of torch as the plain model, so a speed ratio near 1 is what to expect."
    )


def _how_rough(rounds: int) -> str:
    """A warning where a slow or busy machine left too few rounds for the spread to mean much; else nothing."""
    return f"Only {rounds} rounds fit into the time: take the ratio as rough." if rounds < 5 else ""


def _interpreted_sentence(found: Interpreted, number: Callable[[float], str] = "{:.2e}".format) -> str:
    return (
        f"In Triton's interpreter the kernels' programs did run, on a small model in fp32 with {found.modules} modules "
        f"replaced: the rule {'holds' if found.ok else 'is broken'}, largest error {number(found.worst)} of "
        f"{number(found.worst_limit)} allowed."
    )


def sample_image() -> Path:
    """The photograph that matplotlib carries (Rear Admiral Grace Hopper).

    Raises:
        ImportError: matplotlib is not installed.
        FileNotFoundError: it is, without its sample data.
    """
    spec = importlib.util.find_spec("matplotlib")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("the sample photograph comes with matplotlib: pip install matplotlib, or give --image FILE")
    path = Path(next(iter(spec.submodule_search_locations)), "mpl-data", "sample_data", "grace_hopper.jpg")
    if not path.is_file():
        raise FileNotFoundError("this matplotlib came without its sample data; give --image FILE")
    return path


def load_image(path: str | os.PathLike[str]) -> Image.Image:
    """A picture of any kind as upright RGB: EXIF orientation applied, transparency on white, 16 bits reduced to 8.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no picture, or a broken one.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no image file {str(path)!r}")
    with reading(f"image file {str(path)!r}"), Image.open(path) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image).astype(np.float64) / 257.0).clip(0, 255).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")


def look(image: Image.Image, spec: ImageSpec) -> tuple[Tensor, Image.Image]:
    """What a model sees of a photograph.

    Args:
        image: RGB.
        spec: how the model wants its images.

    Returns:
        `[1, 3, H, W]` fp32, normalised, and the same part at twice the size for people to look at.
    """
    mean, std = (torch.tensor(values)[:, None, None] for values in (spec.mean, spec.std))
    larger = dataclasses.replace(
        spec,
        size=(2 * spec.size[0], 2 * spec.size[1]),
        resize=None if spec.resize is None else (2 * spec.resize[0], 2 * spec.resize[1]),
    )
    view = Image.fromarray(preprocess(image, larger)[0].permute(1, 2, 0).numpy())
    return (preprocess(image, spec).float() / 255.0 - mean) / std, view


def measure(
    plain: nn.Module, fused: nn.Module, pixels: Tensor, seconds: float
) -> tuple[Timing, Timing, tuple[float, ...]]:
    """Throughput of two models, measured in turns: warmed up, synchronised, the order changed every round.

    Args:
        plain, fused: the models.
        pixels: what both get.
        seconds: time to measure for. At least 3 rounds and at most 200 are made.

    Returns:
        Timings of both, and plain over fused seconds of each round.
    """
    on_cuda = pixels.device.type == "cuda"

    def once(model: nn.Module) -> float:
        start = time.perf_counter()
        model(pixels)
        if on_cuda:
            torch.cuda.synchronize(pixels.device)
        return time.perf_counter() - start

    taken: dict[int, list[float]] = {0: [], 1: []}
    with torch.inference_mode():
        if on_cuda:
            torch.cuda.synchronize(pixels.device)
        # compiling, autotuning of cuDNN and growing of memory pools happen here; a GPU's clocks rise too
        for model in (plain, fused):
            for _ in range(10 if on_cuda else 1):
                once(model)
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < 200 and (rounds < 3 or time.perf_counter() < end):
            for which in (0, 1) if rounds % 2 == 0 else (1, 0):
                taken[which].append(once((plain, fused)[which]))
            rounds += 1
    ratios = tuple(p / f for p, f in zip(taken[0], taken[1], strict=True))
    return Timing(len(pixels), tuple(taken[0])), Timing(len(pixels), tuple(taken[1])), ratios


def interpret_kernels() -> Interpreted:
    """Parity of a small model in fp32, for a process with `TRITON_INTERPRET=1`: there the kernels are interpreted."""
    model = create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        patch_size=8,
        embed_dim=64,
        depth=2,
        num_heads=2,
        reg_tokens=2,
        init_values=0.1,
        num_classes=10,
    )
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = parity(seed_weights(model), pixels)
    return Interpreted(found.ok, len(found.modules), found.output.worst, found.output.worst_limit)


def _interpret_in_child(timeout: float = 60.0) -> Interpreted | str:
    # triton reads the variable when a kernel is decorated, so it takes a process of its own
    code = "import dataclasses, json, vitfast.demo.run as d; print(json.dumps(dataclasses.asdict(d.interpret_kernels())))"
    try:
        child = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "TRITON_INTERPRET": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=True,
        )
        return Interpreted(**json.loads(child.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return f"The kernels were not interpreted: it took longer than {timeout:.0f} s."
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["no message"])[-1]
        return f"The kernels could not be interpreted: {reason}"


def _top(plain: Tensor, fused: Tensor) -> tuple[tuple[int, float, float], ...]:
    ours, theirs = fused.double().softmax(-1)[0], plain.double().softmax(-1)[0]
    best = theirs.topk(min(5, len(theirs))).indices.tolist()
    return tuple((index, theirs[index].item(), ours[index].item()) for index in best)


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else "CPU"


def _square_spec(model: nn.Module) -> ImageSpec:
    stem: Any = next((module.patch_embed for module in model.modules() if hasattr(module, "patch_embed")), None)
    size = getattr(stem, "img_size", None)
    if not isinstance(size, tuple) or size[0] != size[1] or stem.proj.in_channels != 3:
        raise ValueError("the demo needs a Vision Transformer that takes square RGB images of one size")
    return image_spec(model)


def run_demo(
    *,
    image: str | os.PathLike[str] | None = None,
    model: str = "vit_base_patch16_224",
    weights: str | os.PathLike[str] | None = None,
    out: str | os.PathLike[str] = "vitfast-demo",
    precision: str | None = None,
    batch: int | None = None,
    seconds: float = 8.0,
    seed: int = 0,
    device: str | None = None,
    interpret: bool = True,
    log: Callable[[str], None] | None = None,
) -> DemoResult:
    """Compare a plain and an accelerated model on a photograph, and write a page about it.

    Args:
        image: a picture file; None for the one that matplotlib carries.
        model: a name that `vitfast.parity.build_model` knows.
        weights: checkpoint file; None for seeded weights, which mean nothing but compute the same.
        out: folder for `index.html`, `attention-rollout.png` and `attention-layers.png`; made if need be.
        precision: of both models; None for bf16 on CUDA and fp32 on CPU, what each is usually run in.
        batch: images in a timed forward; None for 64 on CUDA and 2 on CPU.
        seconds: to measure throughput for.
        seed: of the seeded weights.
        device: None for CUDA where there is one.
        interpret: on a CPU, also run the kernels of a small model in Triton's interpreter.
        log: gets a line before each step.

    Raises:
        ValueError: an argument or a file does not fit; the message says what would.
        FileNotFoundError: a file is not there.
        ImportError: a package is missing; the message says how to get it.
    """
    start = time.perf_counter()
    say = log or (lambda _: None)
    if kernels.INTERPRET:
        raise ValueError(
            "TRITON_INTERPRET=1 is set, and interpreting a whole model takes hours: unset it (on a CPU the demo "
            "interprets the kernels of a small model by itself)"
        )
    place = pick_device(device)
    policy = get_precision(precision or ("bf16" if place.type == "cuda" else "fp32"))
    on_cuda = place.type == "cuda"
    batch = batch or (64 if on_cuda else 2)
    file = Path(image) if image is not None else sample_image()
    picture = load_image(file)
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{str(out)!r} is a file; expected a folder to write to")
    folder.mkdir(parents=True, exist_ok=True)

    source = f"weights of {os.fspath(weights)}" if weights is not None else f"seeded random weights, seed {seed}"
    say(f"building {model} ({source})")
    built = build_model(model, None if weights is None else Path(weights), seed=seed).to(place)
    spec = _square_spec(built)
    pixels, view = look(picture, spec)
    pixels = pixels.to(place)

    say(f"comparing with float64 in {policy.name} on {place}")
    found = parity(built, pixels, policy.name)

    # one precision for both, since against another one any kernel looks fast
    plain = built.to(policy.dtype)
    fused = accelerate(copy.deepcopy(plain), precision=policy.name)
    replaced = report(fused)
    pixels = pixels.to(policy.dtype)
    top = None
    if found.top1 is not None:
        with torch.inference_mode(), fp32_products(place, policy.tf32):
            top = _top(plain(pixels), fused(pixels))

    say("drawing attention")
    maps = attention_maps(fused, pixels)
    rolled = overlay(view, rollout(maps)[0])
    rows = [layer[0, 0] if maps.has_class_token else layer[0].mean(dim=0) for layer in maps]
    small = view.resize((144, 144), Image.Resampling.LANCZOS)
    layers = [overlay(small, maps.to_grid(row)) for row in rows]
    files = {
        "page": folder / "index.html",
        "overlay": folder / "attention-rollout.png",
        "layers": folder / "attention-layers.png",
    }
    rolled.save(files["overlay"])
    _sheet(layers).save(files["layers"])

    say(f"measuring throughput for {seconds:g} s")
    pixels = pixels.expand(batch, -1, -1, -1).contiguous()
    with fp32_products(place, policy.tf32):
        plain_timing, fused_timing, ratios = measure(plain, fused, pixels, seconds)

    interpreted: Interpreted | str = ""
    if not on_cuda and interpret and HAS_TRITON:
        say("running the kernels of a small model in Triton's interpreter")
        interpreted = _interpret_in_child()
    elif not on_cuda and interpret:
        interpreted = "The kernels could not be interpreted: triton is not installed."

    options = {
        "--model": model,
        "--image": None if image is None else os.fspath(image),
        "--weights": None if weights is None else os.fspath(weights),
        "--precision": policy.name,
        "--batch": str(batch),
        "--seconds": f"{seconds:g}",
        "--seed": str(seed),
        "--device": str(place),
        "--out": os.fspath(out),
    }
    command = ["vitfast", "demo"]
    for option, value in options.items():
        command += [] if value is None else [option, value]
    device_name = torch.cuda.get_device_name(place) if on_cuda else _cpu_name()
    result = DemoResult(
        model=model,
        weights=source,
        seeded=weights is None,
        image=os.fspath(file) if image is not None else "matplotlib's grace_hopper.jpg",
        precision=policy.name,
        device=str(place),
        device_name=device_name,
        report=replaced,
        parity=found,
        plain=plain_timing,
        fused=fused_timing,
        ratios=ratios,
        top=top,
        interpreted=interpreted,
        files=files,
        environment=_environment(place, device_name, seed),
        command=shlex.join(command),
        seconds=time.perf_counter() - start,
    )
    page = _page(result, fused, spec, view, rolled, layers)
    files["page"].write_text(page, encoding="utf-8")
    return dataclasses.replace(result, seconds=time.perf_counter() - start)


def _environment(place: torch.device, device_name: str, seed: int) -> tuple[tuple[str, str], ...]:
    shown = ("vitfast", "python", "torch", "triton", "CUDA of torch", "ROCm of torch", "NVIDIA driver", "torch threads")
    versions = [(name, value) for name, value in doctor().versions if name in shown]
    return (("device", f"{place} ({device_name})"), *versions, ("seed", str(seed)))


def _sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in rows of twelve."""
    width, height = pictures[0].size
    columns, gap = min(12, len(pictures)), 4
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, lines * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet


_STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --ink: #1a1d24; --soft: #5a6270; --line: #dfe3ea;
  --accent: #2f5bd8; --plain: #8a94a6; --good: #14713f; --good-wash: #e5f5ec; --bad: #b3261e; --bad-wash: #fdeceb;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12141a; --card: #1b1e26; --ink: #e8eaf0; --soft: #a3abba; --line: #323743;
    --accent: #86a5ff; --plain: #7a8397; --good: #6fd39c; --good-wash: #17301f; --bad: #ff9a92; --bad-wash: #3a1b1a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: clamp(1.8rem, 4.5vw, 2.6rem); line-height: 1.15; letter-spacing: -0.02em; margin: 0.3rem 0 0.6rem; }
h2 { font-size: 1.25rem; margin: 0 0 0.4rem; letter-spacing: -0.01em; }
p { margin: 0.4rem 0; max-width: 68ch; }
section, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
section { padding: 1.4rem; margin-top: 1.2rem; }
.kicker, .soft, figcaption, caption, th { color: var(--soft); }
.kicker { font-size: 0.9rem; margin: 0; }
.soft, figcaption { font-size: 0.88rem; }
.mark { color: var(--good); } .mark.bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.6rem, 1fr)); gap: 0.8rem; }
.tiles { margin-top: 1.4rem; }
.tile { padding: 0.9rem 1rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; white-space: nowrap; }
.tile b { font-variant-numeric: tabular-nums; }
.tile span { display: block; font-size: 0.85rem; color: var(--soft); }
.note { border-left: 4px solid var(--accent); padding: 0.1rem 0 0.1rem 0.9rem; margin: 1.2rem 0 0; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; margin-top: 0.9rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; border-radius: 8px; display: block; }
figcaption { margin-top: 0.35rem; }
.strip { display: grid; grid-template-columns: repeat(auto-fill, minmax(4.2rem, 1fr)); gap: 0.5rem; }
.strip { margin-top: 1.1rem; }
.strip figcaption { text-align: center; font-size: 0.78rem; margin-top: 0.15rem; }
.scroll { overflow-x: auto; margin-top: 0.8rem; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th { text-align: left; font-weight: 600; white-space: nowrap; }
th, td { padding: 0.45rem 0.8rem 0.45rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tr:last-child td { border-bottom: 0; } td:last-child, th:last-child { padding-right: 0; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
sup { line-height: 0; }
code, pre { font: 0.86em/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
td code { white-space: nowrap; }
pre { background: var(--page); border: 1px solid var(--line); border-radius: 8px; padding: 0.8rem 1rem; }
pre { overflow-x: auto; }
.narrow { max-width: 26rem; }
.chip { border-radius: 99px; padding: 0.08rem 0.6rem; font-size: 0.8rem; font-weight: 600; white-space: nowrap; }
.chip { background: var(--good-wash); color: var(--good); }
.chip.bad { background: var(--bad-wash); color: var(--bad); }
svg { width: 100%; height: auto; margin-top: 0.8rem; max-width: 46rem; display: block; }
svg text { fill: var(--ink); font-size: 14px; } svg .axis { fill: var(--soft); font-size: 12px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0.25rem 1.4rem; margin: 0.8rem 0 0; }
dl { font-size: 0.9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
footer { margin-top: 1.6rem; }
"""


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _number(value: float) -> str:
    """A small number as people write it: 1.97 × 10⁻⁶."""
    if value == 0.0 or not math.isfinite(value):
        return "0" if value == 0.0 else str(value)
    exponent = math.floor(math.log10(abs(value)))
    if -3 <= exponent <= 3:
        return f"{value:.3g}"
    mantissa = f"{value / 10.0**exponent:.2f}"
    return f"{mantissa}&thinsp;×&thinsp;10<sup>{str(exponent).replace('-', '−')}</sup>"


def _rows(cells: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Table rows of cells that are HTML already; `numbers` are the columns set to the right."""
    lines = []
    for line in cells:
        tags = (f'<td class="number">{c}</td>' if i in numbers else f"<td>{c}</td>" for i, c in enumerate(line))
        lines.append(f"<tr>{''.join(tags)}</tr>")
    return "\n".join(lines)


def _table(head: Sequence[str], cells: Sequence[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    titles = "".join(
        f'<th scope="col" class="number">{t}</th>' if i in numbers else f'<th scope="col">{t}</th>'
        for i, t in enumerate(head)
    )
    rows = _rows(cells, numbers)
    return f'<div class="scroll"><table><thead><tr>{titles}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _chip(ok: bool) -> str:
    return '<span class="chip">holds</span>' if ok else '<span class="chip bad">broken</span>'


def _code(text: str) -> str:
    return f"<code>{html.escape(text)}</code>"


def _pattern(name: str) -> str:
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) or "(the model)"


def _replacements(result: DemoResult) -> str:
    groups: dict[tuple[str, ...], int] = {}
    for row in result.report.replaced:
        kernel, what = _FUSED[row.kind]
        key = (_pattern(row.module), row.original, row.fused or "", kernel, what, row.note)
        groups[key] = groups.get(key, 0) + 1
    # most models have nothing to note, and an empty column takes width from the others
    noted = any(key[-1] for key in groups)
    cells = []
    for (pattern, original, new, kernel, what, note), count in groups.items():
        swap = f"{_code(original)}<br>→&nbsp;{_code(new)}"
        line = [_code(pattern), str(count), swap, _code(kernel), html.escape(what), html.escape(note)]
        cells.append(line if noted else line[:-1])
    head = ["modules", "count", "class", "kernels", "fused into one pass", "note"]
    text = _table(head if noted else head[:-1], cells, (1,))
    kept: dict[tuple[str, str, str], int] = {}
    for row in result.report.kept:
        reason = (_pattern(row.module), row.original, row.note)
        kept[reason] = kept.get(reason, 0) + 1
    if kept:
        lines = [
            [_code(pattern), str(count), _code(original), html.escape(note)]
            for (pattern, original, note), count in kept.items()
        ]
        text += "<p>Left as they are:</p>" + _table(["modules", "count", "class", "why"], lines, (1,))
    return text


def _errors(result: DemoResult) -> str:
    def line(name: str, count: str, c: Comparison, where: str) -> list[str]:
        numbers = (c.worst, c.worst_limit, c.relative, c.baseline_relative)
        return [name, count, *map(_number, numbers), f"{100.0 * c.share:.0f}&nbsp;%", where, _chip(c.ok)]

    cells = [
        line(_code(row.original), str(count), row.comparison, _code(row.module or "(the model)"))
        for count, row in result.parity.groups()
    ]
    cells.append(line("<b>output</b>", "", result.parity.output, "<b>the whole model</b>"))
    head = ["class", "count", "largest error", "allowed", "relative", "plain's", "of limit", "nearest to it", "rule"]
    return _table(head, cells, (1, 2, 3, 4, 5, 6))


def _chart(result: DemoResult) -> str:
    timings = (("plain", result.plain, "var(--plain)"), ("accelerated", result.fused, "var(--accent)"))
    longest = max(timing.rate(0.8) for _, timing, _ in timings)
    left, width, height = 100, 470, 26
    scale = width / longest
    parts = []
    for i, (name, timing, colour) in enumerate(timings):
        top = 10 + i * 46
        low, middle, high = (left + timing.rate(q) * scale for q in (0.2, 0.5, 0.8))
        y = top + height / 2
        whisker = f"M{low:.1f} {y}H{high:.1f}M{low:.1f} {y - 6}V{y + 6}M{high:.1f} {y - 6}V{y + 6}"
        parts += [
            f'<text x="{left - 10}" y="{y + 5}" text-anchor="end">{name}</text>',
            f'<rect x="{left}" y="{top}" width="{middle - left:.1f}" height="{height}" rx="4" fill="{colour}"/>',
            f'<path d="{whisker}" stroke="var(--ink)" stroke-width="1.5" fill="none"/>',
            f'<text x="{high + 10:.1f}" y="{y + 5}">{timing.rate():.4g} img/s</text>',
        ]
    label = "; ".join(
        f"{name} {t.rate():.4g} images per second, p20 {t.rate(0.2):.4g}, p80 {t.rate(0.8):.4g}"
        for name, t, _ in timings
    )
    parts.append(f'<text class="axis" x="{left}" y="112">bar: median; whisker: p20 to p80</text>')
    return f'<svg viewBox="0 0 700 120" role="img" aria-label="{label}">{"".join(parts)}</svg>'


def _tile(title: str, value: str, below: str) -> str:
    return f'<div class="tile"><span>{title}</span><b>{value}</b><span>{below}</span></div>'


def _top_classes(result: DemoResult) -> str:
    if result.top is None:
        return ""
    cells = [[str(index), *(f"{100.0 * p:.3f}&nbsp;%" for p in (plain, fused))] for index, plain, fused in result.top]
    said = (
        "The weights are random, so these classes say nothing about the photograph; what counts is that both columns "
        "agree."
        if result.seeded
        else "Class numbers are the checkpoint's own."
    )
    table = _table(["class", "plain", "accelerated"], cells, (1, 2))
    return f'<section><h2>The five likeliest classes</h2><p>{said}</p><div class="narrow">{table}</div></section>'


def _how_prepared(spec: ImageSpec) -> str:
    mean, std = ("/".join(f"{value:.4g}" for value in values) for values in (spec.mean, spec.std))
    resized = ""
    if spec.resize is not None:
        side, square = f"{spec.resize[0]} pixels", f"{spec.resize[0]} x {spec.resize[1]} pixels"
        how = {"shortest": f"their shorter side to {side}", "stretch": f"to {square}"}
        resized = f"resized ({spec.interpolation}) {how.get(spec.fit, f'to {spec.fit} {square}')}, "
    return (
        f"Images are {resized}cropped in the centre to {spec.size[0]} x {spec.size[1]} and normalised with mean {mean} "
        f"and standard deviation {std}, as timm's default checkpoint of this model wants it."
    )


def _page(
    result: DemoResult,
    fused: nn.Module,
    spec: ImageSpec,
    view: Image.Image,
    rolled: Image.Image,
    layers: Sequence[Image.Image],
) -> str:
    """The page, as HTML. What a user can choose (names, paths) is escaped."""
    out, top1 = result.parity.output, result.parity.top1
    model, device = html.escape(result.model), html.escape(result.device_name)
    weights, image = html.escape(result.weights), html.escape(result.image)
    on_cuda = result.device.startswith("cuda")
    headline = "Same answer" if result.parity.ok else "Not the same answer"
    mark = '<span class="mark" aria-hidden="true">✓</span>' if result.parity.ok else '<span class="mark bad">✗</span>'
    count = len(result.report.replaced)
    tiles = [
        _tile("largest error", _number(out.worst), f"{_number(out.worst_limit)} allowed"),
        _tile("relative error", _number(out.relative), f"the plain model's own: {_number(out.baseline_relative)}"),
        _tile("cosine similarity", f"{out.cosine:.8f}", "with the output in float64"),
    ]
    if top1 is not None and result.top is not None:
        best = result.top[0]
        same = "yes" if top1.equal == top1.images else "no"
        tiles.append(_tile("same top-1", same, f"class {best[0]}, {100 * best[1]:.2f}&nbsp;% in the plain model"))
    tiles.append(
        _tile(
            "speed ratio",
            f"{result.ratio():.2f}&thinsp;×",
            f"accelerated over plain; p20 {result.ratio(0.2):.2f}, p80 {result.ratio(0.8):.2f}",
        )
    )
    proof = ""
    if isinstance(result.interpreted, Interpreted):
        proof = f"<p>{_interpreted_sentence(result.interpreted, _number)}</p>"
    elif result.interpreted:
        proof = f"<p>{html.escape(result.interpreted)}</p>"
    strip = "".join(
        f'<figure><img src="{_uri(p)}" width="144" height="144" alt="Attention of layer {i}">'
        f"<figcaption>{i}</figcaption></figure>"
        for i, p in enumerate(layers)
    )
    running = how_ops_run(torch.device(result.device))
    ops = _table(["op", "how it runs here"], [[_code(op.name), html.escape(op.how)] for op in running])
    environment = "".join(f"<dt>{html.escape(n)}</dt><dd>{html.escape(v)}</dd>" for n, v in result.environment)
    meaning = (
        "With random weights it shows what chance projections find alike in the photograph, not what a trained model "
        "looks at."
        if result.seeded
        else "It shows where the answer's information comes from."
    )
    timing = (
        f"Batches of {result.plain.batch}, {len(result.plain.seconds)} forwards of each model after a warm-up, taken "
        "in turns"
        + (", the GPU synchronised after each" if on_cuda else "")
        + f". Both models have {html.escape(result.precision)} weights and activations. "
        + _how_rough(len(result.ratios))
    )
    side = view.size[0]
    looking = (
        "the class token looks" if getattr(fused, "cls_token", None) is not None else "the patches look on average"
    )
    verdict = result.parity.verdict[0].upper() + result.parity.verdict[1:]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>vitfast demo: {model}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kicker">vitfast {html.escape(__version__)} · {model} · {html.escape(result.precision)} · {device}</p>
<h1>{mark} {headline}, with {count} modules replaced</h1>
<p>A plain Vision Transformer and its accelerated copy saw the same photograph. Both are compared with the same model in
float64. The rule: no output and no replaced module may err more than {FACTOR:g} times as much as plain PyTorch does in
{html.escape(result.precision)}, plus one ulp. Model: {weights}.</p>
<div class="tiles">{"".join(tiles)}</div>
<div class="note"><p>{html.escape(_what_ran(result.device))}</p>{proof}</div>
</header>

<section>
<h2>What it sees</h2>
<p>Attention rollout follows attention through all layers back to the patches, here of the accelerated model with its
fused path on. {meaning}</p>
<div class="pair">
<figure><img src="{_uri(view)}" width="{side}" height="{side}" alt="The square of the photograph that the model sees">
<figcaption>{image}, cropped as the model sees it</figcaption></figure>
<figure><img src="{_uri(rolled)}" width="{side}" height="{side}" alt="The same square under the attention rollout">
<figcaption>Attention rollout; bright is much, dark is little</figcaption></figure>
</div>
<div class="strip">{strip}</div>
<p class="soft">Layer by layer: where {looking}, heads averaged, each picture in its own scale.</p>
</section>

<section>
<h2>What was replaced</h2>
<p><code>vitfast.accelerate(model)</code> exchanged the classes of these modules in place. Parameters and state dict are
the model's own.</p>
{_replacements(result)}
</section>

<section>
<h2>How exact it is</h2>
<p>{html.escape(verdict)}. Each replaced module gets the input that the plain model gives it; a line shows the module of
its class that comes nearest to its limit. Relative errors are Euclidean, beside the plain model's own.</p>
{_errors(result)}
</section>

<section>
<h2>How fast it is</h2>
<p>{timing}</p>
{_chart(result)}
</section>

{_top_classes(result)}

<section>
<h2>Where it ran</h2>
<dl>{environment}</dl>
{ops}
</section>

<section>
<h2>Do it again</h2>
<pre>{html.escape(result.command)}</pre>
<p class="soft">{html.escape(_how_prepared(spec))}</p>
</section>
<footer class="soft">Written by <code>vitfast demo</code> in {result.seconds:.0f} s. Every number on this page was
measured in that run.</footer>
</main>
</body>
</html>
"""
