"""Published weights become a checkpoint folder: one table of formats, and what each needs to be read."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from hmar_cli.builders import build_model, build_tokenizer, find_tokenizer, load_tokenizer, load_weights
from hmar_cli.checkpoints.published import (
    BROKEN,
    Imported,
    State,
    merge,
    model_settings,
    read_file,
    read_msvq,
    read_transformer,
    read_weights,
    tokenizer_settings,
)
from hmar_cli.checkpoints.published_masked import KL16_SCALE, kl_settings, read_kl, read_masked, require_alike
from hmar_cli.checkpoints.store import save_checkpoint
from hmar_cli.errors import UserError
from hmar_cli.files import file_sha256
from hmar_cli.models.scales import Scales
from hmar_cli.recipe import load_recipe, recipe_names
from hmar_cli.settings import (
    Kl,
    MaskedAr,
    MaskedObjective,
    Msvq,
    MsvqObjective,
    NextScale,
    NextScaleObjective,
    NextScaleSample,
    Recipe,
)


@dataclass(frozen=True)
class Format:
    """A published format.

    Attributes:
        read: renames the tensors of its files.
        licence: of the weights that its authors published.
        kind: what its files hold: a tokenizer, "msvq" or "kl", or a model, "next-scale" or "masked".
    """

    read: Callable[[State], Imported]
    licence: str
    kind: Literal["msvq", "kl", "next-scale", "masked"]

    @property
    def is_tokenizer(self) -> bool:
        """Whether its files hold a tokenizer, not a model."""
        return self.kind in ("msvq", "kl")

    @property
    def has_scales(self) -> bool:
        """Whether its images are lists of scales."""
        return self.kind in ("msvq", "next-scale")


FORMATS = {
    "var": Format(read_transformer, "MIT (FoundationVision/VAR)", "next-scale"),
    "hmar": Format(
        read_transformer, "NVIDIA source code licence, non-commercial (NVlabs/HMAR)", "next-scale"
    ),
    "msvq": Format(read_msvq, "MIT (FoundationVision/VAR)", "msvq"),
    "mar": Format(read_masked, "MIT (LTH14/mar)", "masked"),
    "himar": Format(
        read_masked,
        "none stated (HiDream-ai/himar): ask its authors before you share or use them",
        "masked",
    ),
    "kl": Format(read_kl, "MIT (LTH14/mar)", "kl"),
}
"""Every published format by its name."""

SCALES = {
    680: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    2240: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    9451: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
"""The published scale lists by their sequence length."""

SIZES = {768: "b", 1024: "l", 1280: "h"}
"""The published sizes of MAR and Hi-MAR by their width."""


@dataclass(frozen=True)
class Published:
    """What was imported.

    Attributes:
        format: of the file.
        weights: "model", and "ema" where the file holds averaged weights too.
        recipe: their settings.
        tokenizer: folder of the tokenizer that a model carries, if any.
    """

    format: Format
    weights: dict[str, Imported]
    recipe: Recipe
    tokenizer: Path | None


def import_file(
    file: Path,
    format: str,
    out: Path,
    *,
    tokenizer: Path | None = None,
    recipe: str = "",
    base: Path | None = None,
    masked_layers: int = 8,
    scales: str = "",
) -> Published:
    """Read a published file and write it as a checkpoint.

    Args:
        file: the published file.
        format: a name in `FORMATS`.
        out: the checkpoint folder to write.
        tokenizer: checkpoint of the tokenizer that a model carries along.
        recipe: name or path of the recipe of a masked model; empty for the published one of its width.
        base: next-scale file that a masked HMAR is merged with.
        masked_layers: late blocks of a masked HMAR to merge.
        scales: sides of the scales, as "1,2,3,4"; empty for the published ones.

    Raises:
        UserError: a file that is broken, of another format or not whole, or does not belong to the other ones.
    """
    weights, origin = _read(file, format, base, masked_layers)
    settings = _recipe(weights["model"], format, scales, recipe)
    carried, fingerprint = None, ""
    if FORMATS[format].is_tokenizer:
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
        licence=FORMATS[format].licence,
        source=origin,
    )
    return Published(FORMATS[format], weights, settings, carried)


def _read(
    file: Path, name: str, base: Path | None, masked_layers: int
) -> tuple[dict[str, Imported], dict[str, str]]:
    """Read a published file: sets of weights ("model", perhaps "ema"), and where they came from.

    A masked HMAR is merged with its base.
    """
    format = FORMATS[name]
    sets = read_weights(file)
    if format.kind != "masked":
        sets = {"model": sets["model"]}
    try:
        weights = {each: format.read(state) for each, state in sets.items()}
    except UserError as error:
        raise UserError(str(error), _fitting(sets["model"]), error.details) from error
    imported = weights["model"]
    require_alike(weights)
    if name == "var" and imported.format != "next-scale":
        raise UserError(f"{file} has the masked branch of HMAR, which VAR has not", "use --format hmar")
    if format.kind == "masked" and imported.format != name:
        raise UserError(f"{file} is of the format {imported.format}", f"use --format {imported.format}")
    origin = {"file": file.name, "sha256": file_sha256(file), "format": imported.format}
    if imported.format == "masked":
        if base is None:
            raise UserError(
                f"{file} is a masked model, without the next-scale blocks that sampling needs",
                "pass its next-scale file with --base",
            )
        next_scale = read_transformer(read_file(base))
        weights["model"] = merge(next_scale, imported, masked_layers)
        origin |= {"base_file": base.name, "base_sha256": file_sha256(base)}
    elif base is not None:
        raise UserError(f"{file} is no masked model, so it has no use for --base", "leave out --base")
    return weights, origin


def _fitting(state: State) -> str:
    """Advice on a file that its format's reader refused: the format whose reader takes it, if there is one."""
    shapes = {key: value.to("meta") for key, value in state.items()}
    names = {"next-scale": "var or hmar", "masked": "hmar", "merged": "hmar"}
    for format in FORMATS.values():
        with contextlib.suppress(UserError, *BROKEN):
            found = format.read(shapes).format
            return f"the format that fits is {names.get(found, found)}"
    return "no published format fits: download the file again, or see whether it is the right one"


