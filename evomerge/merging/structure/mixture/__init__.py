"""Dense models made the experts of a mixture."""
