"""Training: one trainer for every objective."""
