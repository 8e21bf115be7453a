"""The reference Vision Transformer, its named configurations and its checkpoints, in torch alone."""
