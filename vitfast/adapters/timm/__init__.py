"""timm: fused layers in the place of its classes."""
