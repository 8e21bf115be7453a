"""vitfast: a drop-in fast Vision Transformer for PyTorch."""

from .accelerate import Report, accelerate, report, restore
from .architectures import create_model, list_models
from .model import VisionTransformer
from .parity import compare
from .weights import load_weights

__version__ = "0.1.0.dev0"

__all__ = [
    "Report",
    "VisionTransformer",
    "accelerate",
    "compare",
    "create_model",
    "list_models",
    "load_weights",
    "report",
    "restore",
]
