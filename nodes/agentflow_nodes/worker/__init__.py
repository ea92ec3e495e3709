"""The worker: receives assignments, runs them, reports their outcomes."""
