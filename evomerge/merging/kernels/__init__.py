"""Fused loops that carry out a `Program` on tensors as they are stored, one module per device."""
