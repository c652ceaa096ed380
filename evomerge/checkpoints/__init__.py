"""A checkpoint: a language model's tensors, config and tokenizer as files on disk.

Knows nothing of recipes, merge methods or live models.
"""

from evomerge.checkpoints.checkpoint import Checkpoint, Scan

__all__ = ["Checkpoint", "Scan"]
