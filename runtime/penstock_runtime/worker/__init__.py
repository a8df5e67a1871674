"""The worker process: launch, control server, health and metrics."""
