"""`hmar bench-attention`: how fast attention over scales is, and the papers' figures on it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.commands.flags import named
from hmar_cli.errors import UserError

if TYPE_CHECKING:
    import torch

    from hmar_cli.benchmarks.cases import Grid
    from hmar_cli.benchmarks.run import Outcome

EXAMPLES = """
Measure attention over scales: every implementation is compared with the reference in float64, then timed.

One that is wrong gets no speed, but its error, and the exit code is 1. Speed-ups are over PyTorch's attention with a
dense mask (`masked`), as in HMAR's Fig. 11. Results go into a folder: `speed.json`, which grows row by row, and a
bar chart for each pattern. Ctrl-C ends it with what was measured. Without a GPU a small pass runs on the CPU.

`--preset paper` is the grid of Fig. 11, `--preset h100` that of docs/attention.md; other flags change parts of it.

**Examples**

- `hmar bench-attention`
- `hmar bench-attention --preset paper --heads 24 --out bench/paper`
- `hmar bench-attention --preset h100 --json > h100.json`
- `hmar bench-attention --resolutions 512 --pattern diagonal --implementations masked,triton --forward`
- `hmar bench-attention --sides 1,2,3x4,6x8 --batch 8 --heads 16 --dtypes bf16,fp16 --normalise on,off`
- `hmar bench-attention --train-step hmar-d16,hmar-d24-512`
- `hmar bench-attention --sequence-lengths`
- `hmar bench-attention --patterns --sides 1,2,3,4`
- `hmar bench-attention --tune --resolutions 256`
"""


EVERYWHERE = {"out", "device", "as_json"}
TAKES = {
    "train_step": {"implementations", "batch", "compiled", "seconds", "seed"},
    "sequence_lengths": {"resolutions"},
    "patterns": {"resolutions", "sides", "preset"},
    "tune": {
        "resolutions",
        "sides",
        "pattern",
        "dtypes",
        "batch",
        "heads",
        "head_size",
        "normalise",
        "preset",
    },
}
"""What goes with each flag that does something else instead."""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("bench-attention", help=EXAMPLES)(bench_attention)


def bench_attention(
    ctx: typer.Context,
    resolutions: Annotated[str, typer.Option(help="Pixels, of 256,512,1024: the papers' scale lists.")] = "",
    sides: Annotated[
        list[str] | None, typer.Option(help="A scale list of your own, such as 1,2,3x4; may be repeated.")
    ] = None,
    pattern: Annotated[str, typer.Option(help="Of diagonal (HMAR), causal (VAR).")] = "",
    dtypes: Annotated[str, typer.Option(help="Of bf16, fp16, fp32.")] = "",
    batch: Annotated[int, typer.Option(min=0, help="Images; 0 is the preset's.")] = 0,
    heads: Annotated[str, typer.Option(help="Heads, one number or several.")] = "",
    head_size: Annotated[int, typer.Option(min=0, help="Numbers a head; 0 is 64.")] = 0,
    normalise: Annotated[str, typer.Option(help="Queries and keys normalised: on, off or on,off.")] = "",
    implementations: Annotated[str, typer.Option(help="By name. [default: all but reference]")] = "",
    forward: Annotated[bool, typer.Option("--forward", help="The forward pass alone.")] = False,
    backward: Annotated[bool, typer.Option("--backward", help="The backward pass alone.")] = False,
    preset: Annotated[str, typer.Option(help="A grid of shapes: paper or h100.")] = "",
    train_step: Annotated[str, typer.Option(help="Time training steps of these recipes instead.")] = "",
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="For --train-step. [default: the recipe's]")
    ] = None,
    sequence_lengths: Annotated[
        bool, typer.Option("--sequence-lengths", help="Draw sequence lengths instead (Figs 7 and 8).")
    ] = False,
    patterns: Annotated[
        bool, typer.Option("--patterns", help="Draw attention patterns instead (Fig. 10).")
    ] = False,
    tune: Annotated[bool, typer.Option("--tune", help="Look for better tiles of `triton` instead.")] = False,
    seconds: Annotated[float, typer.Option(min=0.0, help="About how long to time each.")] = 0.5,
    out: Annotated[Path, typer.Option(help="Folder for results and charts.")] = Path("bench-attention"),
    seed: Annotated[int, typer.Option(min=0, help="Of all random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda. [default: a GPU where there is one]")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Measure; the help text is `EXAMPLES`."""
    from hmar_cli.benchmarks.cases import change
    from hmar_cli.launch import choose_device

    check_flags(ctx)
    place = choose_device(device)
    grid = change(
        base_grid(preset, place),
        resolutions=resolutions,
        sides=sides or (),
        pattern=pattern,
        dtypes=dtypes,
        batch=batch,
        heads=heads,
        head_size=head_size,
        normalise=normalise,
    )
    names = choose_implementations(implementations)
    done: dict[str, Outcome] = {}
    if sequence_lengths:
        done["sequence_lengths"] = draw_lengths(resolutions, out)
    if patterns:
        done["patterns"] = draw_patterns(grid, bool(resolutions or sides or preset), out)
    timing: dict[str, Any] = {"device": place, "seconds": seconds, "seed": seed, "out": out}
    if tune:
        from hmar_cli.benchmarks.run import run_tuning

        done["tune"] = run_tuning(grid.cases(), place, out)
    if train_step:
        done["train_step"] = time_steps(train_step, names, batch, compiled, timing)
    if not done:
        directions = [d for d, asked in (("forward", forward), ("backward", backward)) if asked]
        done["speed"] = time_attention(grid, names, directions or ["forward", "backward"], timing)
    conclude(done, as_json)


