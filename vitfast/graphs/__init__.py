"""CUDA graphs of a model's whole forward."""
