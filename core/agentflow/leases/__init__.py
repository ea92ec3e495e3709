"""Leases: keys that disappear unless their holder writes them again."""
