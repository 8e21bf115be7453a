"""The kernels of a small model in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import torch

from ..proof.parity import parity
from ..proof.subjects import seed_weights
from ..reference.architectures import create_model


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


def interpret_in_child(timeout: float = 60.0) -> Interpreted | str:
    """`interpret_kernels` in a process of its own; where that fails, why, in a sentence."""
    # triton reads the variable when a kernel is decorated, so it takes a process of its own
    code = "import dataclasses as d, json; from vitfast.demo.interpret import interpret_kernels as f\n"
    code += "print(json.dumps(d.asdict(f())))"
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
