"""CUDA C++ kernels for the products with few tokens, compiled on first use by NVRTC, which torch brings along."""
