"""Where stages meet: the workspace and one module per verb."""
