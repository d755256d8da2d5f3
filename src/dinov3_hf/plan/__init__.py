"""Arithmetic of memory, time and cost, without torch."""
