"""PLeaS of two checkpoints: the fit, and the model that a recipe makes of it."""
