"""Autoregressive image generation from the command line: HMAR and VAR."""

__version__ = "0.1.0"
