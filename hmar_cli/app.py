"""The `hmar` command: registers one command per file of `hmar_cli.commands`, and nothing else."""

import errno
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from hmar_cli.commands import (
    analyze,
    bench_attention,
    bench_sampling,
    checkpoint,
    curves,
    edit,
    eval,
    finetune_masked,
    recipes,
    sample,
    tokenize,
    train,
)
from hmar_cli.errors import UserError, from_os_error
from hmar_cli.launch import keep_stdout_for_data, let_first_process_speak, wait_for_launcher

USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
"""What Typer raises about flags and arguments; it gives a public name to some of its subclasses only."""


class Group(TyperGroup):
    """Shows every mistake of the user's as one line and a hint on standard error, with exit code 2."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        """Read the flags before the command."""
        try:
            return super().make_context(*args, **kwargs)
        except USAGE_ERROR as error:
            fail(from_usage_error(error), 2)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command."""
        try:
            return super().invoke(ctx)
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of a pipe has seen enough: Typer ends quietly
                raise
            fail(from_os_error(error), 2)
        except USAGE_ERROR as error:
            fail(from_usage_error(error), 2)
        except RuntimeError as error:
            wait_for_launcher(error)
            if type(error).__name__ != "OutOfMemoryError":  # of PyTorch, which is not imported here
                raise
            fail(UserError(f"the GPU is out of memory: {error}", "lower the batch size"), 2)
        except UserError as error:
            fail(error, 2)
        except KeyboardInterrupt:
            fail(UserError("interrupted", "run the same command again to go on where it stopped"), 130)


def from_usage_error(error: Any) -> UserError:
    """Turn Typer's complaint about a flag or an argument into one line; a call for help goes on to Typer."""
    if type(error).__name__ == "NoArgsIsHelpError":
        raise error
    command = error.ctx.command_path if error.ctx else "hmar"
    return UserError(
        error.format_message().rstrip("."), f"`{command} --help` shows every flag, with examples"
    )


def fail(error: UserError, code: int) -> NoReturn:
    """Print the error and leave with `code`."""
    let_first_process_speak()
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
    help="Autoregressive image generation: HMAR, VAR, Hi-MAR and MAR, from raw images to samples.",
    epilog="Start with `hmar recipes list`, or see the README for a command for each job.",
)
for module in (tokenize, train, finetune_masked, sample, edit, curves, bench_attention, bench_sampling):
    module.register(app)
app.add_typer(recipes.app, name="recipes")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(eval.app, name="eval")
app.add_typer(analyze.app, name="analyze")


def main() -> None:
    """Entry point of the `hmar` command."""
    keep_stdout_for_data()
    app()
