"""Structured pruning, quantization with low-rank factors, and adapter recovery for language models."""
