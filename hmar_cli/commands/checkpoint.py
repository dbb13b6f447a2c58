"""`hmar checkpoint`: import published weights, and say what a checkpoint is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.checkpoints.published import Imported
    from hmar_cli.settings import Recipe

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Import published weights, and say what a checkpoint is.",
)

SCALES = {
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""The published scale lists by their sequence length."""

IMPORT_HELP = """
Read a file that the authors of VAR or HMAR published, rename its tensors and write a checkpoint folder.

Nothing is downloaded, and nothing but tensors is ever unpickled. Every key of the file is accounted for. The
licence of the weights is stated and kept with them: VAR's are MIT, HMAR's are for non-commercial use.

**Examples**

- `hmar checkpoint import vae_ch160v4096z32.pth --format msvq --out checkpoints/msvq-256`
- `hmar checkpoint import var_d16.pth --format var --tokenizer checkpoints/msvq-256 --out checkpoints/var-d16`
- `hmar checkpoint import hmar-d16.pth --format hmar --tokenizer checkpoints/msvq-256 --out checkpoints/hmar-d16`
- `hmar checkpoint import masked.pth --format hmar --base next-scale.pth --out checkpoints/merged`
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
    format: Annotated[Literal["var", "hmar", "msvq"], typer.Option(help="Whose format it is.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    tokenizer: Annotated[
        Path | None, typer.Option(help="Checkpoint of the tokenizer, carried along with a model.")
    ] = None,
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
    from hmar_cli.builders import build_model, build_tokenizer, load_weights
    from hmar_cli.checkpoints import published
    from hmar_cli.checkpoints.store import save_checkpoint
    from hmar_cli.console import console

    if out.exists():
        raise UserError(f"{out} exists", "choose another --out, or remove it")
    imported, origin = _read(file, format, base, masked_layers)
    recipe = _recipe(imported, format, _sides(scales, imported))
    carried, fingerprint = None, ""
    if format == "msvq":
        codec = build_tokenizer(recipe.tokenizer)
        load_weights(codec, imported.state, file)
        fingerprint = codec.fingerprint()
    else:
        load_weights(build_model(recipe), imported.state, file)
        if tokenizer is not None:
            recipe, carried, fingerprint = _with_tokenizer(recipe, tokenizer)
    save_checkpoint(
        out,
        recipe=recipe,
        weights={"model": imported.state},
        class_names=_class_names(recipe),
        step=0,
        tokenizer=carried,
        tokenizer_hash=fingerprint,
        licence=published.LICENCES[format],
        source=origin,
    )
    account = {
        "format": imported.format,
        "imported": len(imported.state),
        "derived": imported.derived,
        "shared": imported.shared,
        "parameters": sum(t.numel() for t in imported.state.values()),
        "licence": published.LICENCES[format],
        "checkpoint": str(out),
    }
    shared = f"{len(imported.shared)} that both files share, " if imported.shared else ""
    console.print(
        f"{len(imported.state)} tensors imported, {shared}{len(imported.derived)} derived buffers left out, "
        "none unknown"
    )
    console.print(f"licence of these weights: {account['licence']}")
    if format != "msvq" and carried is None:
        console.print("no --tokenizer was given: pass one to `hmar sample --tokenizer`")
    if as_json:
        print(json.dumps(account, indent=2))
    else:
        print(out)


def _read(
    file: Path, format: str, base: Path | None, masked_layers: int
) -> tuple["Imported", dict[str, str]]:
    """Read a published file, merged with its base where it needs one; and say where it all came from."""
    from hmar_cli.checkpoints import published
    from hmar_cli.files import file_sha256

    state = published.read_file(file)
    imported = published.read_msvq(state) if format == "msvq" else published.read_transformer(state)
    if format == "var" and imported.format != "next-scale":
        raise UserError(f"{file} has the masked branch of HMAR, which VAR has not", "use --format hmar")
    origin = {"file": file.name, "sha256": file_sha256(file), "format": imported.format}
    if imported.format == "masked":
        if base is None:
            raise UserError(
                f"{file} is a masked model, without the next-scale blocks that sampling needs",
                "pass its next-scale file with --base",
            )
        next_scale = published.read_transformer(published.read_file(base))
        imported = published.merge(next_scale, imported, masked_layers)
        origin |= {"base_file": base.name, "base_sha256": file_sha256(base)}
    elif base is not None:
        raise UserError(f"{file} is no masked model, so it has no use for --base", "leave out --base")
    return imported, origin


def _sides(text: str, imported: "Imported") -> tuple[int, ...]:
    """The scale list: as given, or the published one of the sequence's length."""
    from hmar_cli.models.scales import Scales

    if text:
        try:
            sides = tuple(int(part) for part in text.split(","))
            Scales.of(sides)
        except ValueError as error:
            raise UserError(
                f"--scales {text}: {error}", "give whole numbers that grow, as 1,2,3,4"
            ) from error
        return sides
    total = imported.state["pos_embed"].shape[1] if "pos_embed" in imported.state else 680
    if total not in SCALES:
        raise UserError(f"no published scale list has {total} tokens", "pass --scales, as 1,2,3,4")
    return SCALES[total]


