"""Which units any network has, found by following axes through its graph."""
