"""The demo: a photograph through a plain and an accelerated model, and a page about it."""

from .result import DemoResult
from .run import run_demo

__all__ = ["DemoResult", "run_demo"]
