"""Sampling: what proposes genomes, told how earlier ones did."""
