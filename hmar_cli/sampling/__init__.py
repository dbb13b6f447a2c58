"""Samplers: free functions of (model, labels, settings, noise)."""
