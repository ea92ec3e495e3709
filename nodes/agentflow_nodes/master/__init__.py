"""The master: follows a namespace's log, stands by, and leads where it holds the lease."""
