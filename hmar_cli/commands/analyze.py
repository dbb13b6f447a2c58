"""`hmar analyze`: the papers' figures and tables, of models and tokenizers that are at hand."""

import typer

from hmar_cli.commands import analyze_next_scale, analyze_sweeps, analyze_tokenizers

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Draw the papers' figures and tables, of models and tokenizers that are at hand.",
)
analyze_next_scale.register(app)
analyze_sweeps.register(app)
analyze_tokenizers.register(app)
