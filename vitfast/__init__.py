"""vitfast: a drop-in fast Vision Transformer for PyTorch."""

from .accelerate import Report, accelerate, report, restore
from .architectures import create_model, list_models
from .images.spec import ImageSpec, image_spec
from .images.transforms import preprocess
from .maps.gradients import grad_rollout
from .maps.maps import attention_maps
from .maps.pictures import overlay
from .maps.rollouts import rollout
from .model import VisionTransformer
from .parity import compare, parity
from .register import register
from .weights import load_weights

__version__ = "0.1.0.dev0"

__all__ = [
    "ImageSpec",
    "Report",
    "VisionTransformer",
    "accelerate",
    "attention_maps",
    "compare",
    "create_model",
    "grad_rollout",
    "image_spec",
    "list_models",
    "load_weights",
    "overlay",
    "parity",
    "preprocess",
    "register",
    "report",
    "restore",
    "rollout",
]
