"""The control plane: one manifest in, objects and honest conditions out."""
