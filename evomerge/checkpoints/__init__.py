"""A checkpoint: a language model's tensors, config and tokenizer as files on disk.

Knows nothing of recipes, merge methods or live models.
"""
