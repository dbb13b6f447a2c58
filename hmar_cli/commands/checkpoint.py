"""`hmar checkpoint`: import and export published formats, and say what a checkpoint is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.imports import Published
    from hmar_cli.settings import Recipe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Import and export published formats, and say what a checkpoint is.",
)

FormatName = Literal["var", "hmar", "msvq", "mar", "himar", "kl"]
"""The formats of `hmar_cli.imports.FORMATS`, spelled out so that help imports no torch."""

IMPORT_HELP = """
Read a file that the authors of VAR, HMAR, MAR or Hi-MAR published, rename its tensors and write a checkpoint folder.

Nothing is downloaded, and nothing but tensors is used; a file whose pickle holds more than tensors, plain values
and a run's arguments is refused unread. Every key of the file is accounted for. The licence of the weights is
stated and kept with them: those of VAR, MAR and their tokenizers are MIT, HMAR's are for non-commercial use,
Hi-MAR's authors state none.

Of a training checkpoint of MAR or Hi-MAR both the raw and the averaged weights are kept; `hmar sample` takes the
averaged ones. Their settings are those of the recipe, mar-b, himar-l and so on by the width of the model.

**Examples**

- `hmar checkpoint import vae_ch160v4096z32.pth --format msvq --out checkpoints/msvq-256`
- `hmar checkpoint import var_d16.pth --format var --tokenizer checkpoints/msvq-256 --out checkpoints/var-d16`
- `hmar checkpoint import hmar-d16.pth --format hmar --tokenizer checkpoints/msvq-256 --out checkpoints/hmar-d16`
- `hmar checkpoint import masked.pth --format hmar --base next-scale.pth --out checkpoints/merged`
- `hmar checkpoint import kl16.ckpt --format kl --out checkpoints/kl-16`
- `hmar checkpoint import checkpoint-last.pth --format himar --tokenizer checkpoints/kl-16 --out checkpoints/himar-b`
"""

EXPORT_HELP = """
Write weights trained here to a file as the authors of VAR, HMAR, MAR or Hi-MAR publish theirs: the way back of
`hmar checkpoint import`, for code that reads their files.

The format is that of the checkpoint: `var`, `hmar`, `msvq`, `mar`, `himar` or `kl`. With `--format msvq` or `kl`, a
model's checkpoint gives the tokenizer that it carries. An HMAR with a masked branch is one merged file; with `--base`
it is two, the masked model and the next-scale model, as import reads them.

Averaged weights are written where there are any, or those of `--weights`. PyTorch files of MAR and Hi-MAR hold both
sets, as `model` and `model_ema`, those of KL-16 one as `model`; other files, and all safetensors files, are plain.
Buffers that follow from the settings are written too; a tokenizer's counts of how often training met each code are
zeros. What no file holds, such as the scales or the latent scale, is printed: tell it to the code that reads the
file. Weights that were imported, and what was trained from them, keep their licence.

**Examples**

- `hmar checkpoint export runs/var --out var.pth`
- `hmar checkpoint export runs/var --format msvq --out vae.pth`
- `hmar checkpoint export runs/hmar-masked --out hmar.safetensors --weights model`
- `hmar checkpoint export runs/hmar-masked --out masked.pth --base next-scale.pth`
- `hmar checkpoint export runs/himar --out checkpoint-last.pth --json`
"""

INSPECT_HELP = """
Say what a checkpoint is: its kind, recipe, step, classes, parameters, tokenizer, origin and licence.

**Examples**

