"""`hmar analyze`, the analyses of next-scale models: VAR, HMAR and their tokenizers."""

import typer


def register(app: typer.Typer) -> None:
    """Add the commands to `hmar analyze`."""
