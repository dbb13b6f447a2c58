"""Image tokenizers and their training losses."""
