"""The KV cache: layout, page pool, prefix cache."""
