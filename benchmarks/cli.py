"""The commands `vitfast bench` and `vitfast tune`, which the entry points `vitfast.commands` name."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vitfast.cli.arguments import percent, positive, seconds
from vitfast.cli.models import say


def bench(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds `vitfast bench` and `vitfast bench compare`."""
    bench = commands.add_parser(
        "bench",
        help="time vitfast against every peer that is installed, with parity beside each time",
        description="Time plain torch, inductor, timm, Transformers, torchvision and vitfast rung by rung, "
        "interleaved, on this machine. Writes results.json, a page, Markdown tables and timm's CSV columns to --out. A "
        "run that was killed goes on where it stopped. Exit status 1 when one of vitfast's rows breaks the tolerance "
        "rule.",
        parents=[common],
    )
    bench.add_argument(
        "--model",
        nargs="+",
        metavar="NAME",
        help="architectures (default: the suite's; on CPU Ti and B), or other libraries' models plain and accelerated, "
        "such as torchvision:swin_b",
    )
    bench.add_argument(
        "--batch", nargs="+", type=positive, metavar="N", help="batch sizes (default: the suite's; on CPU 1)"
    )
    bench.add_argument("--precision", nargs="+", metavar="P", help="such as bf16 (default bf16 on cuda, fp32 on CPU)")
    bench.add_argument("--peers", nargs="+", metavar="NAME", help="starts of peers' names, such as timm (default: all)")
    bench.add_argument(
        "--layers",
        nargs="+",
        choices=("kernel", "block", "model", "train", "end_to_end"),
        metavar="LAYER",
        help="what is measured, most wanted first: kernel, block, model, train, end_to_end (default model)",
    )
    bench.add_argument("--kernels", action="store_true", help="the kernels at the models' shapes too")
    bench.add_argument("--quick", action="store_true", help="a first look: one small model and its kernels, batch 1")
    bench.add_argument("--budget", type=seconds, metavar="SECONDS", help="of timing (default: 10 a workload)")
    bench.add_argument("--out", metavar="DIR", default="vitfast-bench", help="where files go (default ./%(default)s)")
    bench.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where torch sees one, else cpu)")
    bench.set_defaults(run=_bench)
    actions = bench.add_subparsers(metavar="compare", help="instead of measuring; see `vitfast bench compare --help`")
    compare = actions.add_parser(
        "compare",
        description="Ratios of two results files, row by row, and which differences are noise.",
        parents=[common],
    )
    compare.add_argument("a", metavar="A.json", help="results before")
    compare.add_argument("b", metavar="B.json", help="results after")
    compare.add_argument(
        "--fail",
        type=percent,
        metavar="PERCENT",
        help="exit status 1 if a row broke, or lost more than this of its speed and more than noise; needs rows of "
        "peers in both, such as torch eager",
    )
    compare.set_defaults(run=_compare)


def tune(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds `vitfast tune`."""
    tune = commands.add_parser(
        "tune",
        help="find the fastest tile sizes for this GPU, measured inside the model",
        description="Measure tile sizes, stages, warps and torch's own routines for every launch of a model, inside "
        "its blocks under a CUDA graph, and keep what is faster by more than the spread. Entries go to the user's own "
        "folder ($VITFAST_CONFIG_DIR, else ~/.cache/vitfast/configs), which every later launch reads.",
        parents=[common],
    )
    tune.add_argument("--model", nargs="+", default=["vit_base_patch16_224"], metavar="NAME", help="architectures")
    tune.add_argument(
        "--batch",
        nargs="+",
        type=positive,
        default=[1, 256],
        metavar="N",
        help="batch sizes; attention's entries are the last one's (default 1 256)",
    )
    tune.add_argument("--precision", default="bf16", metavar="P", help="fp32, tf32, bf16 or fp16 (default %(default)s)")
    tune.add_argument("--ops", nargs="+", metavar="OP", help="such as linear attention (default: all)")
    tune.add_argument(
        "--budget", type=seconds, default=600.0, metavar="SECONDS", help="for all of it (default %(default)g)"
    )
    tune.add_argument("--out", metavar="DIR", help="instead of the user's folder, such as kernels/configs of a clone")
    tune.add_argument("--device", help="such as cuda:1 (default: cuda)")
    tune.set_defaults(run=_tune)


def _bench(options: argparse.Namespace) -> int:
    from pathlib import Path

    from vitfast.proof.subjects import pick_device

    from .report import page
    from .report.markdown import markdown
    from .runner.progress import Progress
    from .runner.run import run
    from .workloads.base import BATCHES, MODELS
    from .workloads.table import workloads

    device = pick_device(options.device)
    cuda = device.type == "cuda"
    if options.quick:
        models: tuple[str, ...] = ("vit_tiny_patch16_224",)
        batches: tuple[int, ...] = (1,)
    else:
        models = tuple(MODELS) if cuda else ("vit_tiny_patch16_224", "vit_base_patch16_224")
        batches = BATCHES if cuda else (1,)
    layers = list(options.layers or ["model"])
    if (options.kernels or options.quick) and "kernel" not in layers:
        layers.append("kernel")
    todo = workloads(
        tuple(layers),
        tuple(options.model or models),
        tuple(options.batch or batches),
        tuple(options.precision or (("bf16",) if cuda else ("fp32",))),
    )
    # what is asked for most comes first, so that a budget cuts the rest
    todo.sort(key=lambda workload: layers.index(workload.layer))
    out = Path(options.out)
    with Progress(sys.stderr) as progress:
        result = run(
            todo,
            out / "results.json",
            device,
            peer_names=None if options.peers is None else tuple(options.peers),
            budget_s=options.budget or (20.0 if options.quick else None),
            quick=options.quick,
            progress=progress,
        )
    written = page.write(result, out)
    print(markdown(result))
    for path in written:
        say(f"wrote {path}")
    return 1 if any(row.status == "failed parity" and row.candidate.startswith("vitfast") for row in result.rows) else 0


def _compare(options: argparse.Namespace) -> int:
    from pathlib import Path

    from .report.compare import compare
    from .runner.results import load

    found = compare(load(Path(options.a)), load(Path(options.b)))
    print(found)
    if options.fail is None:
        return 0
    if not found.controlled:
        raise ValueError(
            f"--fail: {options.a} and {options.b} have no timed rows of the same peers and versions in common; without "
            "them a busy machine cannot be told from slower code"
        )
    worse = found.regressions(options.fail / 100)
    print(f"\n{len(worse)} rows broke, or lost more than {options.fail:g} % of their speed and more than noise.")
    return 1 if worse else 0


def _tune(options: argparse.Namespace) -> int:
    from pathlib import Path

    from vitfast.proof.subjects import pick_device

    from .tune import tune

    device = pick_device(options.device)
    runs = [(model, batch, fold) for model in options.model for batch in options.batch for fold in (True, False)]
    for model, batch, fold in runs:
        result = tune(
            model,
            batch=batch,
            dtype=options.precision,
            device=device,
            budget_s=options.budget / len(runs),
            fold=fold,
            ops=options.ops,
            out=None if options.out is None else Path(options.out),
        )
        print(result)
    return 0
