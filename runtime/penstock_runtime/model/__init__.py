"""Architectures, shared layers and weights."""
