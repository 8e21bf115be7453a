"""torchvision: fused layers in the place of its classes."""
