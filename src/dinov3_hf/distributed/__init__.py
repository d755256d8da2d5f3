"""Reductions over the processes of a run."""
