"""The archiver node: the log of a namespace, sealed by day, and trimmed."""
