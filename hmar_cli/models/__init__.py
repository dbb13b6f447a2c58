"""The models. Modules take plain arguments, never a recipe, and import only PyTorch and `hmar_kernels`."""
