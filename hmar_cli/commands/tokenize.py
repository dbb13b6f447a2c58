"""`hmar tokenize`: encode a source of images once, into a cache that models train on."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hmar_cli.errors import UserError

if TYPE_CHECKING:
    from torch import device as Device

    from hmar_cli.checkpoints.store import Checkpoint
    from hmar_cli.data.writer import EncodeText
    from hmar_cli.settings import Kl, Msvq, Recipe

EXAMPLES = """
Encode images once, into a cache of tokens or latents that models train on.

SOURCE is a folder of images (a subfolder for each class), `.parquet` or WebDataset `.tar` files (one, a pattern or
a folder), `owner/name` of the Hugging Face hub, `coco:CAPTIONS.json?images=FOLDER`, `builtin:shapes` or
`builtin:scenes`. Options follow a question mark: `split`, `image`, `label`, `caption` (names of columns; a caption
may be a list of strings), `config`, `streaming=true`, `classes`; for `builtin:` `count`,
`seed`, and of scenes `split`.

Of a multi-scale tokenizer tokens are stored; of a KL autoencoder means and log-variances, at the full size and at
the recipe's `data.pivot_size`. A KL autoencoder whose latent scale is not known yet has it measured here: the cache
carries the tokenizer with its scale, so give that cache as `--tokenizer` for further data of the same scale. Where
the recipe has a `[text]`, `data.captions` captions of each image are encoded too.

Run the same command again to go on after an interruption. Images that cannot be used are listed and skipped.

**Examples**

- `hmar tokenize builtin:shapes --tokenizer runs/msvq-tiny --out caches/shapes`
- `hmar tokenize photos/ --recipe hmar-d16 --tokenizer vae_ch160v4096z32 --out caches/photos --launch 8`
- `hmar tokenize photos/ --recipe himar-b --tokenizer runs/kl-16 --out caches/latents`
- `hmar tokenize cifar10-train.parquet --tokenizer runs/msvq-cifar10 --out caches/cifar10 --verify`
- `hmar tokenize cifar10-test.parquet --tokenizer caches/cifar10-latents --out caches/cifar10-test-latents`
- `hmar tokenize 'coco:captions.json?images=train2014' --recipe himar-s-coco --tokenizer kl-16 --out caches/coco`
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
        str,
        typer.Option(help="Sizes, crop, mirroring and captions are its. [default: the tokenizer's]"),
    ] = "",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=0, help="Pictures encoded at once; 0 suits the image size.")
    ] = 0,
    shard_size: Annotated[
        int, typer.Option(min=0, help="Images of a shard; 0 is 4096, or fewer where they are large.")
    ] = 0,
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
    from hmar_cli.data.encoding import Options, Work, encode_source, settings_for
    from hmar_cli.data.sources import open_source
    from hmar_cli.launch import check_device, delegate

    check_device(device)
    checkpoint = find_tokenizer(tokenizer)
    chosen = resolve(recipe, overrides or [], checkpoint)
    images = open_source(source or chosen.data.source, size=chosen.data.size)
    delegate(launch, device)
    model = load_tokenizer(tokenizer)
    text, encoder = captions_of(chosen)
    settings = settings_for(
        images, model, chosen.data, limit=limit, shard_size=shard_size, seed=seed, text=text
    )
    work = Work(
        source=images,
        tokenizer=model,
        settings=settings,
        out=out,
        options=Options(batch_size=batch_size, strict=strict, verify=verify, dry_run=dry_run, device=device),
        carry=lambda folder, scale: carry(checkpoint, settings.tokenizer_hash, folder, scale),
        workers=chosen.data.workers,
        text=encoder,
    )
    summary = encode_source(work)
    if summary is not None:
        conclude(summary, as_json, dry_run)


def captions_of(recipe: "Recipe") -> tuple[str, "Callable[[Device], EncodeText] | None"]:
    """What encodes a recipe's captions, in words and as a function of the device; "" and None if nothing does."""
    if recipe.text is None:
        return "", None
    from hmar_cli.data.captions import caption_encoder, describe

    return describe(recipe.text), partial(caption_encoder, recipe.text)


