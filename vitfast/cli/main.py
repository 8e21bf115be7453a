"""The `vitfast` command.

Exit statuses: 0 all is well, 1 the tolerance rule or the installation is broken or a benchmark became slower, 2 it
could not be done (the command line, a file, a missing package), 130 interrupted, 141 whoever read the output went away.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from .arguments import make_parser


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
    options = None
    try:
        options = make_parser().parse_args(argv)
        status: int = options.run(options)
        # a reader that went away shows here, not at interpreter shutdown
        sys.stdout.flush()
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else 2
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
