"""Pure scheduling: cost model, chunk plans, batches. No torch, no I/O."""
