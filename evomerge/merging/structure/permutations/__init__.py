"""Permutations of units: as data, applied, and found by matching two networks."""
