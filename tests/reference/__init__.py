"""Checks against recorded numbers of the original implementation: `python -m tests.reference --help`."""
