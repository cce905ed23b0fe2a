"""Kernels in Triton: one source for CUDA devices and for Triton's interpreter on a CPU (docs/gpu-kernels.md)."""
