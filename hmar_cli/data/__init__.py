"""Image sources, caches of tokens, and the batches made of them."""