def _recipe(imported: Imported, name: str, scales: str, recipe: str) -> Recipe:
    """The recipe of imported weights."""
    kind = FORMATS[name].kind
    if kind == "masked":
        return _masked_recipe(imported, recipe)
    if kind == "kl":
        return _kl_recipe(imported)
    return _scales_recipe(imported, name, _sides(scales, imported))


def _kl_recipe(imported: Imported) -> Recipe:
    """The recipe of an imported KL autoencoder: kl-16's, with the settings that its shapes tell."""
    return replace(load_recipe("kl-16"), tokenizer=kl_settings(imported))


def _masked_recipe(imported: Imported, name: str) -> Recipe:
    """The recipe of an imported MAR or Hi-MAR, with the class count of its embedding.

    Raises:
        UserError: no recipe was named, and no published model is of this width; or one of another family.
    """
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


def _sides(text: str, imported: Imported) -> tuple[int, ...]:
    """The scale list: as given, or the published one of the sequence's length."""
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


def _scales_recipe(imported: Imported, format: str, sides: tuple[int, ...]) -> Recipe:
    """The recipe of imported weights: settings read off their shapes, the rest from the shipped recipe."""
    model: NextScale | None = None
    objective: MsvqObjective | NextScaleObjective | MaskedObjective = MsvqObjective()
    if imported.format == "msvq":
        settings = tokenizer_settings(imported, sides)
        name = f"msvq-{sides[-1] * settings.stride}"
    else:
        model, objective = model_settings(imported, "causal" if format == "var" else "diagonal")
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


def _with_tokenizer(recipe: Recipe, path: Path) -> tuple[Recipe, Path, str]:
    """Join a model's recipe and its tokenizer: the recipe of both, the tokenizer's folder and fingerprint.

    Raises:
        UserError: no tokenizer there, or one that the model was not made for.
    """
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


def _shape(tokenizer: Msvq | Kl) -> str:
    """What a model needs to be equal in its tokenizer."""
    if isinstance(tokenizer, Kl):
        return f"{tokenizer.z_channels} latent channels and stride {tokenizer.stride}"
    return f"scales {list(tokenizer.scales)}, {tokenizer.vocab_size} codes of {tokenizer.z_channels} channels"


def _class_names(recipe: Recipe) -> tuple[str, ...]:
    """Names of the classes: ImageNet's where there are 1000, else numbers."""
    if recipe.model is None:
        return ()
    if recipe.model.num_classes == 1000:
        from torchvision.models import ResNet50_Weights

        return tuple(ResNet50_Weights.DEFAULT.meta["categories"])
    return tuple(str(i) for i in range(recipe.model.num_classes))
