"""Proof that an accelerated model computes what the plain one does, and the models that it is asked of."""
