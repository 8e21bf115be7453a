"""`run_demo`: a photograph through a plain and an accelerated model, and a page that shows what came of it.

Everything on the page is measured in the run that writes it. The page is one file: styles, pictures and chart are
inside, and nothing is fetched.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps
from torch import Tensor

from .. import kernels
from ..doctor import doctor
from ..images.photo import load_image, sample_image
from ..images.spec import image_spec
from ..images.view import look
from ..kernels import fp32_products
from ..kernels._triton import HAS_TRITON
from ..maps.maps import attention_maps
from ..maps.pictures import overlay
from ..maps.rollouts import rollout
from ..proof.parity import parity
from ..proof.subjects import build_model, pick_device
from ..swap.accelerate import accelerate
from ..swap.precision import get_precision
from ..swap.report import report
from .interpret import Interpreted, interpret_in_child
from .page import render
from .result import DemoResult
from .throughput import device_name, measure


def _top(plain: Tensor, fused: Tensor) -> tuple[tuple[int, float, float], ...]:
    ours, theirs = fused.double().softmax(-1)[0], plain.double().softmax(-1)[0]
    best = theirs.topk(min(5, len(theirs))).indices.tolist()
    return tuple((index, theirs[index].item(), ours[index].item()) for index in best)


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
        model: a name that `vitfast.proof.subjects.build_model` knows.
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
    spec = image_spec(built)
    pixels, view = look(picture, spec)
    pixels = pixels.to(place)

    say(f"comparing with float64 in {policy.name} on {place}")
    found = parity(built, pixels, policy.name)

    # one precision for both, since against another one any kernel looks fast
    plain = built.to(policy.dtype)
    fused = accelerate(copy.deepcopy(plain), precision=policy.name, frozen=True)
    replaced = report(fused)
    pixels = pixels.to(policy.dtype)
    top = None
    if found.top1 is not None:
        with torch.inference_mode(), fp32_products(place, policy.tf32):
            top = _top(plain(pixels), fused(pixels))

    say("drawing attention")
    maps = attention_maps(fused, pixels)
    rolled = overlay(view, rollout(maps)[0])
    small = ImageOps.contain(view, (144, 144), Image.Resampling.LANCZOS)
    layers = [overlay(small, maps.seen(layer)[0]) for layer in maps]
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
        interpreted = interpret_in_child()
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
    result = DemoResult(
        model=model,
        weights=source,
        seeded=weights is None,
        image=os.fspath(file) if image is not None else "matplotlib's grace_hopper.jpg",
        precision=policy.name,
        device=str(place),
        device_name=device_name(place),
        report=replaced,
        parity=found,
        plain=plain_timing,
        fused=fused_timing,
        ratios=ratios,
        top=top,
        interpreted=interpreted,
        files=files,
        environment=_environment(place, seed),
        command=shlex.join(command),
        seconds=time.perf_counter() - start,
    )
    page = render(result, spec, view, rolled, layers, class_token=maps.has_class_token)
    files["page"].write_text(page, encoding="utf-8")
    return dataclasses.replace(result, seconds=time.perf_counter() - start)


def _environment(place: torch.device, seed: int) -> tuple[tuple[str, str], ...]:
    shown = ("vitfast", "python", "torch", "triton", "CUDA of torch", "ROCm of torch", "NVIDIA driver", "torch threads")
    versions = [(name, value) for name, value in doctor().versions if name in shown]
    return (("device", f"{place} ({device_name(place)})"), *versions, ("seed", str(seed)))


def _sheet(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size in rows of twelve."""
    width, height = pictures[0].size
    columns, gap = min(12, len(pictures)), 4
    lines = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, lines * (height + gap) - gap), "white")
    for i, picture in enumerate(pictures):
        sheet.paste(picture, (i % columns * (width + gap), i // columns * (height + gap)))
    return sheet
