"""The papers' analyses of models and tokenizers: each gives rows of numbers and a figure."""