- `hmar checkpoint inspect runs/hmar-tiny`
- `hmar checkpoint inspect checkpoints/var-d16 --json`
"""


@app.command("import", help=IMPORT_HELP)
def import_(
    file: Annotated[Path, typer.Argument(help="The published file: .pth, .pt, .bin or .safetensors.")],
    format: Annotated[FormatName, typer.Option(help="Whose format it is.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Checkpoint of the tokenizer, carried along with a model.")
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="Recipe of a MAR or Hi-MAR of another size: a name or a path.")
    ] = "",
    base: Annotated[
        Path | None, typer.Option(help="Next-scale file to merge a masked model (--format hmar) with.")
    ] = None,
    masked_layers: Annotated[int, typer.Option(min=1, help="Late blocks of a masked model to merge.")] = 8,
    scales: Annotated[
        str, typer.Option(help="Sides of the scales, as 1,2,3,4. [default: the published]")
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON.")] = False,
) -> None:
    """Import a published file; the help text is `IMPORT_HELP`."""
    from hmar_cli.imports import import_file

    if out.exists():
        raise UserError(f"{out} exists", "choose another --out, or remove it")
    _require_use(format, recipe, scales, tokenizer)
    published = import_file(
        file,
        format,
        out,
        tokenizer=tokenizer,
        recipe=recipe,
        base=base,
        masked_layers=masked_layers,
        scales=scales,
    )
    _tell(published, out, as_json)


def _require_use(format: str, recipe: str, scales: str, tokenizer: Path | None) -> None:
    """Refuse options that the format has no use for.

    Raises:
        UserError: there is one.
    """
    from hmar_cli.imports import FORMATS

    about = FORMATS[format]
    if recipe and about.kind != "masked":
        raise UserError("--recipe is for --format mar and himar alone", "leave out --recipe")
    if scales and not about.has_scales:
        raise UserError(f"--scales: files of the format {format} have no scales", "leave out --scales")
    if tokenizer is not None and about.is_tokenizer:
        raise UserError("--tokenizer: this file is a tokenizer itself", "leave out --tokenizer")


def _tell(published: "Published", out: Path, as_json: bool) -> None:
    """Account for every key of the file, state the licence, and say if a model came without tokenizer."""
    from hmar_cli.console import console

    weights, licence = published.weights, published.format.licence
    imported = weights["model"]
    account = {
        "format": imported.format,
        "weights": list(weights),
        "imported": len(imported.state),
        "derived": imported.derived,
        "shared": imported.shared,
        "unused": imported.unused,
        "parameters": sum(t.numel() for t in imported.state.values()),
        "licence": licence,
        "checkpoint": str(out),
    }
    parts = [f"{len(imported.state)} tensors imported" + (", averaged ones too" if len(weights) > 1 else "")]
    if imported.shared:
        parts.append(f"{len(imported.shared)} that both files share")
    if imported.unused:
        parts.append(f"{len(imported.unused)} that only training used left out")
    console.print(f"{', '.join(parts)}, {len(imported.derived)} derived buffers left out, none unknown")
    console.print(f"licence of these weights: {licence}")
    if published.tokenizer is None and not published.format.is_tokenizer:
        console.print("no --tokenizer was given: pass one to `hmar sample --tokenizer`")
    if as_json:
        print(json.dumps(account, indent=2))
    else:
        print(out)


def _tokens(recipe: "Recipe") -> dict[str, Any]:
    """What an image's tokens are: scales of codes, or grids of latents; nothing for a classifier."""
    from hmar_cli.settings import Classifier, Kl

    if isinstance(recipe.model, Classifier):
        return {}
    if not isinstance(recipe.tokenizer, Kl):
        return {"scales": list(recipe.tokenizer.scales)}
    return {
        "grid": list(recipe.grid),
        "pivot_grid": list(recipe.pivot_grid) if recipe.pivot_grid else None,
        "latent_channels": recipe.tokenizer.z_channels,
        "latent_scale": recipe.tokenizer.latent_scale or None,
    }


def _words(value: Any) -> str:
    """A value as the table shows it; empty where there is none."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(each)}" for key, each in value.items())
    if isinstance(value, list | tuple):  # a list inside it is a grid
        return ", ".join("x".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in value)
    return "" if value is None else str(value)


@app.command("inspect", help=INSPECT_HELP)
def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint or run folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Describe a checkpoint; the help text is `INSPECT_HELP`."""
    from hmar_cli.checkpoints.store import find_checkpoint, open_checkpoint

    checkpoint = open_checkpoint(find_checkpoint(path))
    recipe = checkpoint.recipe
    names = checkpoint.class_names
    about: dict[str, Any] = {
        "checkpoint": str(checkpoint.folder),
        "kind": checkpoint.kind,
        "recipe": recipe.name,
        "step": checkpoint.step,
        "weights": list(checkpoint.weights),
        "parameters": checkpoint.parameters(),
        "size": recipe.data.size,
        **_tokens(recipe),
        "classes": len(names),
        "class_names": list(names),
        "masked_branch": recipe.objective.kind == "masked" if checkpoint.kind == "next-scale" else None,
        "resumable": checkpoint.resumable,
        "tokenizer_hash": checkpoint.tokenizer_hash,
        "tokenizer": "carried" if checkpoint.tokenizer else None,
        "licence": checkpoint.licence or "your own",
        "source": checkpoint.source,
    }
    if as_json:
        print(json.dumps(about, indent=2, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    shown = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # a long hash goes on in the next line
    grids = {key: [about[key]] for key in ("size", "grid", "pivot_grid") if about.get(key)}
    for key, value in (about | grids | {"class_names": shown}).items():
        if text := f"{value:,}" if key == "parameters" else _words(value):
            table.add_row(key.replace("_", " "), text)
    Console(markup=False).print(table)


@app.command("export", help=EXPORT_HELP)
def export(
    path: Annotated[Path, typer.Argument(help="Checkpoint or run folder.")],
    out: Annotated[Path, typer.Option(help="File to write: .pth, .pt, .bin, .ckpt or .safetensors.")],
    format: Annotated[
        FormatName | None, typer.Option(help="Whose format it is. [default: the checkpoint's]")
    ] = None,
    weights: Annotated[
        Literal["model", "ema"] | None, typer.Option(help="Raw or averaged weights. [default: averaged]")
    ] = None,
    base: Annotated[
        Path | None, typer.Option(help="Write an HMAR's next-scale model here, its masked model to --out.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the account as JSON.")] = False,
) -> None:
    """Export a checkpoint; the help text is `EXPORT_HELP`."""
    from hmar_cli.console import console
    from hmar_cli.exports import export_file

    exported = export_file(path, out, format=format or "", weights=weights or "", base=base)
    account = {
        "format": exported.format,
        "weights": list(exported.weights),
        "tensors": {str(file): count for file, count in exported.tensors.items()},
        "not_in_the_file": exported.settings,
        "licence": exported.licence or "your own",
    }
    for file, count in exported.tensors.items():
        console.print(f"{file}: {count} tensors, {' and '.join(exported.weights)}", highlight=False)
    told = "; ".join(f"{key.replace('_', ' ')} {value}" for key, value in exported.settings.items())
    console.print(f"not in the file: {told}", highlight=False, markup=False)
    console.print(f"licence of these weights: {account['licence']}")
    print(json.dumps(account, indent=2) if as_json else "\n".join(map(str, exported.tensors)))
