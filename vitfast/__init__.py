"""vitfast: a drop-in fast Vision Transformer for PyTorch."""

__version__ = "0.1.0.dev0"
