"""Fused layers in the place of a model's own, and back: `accelerate`, `restore`, `report`."""