def check_flags(ctx: typer.Context) -> None:
    """Refuse flags that would have no effect.

    Raises:
        UserError: one that goes with attention's speed beside one that asks for something else, or the reverse.
    """
    given = named(ctx)
    if chosen := [name for name in given if name in TAKES]:
        known = EVERYWHERE.union(chosen, *(TAKES[name] for name in chosen))
        if foreign := [flag for name, flag in given.items() if name not in known]:
            flags = " and ".join(given[name] for name in chosen)
            raise UserError(f"no use for {', '.join(foreign)} beside {flags}", "leave one of them out")
    elif "compiled" in given:
        raise UserError("no use for --compile or --no-compile without --train-step", "leave it out")


def base_grid(preset: str, device: "torch.device") -> "Grid":
    """The grid that other flags change: a preset's, or what the device can do in a short time.

    Raises:
        UserError: an unknown preset.
    """
    from hmar_cli.benchmarks.cases import DEFAULT, PRESETS, SMALL

    if preset and preset not in PRESETS:
        raise UserError(f"--preset {preset}: unknown", f"choose from {', '.join(PRESETS)}")
    if device.type != "cuda":
        return SMALL
    return PRESETS[preset] if preset else DEFAULT


def choose_implementations(text: str) -> tuple[str, ...]:
    """Names of implementations.

    Raises:
        UserError: an unknown one.
    """
    from hmar_kernels import IMPLEMENTATIONS

    from hmar_cli.benchmarks.cases import parse_list
    from hmar_cli.benchmarks.run import TIMED

    return parse_list("--implementations", text, IMPLEMENTATIONS) if text else TIMED


def time_attention(
    grid: "Grid", names: tuple[str, ...], directions: list[str], timing: dict[str, Any]
) -> "Outcome":
    """Time attention."""
    from hmar_cli.benchmarks.run import run_speed
    from hmar_cli.console import console

    if timing["device"].type != "cuda":
        console.print("no GPU: a small pass on the CPU, whose times say nothing about a GPU", highlight=False)
    return run_speed(grid.cases(), names, directions=directions, **timing)


def time_steps(
    text: str, names: tuple[str, ...], batch: int, compiled: bool | None, timing: dict[str, Any]
) -> "Outcome":
    """Time training steps of recipes."""
    from hmar_cli.benchmarks.run import run_steps
    from hmar_cli.benchmarks.train_step import load

    recipes = [load(name.strip()) for name in text.split(",")]
    return run_steps(recipes, names, batch=batch, compiled=compiled, **timing)


def draw_lengths(resolutions: str, out: Path) -> "Outcome":
    """Figs 7 and 8."""
    from hmar_cli.benchmarks.run import run_lengths

    return run_lengths([int(pixels) for pixels in (resolutions or "256").split(",")], out)


def draw_patterns(grid: "Grid", chosen: bool, out: Path) -> "Outcome":
    """Fig. 10, of the lists that flags have chosen, or of a small one whose tokens can be seen and of 256 px."""
    from hmar_cli.benchmarks.cases import at_resolutions, parse_sides
    from hmar_cli.benchmarks.run import run_patterns

    lists = grid.scales if chosen else {"1,2,3,4": parse_sides("1,2,3,4"), **at_resolutions([256])}
    return run_patterns(lists, out)


def conclude(done: "dict[str, Outcome]", as_json: bool) -> None:
    """Print what was done, and leave with 130 after Ctrl-C, with 1 if an implementation was wrong or failed."""
    from hmar_cli.benchmarks.tables import console as tables
    from hmar_cli.console import console

    if as_json:
        print(json.dumps({name: outcome.document for name, outcome in done.items()}, indent=2))
    else:
        for table in (table for outcome in done.values() for table in outcome.tables):
            tables().print(table)
    for outcome in done.values():
        for line in outcome.notes:
            console.print(line, highlight=False)
        console.print(f"written: {', '.join(map(str, outcome.files))}", highlight=False)
    if any(outcome.interrupted for outcome in done.values()):
        console.print("interrupted: this is what was measured so far", highlight=False)
        raise typer.Exit(130)
    if any(outcome.faulty for outcome in done.values()):
        raise typer.Exit(1)
