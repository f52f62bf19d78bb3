"""Routed layers as operators of our own for ONNX Runtime: C from the CPU kernels, compiled."""

DOMAIN = "sparsify"  # of the operators
