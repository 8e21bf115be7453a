"""The demo's page: what a result says, as `page.html.j2` shows it."""

from __future__ import annotations

import base64
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from PIL import Image

from .. import __version__
from ..doctor import how_ops_run
from ..images.spec import ImageSpec
from ..rule import FACTOR
from .result import DemoResult, Interpreted, how_rough, interpreted_sentence, what_ran

# what each kind of replacement calls, and what that fuses
FUSED = {
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


def picture_uri(picture: Image.Image) -> str:
    """A picture as the address of itself."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def number(value: float) -> Markup:
    """A small number as people write it: 1.97 × 10⁻⁶."""
    if value == 0.0 or not math.isfinite(value):
        return Markup("0" if value == 0.0 else str(value))
    exponent = math.floor(math.log10(abs(value)))
    if -3 <= exponent <= 3:
        return Markup(f"{value:.3g}")
    mantissa = f"{value / 10.0**exponent:.2f}"
    return Markup(f"{mantissa}&thinsp;×&thinsp;10<sup>{str(exponent).replace('-', '−')}</sup>")


def pattern(name: str) -> str:
    """A module's name with its numbers left out, the same for all blocks."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) or "(the model)"


def render(
    result: DemoResult,
    spec: ImageSpec,
    view: Image.Image,
    rolled: Image.Image,
    layers: Sequence[Image.Image],
    *,
    class_token: bool,
) -> str:
    """The page, as HTML in one file.

    Args:
        result: what the demo found.
        spec: how the model wants its images.
        view: the part of the photograph that the model saw.
        rolled: it under the attention rollout.
        layers: it under each layer's map.
        class_token: whether these are what the class token looks at, or what the patches do on average.
    """
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters.update(number=number, picture=picture_uri, pattern=pattern)
    report, found = result.report, result.interpreted
    speeds = (("plain", result.plain), ("accelerated", result.fused))
    interpreted = Markup(interpreted_sentence(found, number)) if isinstance(found, Interpreted) else found
    return pages.get_template("page.html.j2").render(
        version=__version__,
        factor=FACTOR,
        result=result,
        what_ran=what_ran(result.device),
        interpreted=interpreted,
        replaced=Counter((pattern(r.module), r.original, r.fused, *FUSED[r.kind], r.note) for r in report.replaced),
        kept=Counter((pattern(r.module), r.original, r.note) for r in report.kept),
        noted=any(row.note for row in report.replaced),
        errors=[
            *((row.original, n, row.comparison, row.module or "(the model)") for n, row in result.parity.groups()),
            ("output", "", result.parity.output, "(the model)"),
        ],
        speeds=speeds,
        fastest=max(speed.rate(0.8) for _, speed in speeds),
        rough=how_rough(len(result.ratios)),
        spec=spec,
        view=view,
        rolled=rolled,
        layers=layers,
        class_token=class_token,
        ops=how_ops_run(torch.device(result.device)),
    )
