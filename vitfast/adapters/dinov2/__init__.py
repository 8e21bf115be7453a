"""dinov2: fused layers in the place of its classes."""
