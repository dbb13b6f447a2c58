"""`hmar checkpoint`: import published weights, and say what a checkpoint is."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.checkpoints.published import Imported
    from hmar_cli.settings import Kl, Msvq, Recipe

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

TOKENIZERS = ("msvq", "kl")
MASKED = ("mar", "himar")
SIZES = {768: "b", 1024: "l", 1280: "h"}
"""The published sizes of MAR and Hi-MAR by their width."""

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

INSPECT_HELP = """
Say what a checkpoint is: its kind, recipe, step, classes, parameters, tokenizer, origin and licence.

**Examples**

- `hmar checkpoint inspect runs/hmar-tiny`
- `hmar checkpoint inspect checkpoints/var-d16 --json`
"""


@app.command("import", help=IMPORT_HELP)
def import_(
    file: Annotated[Path, typer.Argument(help="The published file: .pth, .pt, .bin or .safetensors.")],
    format: Annotated[
        Literal["var", "hmar", "msvq", "mar", "himar", "kl"], typer.Option(help="Whose format it is.")
    ],
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
    from hmar_cli.builders import build_model, build_tokenizer, load_weights
    from hmar_cli.checkpoints.published import LICENCES
    from hmar_cli.checkpoints.store import save_checkpoint

    if out.exists():
        raise UserError(f"{out} exists", "choose another --out, or remove it")
    _require_use(format, recipe, scales, tokenizer)
    weights, origin = _read(file, format, base, masked_layers)
    settings = _settings(weights["model"], format, scales, recipe)
    carried, fingerprint = None, ""
    if format in TOKENIZERS:
        codec = build_tokenizer(settings.tokenizer)
        load_weights(codec, weights["model"].state, file)
        fingerprint = codec.fingerprint()
    else:
        model = build_model(settings)
        for each in weights.values():
            load_weights(model, each.state, file)
        if tokenizer is not None:
            settings, carried, fingerprint = _with_tokenizer(settings, tokenizer)
    save_checkpoint(
        out,
        recipe=settings,
        weights={name: each.state for name, each in weights.items()},
        class_names=_class_names(settings),
        step=0,
        tokenizer=carried,
        tokenizer_hash=fingerprint,
        licence=LICENCES[format],
        source=origin,
    )
    alone = format not in TOKENIZERS and carried is None
    _tell(weights, LICENCES[format], out, alone, as_json)


def _require_use(format: str, recipe: str, scales: str, tokenizer: Path | None) -> None:
    """Refuse options that the format has no use for.

    Raises:
        UserError: there is one.
    """
    if recipe and format not in MASKED:
        raise UserError("--recipe is for --format mar and himar alone", "leave out --recipe")
    if scales and format in (*MASKED, "kl"):
        raise UserError(f"--scales: files of the format {format} have no scales", "leave out --scales")
    if tokenizer is not None and format in TOKENIZERS:
        raise UserError("--tokenizer: this file is a tokenizer itself", "leave out --tokenizer")


def _tell(weights: dict[str, "Imported"], licence: str, out: Path, alone: bool, as_json: bool) -> None:
    """Account for every key of the file, state the licence, and say if a model is `alone`, without tokenizer."""
    from hmar_cli.console import console

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
    if alone:
        console.print("no --tokenizer was given: pass one to `hmar sample --tokenizer`")
    if as_json:
        print(json.dumps(account, indent=2))
    else:
        print(out)


def _read(
    file: Path, format: str, base: Path | None, masked_layers: int
) -> tuple[dict[str, "Imported"], dict[str, str]]:
    """Read a published file: sets of weights ("model", perhaps "ema"), and where they came from.

    A masked HMAR is merged with its base.
    """
    from hmar_cli.checkpoints import published, published_masked
    from hmar_cli.files import file_sha256

    readers = {
        "msvq": published.read_msvq,
        "kl": published_masked.read_kl,
        "mar": published_masked.read_masked,
        "himar": published_masked.read_masked,
    }
    sets = published.read_weights(file)
    if format not in MASKED:
        sets = {"model": sets["model"]}
    weights = {name: readers.get(format, published.read_transformer)(each) for name, each in sets.items()}
    imported = weights["model"]
    published_masked.require_alike(weights)
    if format == "var" and imported.format != "next-scale":
        raise UserError(f"{file} has the masked branch of HMAR, which VAR has not", "use --format hmar")
    if format in MASKED and imported.format != format:
        raise UserError(f"{file} is of the format {imported.format}", f"use --format {imported.format}")
    origin = {"file": file.name, "sha256": file_sha256(file), "format": imported.format}
    if imported.format == "masked":
        if base is None:
            raise UserError(
                f"{file} is a masked model, without the next-scale blocks that sampling needs",
                "pass its next-scale file with --base",
            )
        next_scale = published.read_transformer(published.read_file(base))
        weights["model"] = published.merge(next_scale, imported, masked_layers)
        origin |= {"base_file": base.name, "base_sha256": file_sha256(base)}
    elif base is not None:
        raise UserError(f"{file} is no masked model, so it has no use for --base", "leave out --base")
    return weights, origin


def _settings(imported: "Imported", format: str, scales: str, recipe: str) -> "Recipe":
    """The recipe of imported weights."""
    if format in MASKED:
        return _masked_recipe(imported, recipe)
    if format == "kl":
        return _kl_recipe(imported)
    return _recipe(imported, format, _sides(scales, imported))


def _kl_recipe(imported: "Imported") -> "Recipe":
    """The recipe of an imported KL autoencoder: kl-16's, with the settings that its shapes tell."""
    from dataclasses import replace

    from hmar_cli.checkpoints.published_masked import kl_settings
    from hmar_cli.recipe import load_recipe

    return replace(load_recipe("kl-16"), tokenizer=kl_settings(imported))


