"""Quantized + low-rank weights: grids, packing, decomposition, modules."""
