"""Scoring: a live model in, a Score out."""
