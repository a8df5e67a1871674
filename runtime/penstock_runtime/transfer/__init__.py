"""Moving bytes between workers, and who owns them meanwhile."""
