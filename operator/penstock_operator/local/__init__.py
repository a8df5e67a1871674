"""The rendered objects run as processes on one machine."""
