"""The `vitfast` command. Each subcommand is a thin front of a public function.

Exit statuses: 0 all is well, 1 the tolerance rule or the installation is broken or a benchmark became slower, 2 it
could not be done (the command line, a file, a missing package), 130 interrupted, 141 whoever read the output went away.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

MODEL_HELP = (
    "one of vitfast.list_models(); timm:NAME, torchvision:NAME, open_clip:NAME or transformers:NAME; a folder that "
    "Transformers wrote"
)

EPILOGUE = """\
exit status:
  0  all is well
  1  the tolerance rule is broken (demo, parity, bench), or the installation (doctor);
     something became slower (bench compare --fail)
  2  it could not be done: command line, input file, missing package
"""


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; subparsers inherit it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vitfast: error: {message} (see `{self.prog} --help`)\n")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def _percent(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < 100.0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage of at least 0 and below 100")
    return value


def _shared(seed_of: str, precision: str) -> _Parser:
    from .precision import PRECISIONS

    parent = _Parser(add_help=False)
    parent.add_argument("--precision", choices=list(PRECISIONS), help=precision)
    parent.add_argument(
        "--weights", metavar="FILE", help="checkpoint (.safetensors, .pth, .pt, .bin); default seeded random weights"
    )
    parent.add_argument("--seed", type=int, default=0, help=f"of {seed_of} (default %(default)s)")
    parent.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where torch sees one, else cpu)")
    return parent


def _parser() -> _Parser:
    from . import __version__
    from .layers import KINDS

    common = _Parser(add_help=False)
    # suppressed, so that a subparser's default does not undo what stood before the subcommand
    common.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from"
    )
    parser = _Parser(
        prog="vitfast",
        description="Vision Transformers made fast by fused Triton kernels, and proof that they compute the same.",
        epilog=EPILOGUE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    parser.add_argument("--version", action="version", version=f"vitfast {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="put a photograph through the plain and the accelerated model, and write a page about it",
        description="Put a photograph through a plain Vision Transformer and an accelerated copy: what was replaced, "
        "the error against float64, images per second, an attention-rollout overlay, and one HTML page with all of it.",
        parents=[
            common,
            _shared("the seeded weights", "weights and activations of both models (default fp32 on CPU, bf16 on cuda)"),
        ],
    )
    demo.add_argument("--image", metavar="FILE", help="a photograph (default: the one that matplotlib carries)")
    demo.add_argument("--model", default="vit_base_patch16_224", help="a model name (default %(default)s)")
    demo.add_argument("--out", metavar="DIR", default="vitfast-demo", help="where files go (default ./%(default)s)")
    demo.add_argument("--batch", type=_positive, help="images in a timed batch (default 2 on CPU, 64 on cuda)")
    demo.add_argument(
        "--seconds", type=_seconds, default=8.0, help="time for the throughput measurement (default %(default)g)"
    )
    demo.set_defaults(run=_demo)

    parity = commands.add_parser(
        "parity",
        help="error of every replaced module and of the whole model against float64",
        description="Error of every replaced module and of the whole accelerated model against float64, beside "
        "torch's own error in the same precision. Exit status 1 when the tolerance rule is broken.",
        parents=[common, _shared("the seeded weights and pixels", "what to test (default fp32)")],
    )
    parity.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parity.add_argument("--batch", type=_positive, default=2, help="number of images (default %(default)s)")
    parity.add_argument("--img-size", type=_positive, metavar="N", help="image size (default: the model's own)")
    parity.add_argument("--all", action="store_true", help="one line per module instead of one per kind")
    parity.set_defaults(run=_parity)

    report = commands.add_parser(
        "report",
        help="which modules of a model would be replaced, and why the others not",
        description="Which modules of a model would be replaced, by what, and why the others not. No weights are read "
        "and no memory is taken for them; of a hub's model the configuration alone is downloaded.",
        parents=[common],
    )
    report.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    report.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help=f"some of {', '.join(KINDS)}")
    report.set_defaults(run=_report)

    attend = commands.add_parser(
        "attend",
        help="draw what a model's attention sees of a photograph, layer by layer or head by head",
        description="Draw what the class token attends to in a photograph, from the accelerated model: the mean over "
        "the heads of each layer, or the heads of one layer, and the attention rollout. A model without a class token "
        "shows the mean over its patches.",
        parents=[common, _shared("the seeded weights", "weights and activations (default fp32)")],
    )
    attend.add_argument("image", metavar="IMAGE", help="a photograph")
    attend.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    attend.add_argument("--out", required=True, metavar="FILE", help="the picture to write, such as map.png")
    which = attend.add_mutually_exclusive_group()
    which.add_argument(
        "--layers", nargs="+", type=int, metavar="N", help="layers, negative ones from the end (default: all)"
    )
    which.add_argument("--heads", type=int, metavar="LAYER", help="the heads of this layer, each for itself")
    attend.add_argument("--rollout", action="store_true", help="the attention rollout too")
    attend.set_defaults(run=_attend)

    doctor = commands.add_parser(
        "doctor",
        help="versions, GPUs, how the kernels run here, and what to do about what is missing",
        description="Versions, GPUs, how each kernel runs here, optional packages, and what to do about what is "
        "missing. Exit status 1 when something is broken.",
        parents=[common],
    )
    doctor.set_defaults(run=_doctor)

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
        "--batch", nargs="+", type=_positive, metavar="N", help="batch sizes (default: the suite's; on CPU 1)"
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
    bench.add_argument("--budget", type=_seconds, metavar="SECONDS", help="of timing (default: 10 a workload)")
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
        type=_percent,
        metavar="PERCENT",
        help="exit status 1 if a row broke, or lost more than this of its speed and more than noise; needs rows of "
        "peers in both, such as torch eager",
    )
    compare.set_defaults(run=_compare)

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
        type=_positive,
        default=[1, 256],
        metavar="N",
        help="batch sizes; attention's entries are the last one's (default 1 256)",
    )
    tune.add_argument("--precision", default="bf16", metavar="P", help="fp32, tf32, bf16 or fp16 (default %(default)s)")
    tune.add_argument("--ops", nargs="+", metavar="OP", help="such as linear attention (default: all)")
    tune.add_argument(
        "--budget", type=_seconds, default=600.0, metavar="SECONDS", help="for all of it (default %(default)g)"
    )
    tune.add_argument("--out", metavar="DIR", help="instead of the user's folder, such as kernels/configs of a clone")
    tune.add_argument("--device", help="such as cuda:1 (default: cuda)")
    tune.set_defaults(run=_tune)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from .demo.run import run_demo

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
        log=_progress,
    )
    print(result)
    return 0 if result.ok else 1


def _parity(options: argparse.Namespace) -> int:
    import torch

    from .libraries import has_weights, image_shape
    from .parity import build_model, parity, pick_device

    device = pick_device(options.device)
    model = build_model(options.model, options.weights, img_size=options.img_size, seed=options.seed).to(device)
    channels, *size = image_shape(model)
    if options.img_size:
        size = [options.img_size] * 2
    generator = torch.Generator().manual_seed(options.seed)
    pixels = torch.randn(options.batch, channels, *size, generator=generator).to(device)
    trained = options.weights or (options.model if has_weights(options.model) else None)
    source = f"weights of {trained}" if trained else f"seeded random weights (seed {options.seed})"
    result = parity(model, pixels, options.precision or "fp32")
    shape = "x".join(map(str, result.shape))
    print(f"{options.model}, {source}, {result.precision} on {result.device}, random pixels {shape}")
    print(result.table(each=options.all))
    return 0 if result.ok else 1


def _report(options: argparse.Namespace) -> int:
    import torch

    from . import accelerate, create_model, list_models, report
    from .libraries import build, library_of

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


def _attend(options: argparse.Namespace) -> int:
    from pathlib import Path

    from PIL import Image

    from .accelerate import accelerate
    from .images.photo import load_image
    from .images.view import look
    from .libraries import has_weights
    from .maps.maps import attention_maps
    from .maps.pictures import draw
    from .maps.rollouts import rollout
    from .parity import build_model, pick_device
    from .precision import get_precision

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
    _progress(f"wrote {out}")
    return 0


def _spec(name: str, model: Any) -> Any:
    """How a model wants its images: what the model says, or what lies beside one of Transformers."""
    from pathlib import Path

    from .images.spec import image_spec
    from .libraries import library, library_of

    plain = name.removeprefix("transformers:")
    if library_of(name) != "transformers" or not ("/" in plain or Path(plain).is_dir()):
        return image_spec(model)
    return image_spec(library("transformers").AutoImageProcessor.from_pretrained(plain))


def _doctor(options: argparse.Namespace) -> int:
    from .doctor import doctor

    diagnosis = doctor()
    print(diagnosis)
    return 0 if diagnosis.ok else 1


def _bench(options: argparse.Namespace) -> int:
    from pathlib import Path

    from .benchmarks import registry, report, run
    from .parity import pick_device

    device = pick_device(options.device)
    cuda = device.type == "cuda"
    if options.quick:
        models: tuple[str, ...] = ("vit_tiny_patch16_224",)
        batches: tuple[int, ...] = (1,)
    else:
        models = tuple(registry.MODELS) if cuda else ("vit_tiny_patch16_224", "vit_base_patch16_224")
        batches = registry.BATCHES if cuda else (1,)
    layers = list(options.layers or ["model"])
    if (options.kernels or options.quick) and "kernel" not in layers:
        layers.append("kernel")
    todo = registry.workloads(
        tuple(layers),
        tuple(options.model or models),
        tuple(options.batch or batches),
        tuple(options.precision or (("bf16",) if cuda else ("fp32",))),
    )
    # what is asked for most comes first, so that a budget cuts the rest
    todo.sort(key=lambda workload: layers.index(workload.layer))
    out = Path(options.out)
    with run.Bar(sys.stderr) as bar:
        result = run.run(
            todo,
            out / "results.json",
            device,
            peer_names=None if options.peers is None else tuple(options.peers),
            budget_s=options.budget or (20.0 if options.quick else None),
            quick=options.quick,
            say=bar.say,
            progress=bar.step,
        )
    written = report.write(result, out)
    print(report.markdown(result))
    for path in written:
        _progress(f"wrote {path}")
    return 1 if any(row.status == "failed parity" and row.candidate.startswith("vitfast") for row in result.rows) else 0


def _compare(options: argparse.Namespace) -> int:
    from pathlib import Path

    from .benchmarks.compare import compare
    from .benchmarks.results import load

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

    from .benchmarks.tune import tune
    from .parity import pick_device

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
            say=_progress,
        )
        print(result)
    return 0


def _progress(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    # what a wrong input raises speaks for itself; anything else needs its name
    if not text or not isinstance(error, (ValueError, TypeError, OSError, ImportError)):
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; default `sys.argv[1:]`.

    Returns:
        The exit status, see the module's docstring.
    """
    try:
        options = _parser().parse_args(argv)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
    try:
        status: int = options.run(options)
        # a reader that went away shows here, not at interpreter shutdown
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("vitfast: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if getattr(options, "traceback", False):
            raise
        print(f"vitfast: error: {_one_line(error)}", file=sys.stderr)
        return 2
    return status
