"""Layers of a merged network set right on data: least squares, batch norms, REPAIR."""
