"""Merge methods: one file each, pure tensor maths, parameters declared as data."""
