"""What leaves the workspace: a model folder with a card, in the form others can load, and its way to the hub."""
