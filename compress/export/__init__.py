"""Exporters to other formats."""
