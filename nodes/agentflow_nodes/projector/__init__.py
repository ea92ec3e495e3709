"""The projector node: histories of namespaces in DuckDB files."""
