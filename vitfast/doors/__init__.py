"""Doors of other packages that lead to the kernels: Transformers' attention, timm's registry, `kernelize`."""
