"""vitfast: a drop-in fast Vision Transformer for PyTorch."""

from .doors.register import register
from .images.spec import ImageSpec, image_spec
from .images.transforms import preprocess
from .maps.gradients import grad_rollout
from .maps.maps import attention_maps
from .maps.pictures import overlay
from .maps.rollouts import rollout
from .proof.parity import parity
from .reference.architectures import create_model, list_models
from .reference.vit import VisionTransformer
from .reference.weights.load import load_weights
from .rule import compare
from .swap.accelerate import accelerate, refresh, restore
from .swap.report import Report, report

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
    "refresh",
    "register",
    "report",
    "restore",
    "rollout",
]
