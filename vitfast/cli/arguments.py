"""What the command line takes. Other packages add commands through the entry points `vitfast.commands`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any, NoReturn

from . import models

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


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; subparsers inherit it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vitfast: error: {message} (see `{self.prog} --help`)\n")


def _number(kind: type, accepts: Callable[[Any], bool], what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


positive = _number(int, lambda value: value >= 1, "a positive integer")
seconds = _number(float, lambda value: 0.0 < value < float("inf"), "a positive number of seconds")
percent = _number(float, lambda value: 0.0 <= value < 100.0, "a percentage of at least 0 and below 100")


def shared(seed_of: str, precision: str) -> Parser:
    """Parent of the commands that build a model: what the seed is of, and what the precision is for."""
    from ..swap.precision import PRECISIONS

    parent = Parser(add_help=False)
    parent.add_argument("--precision", choices=list(PRECISIONS), help=precision)
    parent.add_argument(
        "--weights", metavar="FILE", help="checkpoint (.safetensors, .pth, .pt, .bin); default seeded random weights"
    )
    parent.add_argument("--seed", type=int, default=0, help=f"of {seed_of} (default %(default)s)")
    parent.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where torch sees one, else cpu)")
    return parent


def make_parser() -> Parser:
    """The parser of the whole command line; `run` of what it parses is the function to call."""
    from .. import __version__
    from ..layers import KINDS

    common = Parser(add_help=False)
    # suppressed, so that a subparser's default does not undo what stood before the subcommand
    common.add_argument(
        "--traceback", action="store_true", default=argparse.SUPPRESS, help="show where an error comes from"
    )
    parser = Parser(
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
            shared("the seeded weights", "weights and activations of both models (default fp32 on CPU, bf16 on cuda)"),
        ],
    )
    demo.add_argument("--image", metavar="FILE", help="a photograph (default: the one that matplotlib carries)")
    demo.add_argument("--model", default="vit_base_patch16_224", help="a model name (default %(default)s)")
    demo.add_argument("--out", metavar="DIR", default="vitfast-demo", help="where files go (default ./%(default)s)")
    demo.add_argument("--batch", type=positive, help="images in a timed batch (default 2 on CPU, 64 on cuda)")
    demo.add_argument(
        "--seconds", type=seconds, default=8.0, help="time for the throughput measurement (default %(default)g)"
    )
    demo.set_defaults(run=models.demo_command)

    parity = commands.add_parser(
        "parity",
        help="error of every replaced module and of the whole model against float64",
        description="Error of every replaced module and of the whole accelerated model against float64, beside "
        "torch's own error in the same precision. Exit status 1 when the tolerance rule is broken.",
        parents=[common, shared("the seeded weights, pixels and draws", "what to test (default fp32)")],
    )
    parity.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parity.add_argument("--batch", type=positive, default=2, help="number of images (default %(default)s)")
    parity.add_argument("--img-size", type=positive, metavar="N", help="image size (default: the model's own)")
    parity.add_argument("--all", action="store_true", help="one line per module instead of one per kind")
    parity.set_defaults(run=models.parity_command)

    report = commands.add_parser(
        "report",
        help="which modules of a model would be replaced, and why the others not",
        description="Which modules of a model would be replaced, by what, and why the others not. No weights are read "
        "and no memory is taken for them; of a hub's model the configuration alone is downloaded.",
        parents=[common],
    )
    report.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    report.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help=f"some of {', '.join(KINDS)}")
    report.set_defaults(run=models.report_command)

    attend = commands.add_parser(
        "attend",
        help="draw what a model's attention sees of a photograph, layer by layer or head by head",
        description="Draw what the class token attends to in a photograph, from the accelerated model: the mean over "
        "the heads of each layer, or the heads of one layer, and the attention rollout. A model without a class token "
        "shows the mean over its patches.",
        parents=[common, shared("the seeded weights", "weights and activations (default fp32)")],
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
    attend.set_defaults(run=models.attend_command)

    doctor = commands.add_parser(
        "doctor",
        help="versions, GPUs, how the kernels run here, and what to do about what is missing",
        description="Versions, GPUs, how each kernel runs here, optional packages, and what to do about what is "
        "missing. Exit status 1 when something is broken.",
        parents=[common],
    )
    doctor.set_defaults(run=models.doctor_command)

    for command in sorted(entry_points(group="vitfast.commands"), key=lambda entry: entry.name):
        command.load()(commands, common)
    return parser
