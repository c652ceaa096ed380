"""Merging that changes or rearranges structure: permuted units, widened layers, fewer experts."""
