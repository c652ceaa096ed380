"""Merging: a recipe in, merged tensors out. Has never heard of studies, trials or scores."""
