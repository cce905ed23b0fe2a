"""Kernel dispatch and reference implementations."""