def _recipe(imported: "Imported", format: str, sides: tuple[int, ...]) -> "Recipe":
    """The recipe of imported weights: settings read off their shapes, the rest from the shipped recipe."""
    from dataclasses import replace

    from hmar_cli.checkpoints import published
    from hmar_cli.recipe import load_recipe, recipe_names
    from hmar_cli.settings import MaskedObjective, MsvqObjective, NextScale, NextScaleObjective, Recipe

    model: NextScale | None = None
    objective: MsvqObjective | NextScaleObjective | MaskedObjective = MsvqObjective()
    if imported.format == "msvq":
        settings = published.tokenizer_settings(imported, sides)
        name = f"msvq-{sides[-1] * settings.stride}"
    else:
        model, objective = published.model_settings(imported, "causal" if format == "var" else "diagonal")
        pixels = sides[-1] * 16
        name = f"{format}-d{model.depth}" + (f"-{pixels}" if pixels != 256 else "")
        name += "-masked" if imported.format == "merged" else ""
        settings = replace(
            Recipe().tokenizer,
            scales=sides,
            z_channels=imported.state["word_embed.weight"].shape[1],
            vocab_size=imported.state["head.linear.weight"].shape[0],
        )
    known = load_recipe(name) if name in recipe_names() else Recipe(name=name)
    data = replace(known.data, size=sides[-1] * settings.stride)
    sample = known.sample if known.model else replace(known.sample, schedule=())
    return replace(known, data=data, tokenizer=settings, model=model, objective=objective, sample=sample)


def _with_tokenizer(recipe: "Recipe", path: Path) -> tuple["Recipe", Path, str]:
    """Join a model's recipe and its tokenizer: the recipe of both, the tokenizer's folder and fingerprint.

    Raises:
        UserError: no tokenizer there, or one with other scales or codes.
    """
    from dataclasses import replace

    from hmar_cli.builders import find_tokenizer, load_tokenizer

    found = find_tokenizer(path)
    ours, theirs = recipe.tokenizer, found.recipe.tokenizer
    shapes = [(list(each.scales), each.vocab_size, each.z_channels) for each in (ours, theirs)]
    if shapes[0] != shapes[1]:
        wanted, given = (f"scales {a}, {b} codes of {c} channels" for a, b, c in shapes)
        raise UserError(
            f"the model needs a tokenizer with {wanted}; {path} has {given}",
            "import the tokenizer with the model's --scales, or give the model's own tokenizer",
        )
    recipe = replace(recipe, tokenizer=theirs, data=replace(recipe.data, size=found.recipe.data.size))
    return recipe, found.folder, load_tokenizer(path).fingerprint()


def _class_names(recipe: "Recipe") -> tuple[str, ...]:
    """Names of the classes: ImageNet's where there are 1000, else numbers."""
    if recipe.model is None:
        return ()
    if recipe.model.num_classes == 1000:
        from torchvision.models import ResNet50_Weights

        return tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    return tuple(str(i) for i in range(recipe.model.num_classes))


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
        "scales": list(recipe.tokenizer.scales),
        "classes": len(names),
        "class_names": list(names),
        "masked_branch": recipe.objective.kind == "masked",
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
    for key, value in {**about, "class_names": shown}.items():
        table.add_row(key.replace("_", " "), f"{value:,}" if key == "parameters" else str(value))
    Console().print(table)
