"""The runtime: prefill pipelines and decode workers."""
