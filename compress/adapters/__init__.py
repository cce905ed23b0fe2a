"""Attach, train, recover and merge low-rank adapters."""