def _masked_recipe(imported: "Imported", name: str) -> "Recipe":
    """The recipe of an imported MAR or Hi-MAR, with the class count of its embedding.

    Raises:
        UserError: no recipe was named, and no published model is of this width; or one of another family.
    """
    from dataclasses import replace

    from hmar_cli.checkpoints.published_masked import KL16_SCALE
    from hmar_cli.recipe import load_recipe
    from hmar_cli.settings import Kl, MaskedAr

    classes, width = imported.state["class_embed.weight"].shape
    if not name and width not in SIZES:
        raise UserError(
            f"no published {imported.format} has width {width}", "pass its recipe with --recipe NAME or PATH"
        )
    recipe = load_recipe(name or f"{imported.format}-{SIZES[width]}")
    if not isinstance(recipe.model, MaskedAr) or not isinstance(recipe.tokenizer, Kl):
        raise UserError(f"recipe {recipe.name} is not of a MAR or Hi-MAR", "pass one that is to --recipe")
    tokenizer = recipe.tokenizer if name else replace(recipe.tokenizer, latent_scale=KL16_SCALE)
    return replace(recipe, tokenizer=tokenizer, model=replace(recipe.model, num_classes=classes))


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
    from hmar_cli.settings import (
        MaskedObjective,
        Msvq,
        MsvqObjective,
        NextScale,
        NextScaleObjective,
        NextScaleSample,
        Recipe,
    )

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
        settings = Msvq(
            scales=sides,
            z_channels=imported.state["word_embed.weight"].shape[1],
            vocab_size=imported.state["head.linear.weight"].shape[0],
        )
    known = load_recipe(name) if name in recipe_names() else Recipe(name=name)
    data = replace(known.data, size=sides[-1] * settings.stride)
    sample = known.sample if known.model else NextScaleSample()
    return replace(known, data=data, tokenizer=settings, model=model, objective=objective, sample=sample)


def _with_tokenizer(recipe: "Recipe", path: Path) -> tuple["Recipe", Path, str]:
    """Join a model's recipe and its tokenizer: the recipe of both, the tokenizer's folder and fingerprint.

    Raises:
        UserError: no tokenizer there, or one that the model was not made for.
    """
    from dataclasses import replace

    from hmar_cli.builders import find_tokenizer, load_tokenizer
    from hmar_cli.settings import Kl, Msvq

    found = find_tokenizer(path)
    ours, theirs = recipe.tokenizer, found.recipe.tokenizer
    wanted, given = (_shape(each) for each in (ours, theirs))
    if wanted != given:
        scales = "import the tokenizer with the model's --scales, or " if isinstance(ours, Msvq) else ""
        raise UserError(
            f"the model needs a tokenizer with {wanted}; {path} has {given}",
            f"{scales}give the model's own tokenizer",
        )
    if isinstance(theirs, Kl) and not theirs.latent_scale:
        raise UserError(
            f"the latent scale of {path} is not known yet", "give the tokenizer of a cache, which measured it"
        )
    data = replace(recipe.data, size=found.recipe.data.size) if isinstance(theirs, Msvq) else recipe.data
    recipe = replace(recipe, tokenizer=theirs, data=data)
    return recipe, found.folder, load_tokenizer(path).fingerprint()


def _shape(tokenizer: "Msvq | Kl") -> str:
    """What a model needs to be equal in its tokenizer."""
    from hmar_cli.settings import Kl

    if isinstance(tokenizer, Kl):
        return f"{tokenizer.z_channels} latent channels and stride {tokenizer.stride}"
    return f"scales {list(tokenizer.scales)}, {tokenizer.vocab_size} codes of {tokenizer.z_channels} channels"


def _class_names(recipe: "Recipe") -> tuple[str, ...]:
    """Names of the classes: ImageNet's where there are 1000, else numbers."""
    if recipe.model is None:
        return ()
    if recipe.model.num_classes == 1000:
        from torchvision.models import ResNet50_Weights

        return tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    return tuple(str(i) for i in range(recipe.model.num_classes))


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
