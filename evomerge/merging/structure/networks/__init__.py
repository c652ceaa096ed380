"""PLeaS of any two networks of torch modules."""
