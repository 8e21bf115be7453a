"""What a demo found, and the sentences that its page and the command share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..proof.parity import Parity
from ..swap.report import Report
from .interpret import Interpreted
from .throughput import Throughput


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
    plain: Throughput
    fused: Throughput
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
        lines += [rough] if (rough := how_rough(len(self.ratios))) else []
        lines.append(what_ran(self.device))
        if isinstance(self.interpreted, Interpreted):
            lines.append(interpreted_sentence(self.interpreted))
        elif self.interpreted:
            lines.append(self.interpreted)
        lines += ["", *(f"{kind:<8} {path}" for kind, path in self.files.items()), f"took {self.seconds:.0f} s"]
        return "\n".join(lines)


def what_ran(device: str) -> str:
    """Whether fused kernels did."""
    if device.startswith("cuda"):
        return "The fused Triton kernels ran on this GPU."
    return (
        "No fused kernel ran in this comparison: they need a CUDA GPU. On a CPU the replaced layers make the same "
        "calls of torch as the plain model, so a speed ratio near 1 is what to expect."
    )


def how_rough(rounds: int) -> str:
    """A warning where a slow or busy machine left too few rounds for the spread to mean much; else nothing."""
    return f"Only {rounds} rounds fit into the time: take the ratio as rough." if rounds < 5 else ""


def interpreted_sentence(found: Interpreted, number: Callable[[float], str] = "{:.2e}".format) -> str:
    """What the interpreter found; `number` writes the errors."""
    return (
        f"In Triton's interpreter the kernels' programs did run, on a small model in fp32 with {found.modules} modules "
        f"replaced: the rule {'holds' if found.ok else 'is broken'}, largest error {number(found.worst)} of "
        f"{number(found.worst_limit)} allowed."
    )
