"""Attention over paged KV: the interface, then one backend a file."""
