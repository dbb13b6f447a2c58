"""Autoregressive image generation from the command line: HMAR, VAR, Hi-MAR and MAR."""

__version__ = "0.1.0"
