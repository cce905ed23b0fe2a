"""Perplexity, memory and latency."""
