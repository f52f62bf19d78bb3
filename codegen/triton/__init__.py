"""Triton kernels of the routed ops: CUDA and ROCm, checked in the interpreter without a GPU."""
