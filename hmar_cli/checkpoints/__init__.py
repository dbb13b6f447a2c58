"""Checkpoints: the format of this project, and readers of published ones."""
