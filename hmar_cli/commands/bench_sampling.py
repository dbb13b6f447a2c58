"""`hmar bench-sampling`: how fast models of the published sizes draw."""

from pathlib import Path
from typing import Annotated

import typer

from hmar_cli.commands import drawing
from hmar_cli.commands.bench_attention import conclude
from hmar_cli.commands.train import Set

EXAMPLES = """
Measure how long batches of images take, from labels to pixels, with random weights of a recipe's model.

On a GPU without and with `--compile` of `hmar sample`, side by side; the recipe's settings of the
sampler hold, and `--set` changes them. Results go into a folder as they come; Ctrl-C ends it with what was measured.

**Examples**

- `hmar bench-sampling hmar-d16-masked var-d16`
- `hmar bench-sampling hmar-d30-masked --batch-sizes 1,8,64 --compile`
- `hmar bench-sampling himar-b mar-b --batch-sizes 128 --seconds 0`
- `hmar bench-sampling hmar-tiny --device cpu --set sample.cfg=0 --json`
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("bench-sampling", help=EXAMPLES)(bench_sampling)


def bench_sampling(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipes of models that draw classes.", show_default=False)
    ],
    batch_sizes: Annotated[str, typer.Option(help="Images at once, one number or several.")] = "1,8,64",
    compiled: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="One of them alone. [default: both, on a CPU --no-compile]"
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="About how long to time each.")] = 2.0,
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("bench-sampling"),
    overrides: Set = None,
    seed: drawing.Seed = 0,
    precision: drawing.Precision = "auto",
    device: drawing.Device = "",
    as_json: drawing.AsJson = False,
) -> None:
    """Measure; the help text is `EXAMPLES`."""
    from hmar_cli.benchmarks.cases import parse_counts
    from hmar_cli.benchmarks.run import run_sampling
    from hmar_cli.benchmarks.sampling import load
    from hmar_cli.launch import choose_device

    place = choose_device(device)
    both = [False, True] if place.type == "cuda" else [False]
    outcome = run_sampling(
        [load(name, overrides or ()) for name in recipes],
        parse_counts("--batch-sizes", batch_sizes),
        device=place,
        precision=precision,
        compiled=both if compiled is None else [compiled],
        seconds=seconds,
        seed=seed,
        out=out,
    )
    conclude({"sampling": outcome}, as_json)
