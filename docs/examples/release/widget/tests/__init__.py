"""The tests of widget."""