def resolve(name: str, overrides: list[str], checkpoint: "Checkpoint") -> "Recipe":
    """Load the recipe, by default the tokenizer's own.

    Raises:
        UserError: mistakes in it, or another kind or form of tokenizer.
    """
    from hmar_cli.recipe import load_recipe

    recipe = load_recipe(name or str(checkpoint.folder / "recipe.toml"), overrides)
    ours, theirs = form(recipe.tokenizer), form(checkpoint.recipe.tokenizer)
    for (what, mine), (_, found) in zip(ours, theirs, strict=False):
        if mine != found:
            raise UserError(
                f"recipe '{recipe.name}' has {what} {mine}, {checkpoint.folder} has {found}",
                "choose a recipe for this tokenizer, or leave out --recipe to use the tokenizer's own",
            )
    return recipe


def form(settings: "Msvq | Kl") -> list[tuple[str, Any]]:
    """What a recipe and the tokenizer that it is used with must agree on, the kind first."""
    from hmar_cli.models.scales import Scales
    from hmar_cli.settings import Msvq

    if isinstance(settings, Msvq):
        return [("tokenizer.kind", settings.kind), ("scales", Scales.of(settings.scales).sides())]
    stride, channels = settings.stride, settings.z_channels
    return [("tokenizer.kind", settings.kind), ("stride", stride), ("tokenizer.z_channels", channels)]


def carry(checkpoint: "Checkpoint", fingerprint: str, folder: Path, latent_scale: float | None) -> None:
    """Write the tokenizer into the cache, with the weights that made it and no others, and its latent scale."""
    from hmar_cli.checkpoints.store import save_checkpoint
    from hmar_cli.settings import Kl

    recipe = checkpoint.recipe
    if isinstance(recipe.tokenizer, Kl) and latent_scale is not None:
        recipe = replace(recipe, tokenizer=replace(recipe.tokenizer, latent_scale=latent_scale))

    save_checkpoint(
        folder,
        recipe=recipe,
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
        content(summary)
        print(f"  on {summary['processes']} x {summary['device']}, {summary['batch_size']} pictures at once")
        return
    print(f"{summary['out']}: {summary['images']:,} images of {classes}, {views}{size}")
    content(summary)
    if summary["skipped"]:
        print(f"  skipped {len(summary['skipped']):,} images that cannot be used (listed in manifest.json)")
    if summary["encoded_now"]:
        rate = f"{summary['images_per_second']:,} images/s"
        print(f"  encoded {summary['encoded_now']:,} images in {summary['seconds']:.1f} s, {rate}")
    else:
        print("  was complete already")
    if verified := summary.get("verified"):
        share = f"{verified['equal']:.3%} of {numbers(summary)} equal in {verified['images']} images encoded again"
        print(f"  verified: {verified['files']} files unchanged, {share}")
        print(f"  reads back at {verified['read_images_per_second']:,} images/s in one process")


def content(summary: dict[str, Any]) -> None:
    """Print what else there is to know of a cache: that its images have no labels, its latents, its captions."""
    from hmar_cli.data.images import UNLABELLED

    if summary["class_names"] == list(UNLABELLED):
        print(f"  no subfolders or labels: one class, '{UNLABELLED[0]}'")
    if summary["kind"] == "moments":
        shapes = (f"{name} {' x '.join(map(str, shape))}" for name, shape in summary["shapes"].items())
        scale = summary["latent_scale"]
        known = "not known yet, to be measured" if scale is None else f"{scale:g}"
        print(f"  {', '.join(shapes)}; latent scale {known}")
    if "text" in summary:
        print(f"  captions: {summary['captions']} an image, encoded as {summary['text']}")


def numbers(summary: dict[str, Any]) -> str:
    """What a cache holds, in a word."""
    return "tokens" if summary["kind"] == "tokens" else "numbers"


def human(size: float) -> str:
    """A size in bytes, for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
