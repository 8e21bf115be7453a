"""Checkpoint files for the reference model: `load` reads them, a file for each format gives their tensors our names."""
