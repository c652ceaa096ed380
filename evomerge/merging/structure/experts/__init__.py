"""Experts of one mixture grouped, merged, compressed, and loaded again."""
