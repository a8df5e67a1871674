"""The executor for Kubernetes: watches, a work queue, one reconcile of a service at a time."""
