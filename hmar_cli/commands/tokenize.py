"""`hmar tokenize`: encode a source of images once, into a cache that models train on."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from hmar_cli.checkpoints.store import Checkpoint
    from hmar_cli.settings import Recipe

EXAMPLES = """
Encode images once, into a cache of tokens that models train on.

SOURCE is a folder of images (a subfolder for each class), `.parquet` or WebDataset `.tar` files (one, a pattern or
a folder), `owner/name` of the Hugging Face hub, or `builtin:shapes`. Options follow a question mark:
`split`, `image`, `label`, `caption` (names of columns), `config`, `streaming=true`, `classes`; for
`builtin:shapes` `count` and `seed`.

Run the same command again to go on after an interruption. Images that cannot be used are listed and skipped.

**Examples**

- `hmar tokenize builtin:shapes --tokenizer runs/msvq-tiny --out caches/shapes`
- `hmar tokenize photos/ --recipe hmar-d16 --tokenizer vae_ch160v4096z32 --out caches/photos --launch 8`
- `hmar tokenize cifar10-train.parquet --tokenizer runs/msvq-cifar10 --out caches/cifar10 --verify`
- `hmar tokenize 'uoft-cs/cifar100?split=train&label=fine_label' --tokenizer runs/msvq-cifar10 --out caches/cifar100`
- `hmar tokenize 'shards/*.tar?streaming=true&classes=1000' --tokenizer msvq --out caches/web --limit 100000`
- `hmar tokenize photos/ --tokenizer msvq --out caches/crops --set data.crop=var --set data.crops=10`
"""


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command("tokenize", help=EXAMPLES)(tokenize)


def tokenize(
    tokenizer: Annotated[Path, typer.Option(help="Checkpoint of the tokenizer.")],
    out: Annotated[Path, typer.Option(help="Folder of the cache.")],
    source: Annotated[str, typer.Argument(help="Where the images are. [default: the recipe's]")] = "",
    recipe: Annotated[
        str, typer.Option(help="Size, crop and mirroring are its [data]. [default: the tokenizer's]")
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=0, help="Pictures encoded at once; 0 suits the image size.")
    ] = 0,
    shard_size: Annotated[int, typer.Option(min=1, help="Images of a shard.")] = 4096,
    limit: Annotated[int, typer.Option(min=0, help="Only the first images; 0 is all.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an image that cannot be used.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Encode a sample again and compare; check all files.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of random crops.")] = 0,
    launch: Annotated[int, typer.Option(min=0, help="Share the work over this many processes.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda. [default: a GPU where there is one]")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Tokenize; the help text is `EXAMPLES`."""
    from hmar_cli.builders import find_tokenizer, load_tokenizer
    from hmar_cli.data.encoding import Options, encode_source, settings_for
    from hmar_cli.data.sources import open_source
    from hmar_cli.launch import check_device, delegate

    check_device(device)
    checkpoint = find_tokenizer(tokenizer)
    chosen = resolve(recipe, overrides or [], checkpoint)
    images = open_source(source or chosen.data.source, size=chosen.data.size)
    delegate(launch, device)
    model = load_tokenizer(tokenizer)
    settings = settings_for(images, model, chosen.data, limit=limit, shard_size=shard_size, seed=seed)
    options = Options(batch_size=batch_size, strict=strict, verify=verify, dry_run=dry_run, device=device)
    summary = encode_source(
        images,
        model,
        settings,
        out,
        options,
        carry=lambda folder: carry(checkpoint, settings.tokenizer_hash, folder),
        workers=chosen.data.workers,
    )
    if summary is not None:
        conclude(summary, as_json, dry_run)


def resolve(name: str, overrides: list[str], checkpoint: "Checkpoint") -> "Recipe":
    """Load the recipe, by default the tokenizer's own.

    Raises:
        UserError: mistakes in it, or scales other than the tokenizer's.
    """
    from hmar_cli.models.scales import Scales
    from hmar_cli.recipe import load_recipe

    recipe = load_recipe(name or str(checkpoint.folder / "recipe.toml"), overrides)
    theirs = Scales.of(checkpoint.recipe.tokenizer.scales)
    if recipe.scales != theirs:
        raise UserError(
            f"recipe '{recipe.name}' has scales {recipe.scales.sides()}, {checkpoint.folder} has {theirs.sides()}",
            "choose a recipe for this tokenizer, or leave out --recipe to use the tokenizer's own",
        )
    return recipe


def carry(checkpoint: "Checkpoint", fingerprint: str, folder: Path) -> None:
    """Write the tokenizer into the cache, with the weights that made it and no others."""
    from hmar_cli.checkpoints.store import save_checkpoint

    save_checkpoint(
        folder,
        recipe=checkpoint.recipe,
        weights={"model": checkpoint.load()},
        class_names=checkpoint.class_names,
        step=checkpoint.step,
        tokenizer=None,
        tokenizer_hash=fingerprint,
        licence=checkpoint.licence,
        source=checkpoint.source,
    )


def conclude(summary: dict[str, Any], as_json: bool, dry_run: bool) -> None:
    """Print what was done, or would be: lines for people, or JSON."""
    if as_json:
        print(json.dumps(summary, indent=2, ensure_ascii=False))
        return
    views = f"{summary['views']} views each" if summary["views"] > 1 else "one view each"
    classes = "1 class" if summary["classes"] == 1 else f"{summary['classes']} classes"
    size = "" if summary["bytes"] is None else f", {human(summary['bytes'])}"
    if dry_run:
        count = "all" if summary["images"] is None else f"{summary['images']:,}"
        print(f"would encode {count} images of {summary['source']} ({summary['done']:,} are done)")
        print(f"  {classes}, {views}, {summary['tokens']} tokens a view{size}")
        print(f"  on {summary['processes']} x {summary['device']}, {summary['batch_size']} pictures at once")
        return
    print(f"{summary['out']}: {summary['images']:,} images of {classes}, {views}{size}")
    if summary["skipped"]:
        print(f"  skipped {len(summary['skipped']):,} images that cannot be used (listed in manifest.json)")
    if summary["encoded_now"]:
        rate = f"{summary['images_per_second']:,} images/s"
        print(f"  encoded {summary['encoded_now']:,} images in {summary['seconds']:.1f} s, {rate}")
    else:
        print("  was complete already")
    if verified := summary.get("verified"):
        share = f"{verified['equal']:.3%} of tokens equal in {verified['images']} images encoded again"
        print(f"  verified: {verified['files']} files unchanged, {share}")
        print(f"  reads back at {verified['read_images_per_second']:,} images/s in one process")


def human(size: float) -> str:
    """A size in bytes, for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
