"""The step loops of a prefill stage and of a decode worker."""
