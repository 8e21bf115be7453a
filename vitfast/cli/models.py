"""The commands about models and about this machine: each a thin front of a public function."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def demo_command(options: argparse.Namespace) -> int:
    from ..demo.run import run_demo

    result = run_demo(
        image=options.image,
        model=options.model,
        weights=options.weights,
        out=options.out,
        precision=options.precision,
        batch=options.batch,
        seconds=options.seconds,
        seed=options.seed,
        device=options.device,
        log=say,
    )
    print(result)
    return 0 if result.ok else 1


def parity_command(options: argparse.Namespace) -> int:
    import torch

    from ..proof.libraries import has_weights, image_shape
    from ..proof.parity import parity
    from ..proof.subjects import build_model, pick_device

    device = pick_device(options.device)
    model = build_model(options.model, options.weights, img_size=options.img_size, seed=options.seed).to(device)
    channels, *size = image_shape(model)
    if options.img_size:
        size = [options.img_size] * 2
    generator = torch.Generator().manual_seed(options.seed)
    pixels = torch.randn(options.batch, channels, *size, generator=generator).to(device)
    trained = options.weights or (options.model if has_weights(options.model) else None)
    source = f"weights of {trained}" if trained else f"seeded random weights (seed {options.seed})"
    # for a model that draws in evaluation
    torch.manual_seed(options.seed)
    result = parity(model, pixels, options.precision or "fp32")
    shape = "x".join(map(str, result.shape))
    print(f"{options.model}, {source}, {result.precision} on {result.device}, random pixels {shape}")
    print(result.table(each=options.all))
    return 0 if result.ok else 1


def report_command(options: argparse.Namespace) -> int:
    import torch

    from .. import accelerate, create_model, list_models, report
    from ..proof.libraries import build, library_of

    with torch.device("meta"):
        if options.model in list_models() or library_of(options.model) is None:
            # for an unknown name this raises, with the close ones
            model: torch.nn.Module = create_model(options.model)
        else:
            model = build(options.model, weights=False)
    count = sum(p.numel() for p in model.parameters())
    print(f"{options.model}: {type(model).__name__} of {type(model).__module__}, {count / 1e6:.1f} M parameters")
    print(report(accelerate(model, only=options.only)))
    return 0


def attend_command(options: argparse.Namespace) -> int:
    from pathlib import Path

    from PIL import Image

    from ..images.photo import load_image
    from ..images.view import look
    from ..maps.maps import attention_maps
    from ..maps.pictures import draw
    from ..maps.rollouts import rollout
    from ..proof.libraries import has_weights
    from ..proof.subjects import build_model, pick_device
    from ..swap.accelerate import accelerate
    from ..swap.precision import get_precision

    out = Path(options.out)
    if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--out {options.out!r}; expected the name of a picture, such as map.png")
    if not out.parent.is_dir():
        raise ValueError(f"--out {options.out!r}: there is no folder {str(out.parent)!r}")
    device, policy = pick_device(options.device), get_precision(options.precision or "fp32")
    photo = load_image(options.image)
    model = build_model(options.model, options.weights, seed=options.seed)
    pixels, view = look(photo, _spec(options.model, model))
    pixels = pixels.to(device, policy.dtype)
    accelerate(model.to(device), precision=policy.name)
    layers, heads = (options.layers, "mean") if options.heads is None else ([options.heads], None)
    maps = attention_maps(model, pixels, layers=layers, heads=heads)
    flow = rollout(attention_maps(model, pixels)) if options.rollout else None
    draw(view, maps, flow).save(out)
    trained = options.weights or (options.model if has_weights(options.model) else None)
    source = f"weights of {trained}" if trained else f"seeded random weights (seed {options.seed}), which mean nothing"
    print(f"{options.model}, {source}, {policy.name} on {device}")
    rows, cols = maps.grid
    print(
        f"{rows}x{cols} patches as "
        + ("the class token sees them" if maps.has_class_token else "they see each other, on average")
        + f"; tokens in front of them: {maps.num_prefix_tokens}"
    )
    say(f"wrote {out}")
    return 0


def _spec(name: str, model: Any) -> Any:
    """How a model wants its images: what the model says, or what lies beside one of Transformers."""
    from pathlib import Path

    from ..images.spec import image_spec
    from ..proof.libraries import library, library_of

    plain = name.removeprefix("transformers:")
    if library_of(name) != "transformers" or not ("/" in plain or Path(plain).is_dir()):
        return image_spec(model)
    return image_spec(library("transformers").AutoImageProcessor.from_pretrained(plain))


def doctor_command(options: argparse.Namespace) -> int:
    from ..doctor import doctor

    diagnosis = doctor()
    print(diagnosis)
    return 0 if diagnosis.ok else 1


def say(message: str) -> None:
    """A line on what is being done, apart from the results on standard output."""
    print(message, file=sys.stderr, flush=True)
