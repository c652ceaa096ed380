"""Merging that learns from data: what is fitted once, and the merge methods that apply it."""
