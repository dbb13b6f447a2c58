"""The commands: flags become one call into the core. Heavy imports stay inside the functions."""
