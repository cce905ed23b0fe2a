"""Text sources, token windows, calibration and evaluation streams."""
