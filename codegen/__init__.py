"""Lowerings of the routed ops, each held against the eager meaning in ``sparsify.runtime``."""
