"""Trainers, their configurations, and what a training step needs beside the model."""
