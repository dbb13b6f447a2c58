"""The `hmar` command: registers one command per file of `hmar_cli.commands`, and nothing else."""

import sys
from typing import Any

import typer
from typer.core import TyperGroup

from hmar_cli.commands import checkpoint, curves, finetune_masked, recipes, sample, tokenize, train
from hmar_cli.errors import UserError, from_os_error


class Group(TyperGroup):
    """Shows a `UserError` as one line and a hint on standard error, with exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except OSError as error:
            fail(from_os_error(error), 2)
        except UserError as error:
            fail(error, 2)
        except KeyboardInterrupt:
            fail(UserError("interrupted", "run the same command again to go on where it stopped"), 130)


def fail(error: UserError, code: int) -> None:
    """Print the error and leave with `code`."""
    lines = [f"error: {' '.join(str(error).split())}", *(f"  {detail}" for detail in error.details)]
    if error.hint:
        lines.append(f"hint: {error.hint}")
    print("\n".join(lines), file=sys.stderr)
    raise typer.Exit(code)


app = typer.Typer(
    cls=Group,
    name="hmar",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Autoregressive image generation: HMAR and VAR, from raw images to samples.",
    epilog="Start with `hmar recipes list`, or see the README for a command for each job.",
)
for module in (tokenize, train, finetune_masked, sample, curves):
    module.register(app)
app.add_typer(recipes.app, name="recipes")
app.add_typer(checkpoint.app, name="checkpoint")


def main() -> None:
    """Entry point of the `hmar` command."""
    app()
