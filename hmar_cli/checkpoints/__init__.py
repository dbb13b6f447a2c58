"""Checkpoints: the format of this project, and readers and writers of published ones."""
