"""Pure optimisation with numpy and scipy; knows nothing of models."""
