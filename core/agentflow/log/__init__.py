"""The log: its port and its adapters."""
