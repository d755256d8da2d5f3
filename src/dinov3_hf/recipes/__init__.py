"""Recipes as package data: one YAML page each, given to the scripts by name."""
