"""A checkpoint becomes a published file: the way back of `imports`, on the same formats and tables."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmar_cli.builders import find_tokenizer
from hmar_cli.checkpoints.published import State, split, write_msvq, write_transformer
from hmar_cli.checkpoints.published_masked import write_kl, write_masked
from hmar_cli.checkpoints.store import Checkpoint, open_checkpoint, write_tensors
from hmar_cli.errors import UserError
from hmar_cli.files import atomic_file
from hmar_cli.imports import FORMATS
from hmar_cli.models.heads import sincos_table
from hmar_cli.settings import Classifier, Kl, MaskedAr, MaskedObjective, Msvq, NextScale, Recipe

SUFFIXES = (".pth", ".pt", ".bin", ".ckpt", ".safetensors")
PLAIN = {"": ""}
WRAPPED = {"kl": {"model": ""}, "mar": {"model": "model", "model_ema": ""}}
WRAPPED["himar"] = WRAPPED["mar"]
"""Under which key a format's PyTorch files keep which weights: "" is the averaged ones, if there are any."""


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes:
        format: its name in `FORMATS`.
        weights: the sets of weights that were written, "model" and "ema".
        tensors: how many each file holds, by its path.
        licence: of the weights, empty if they are the user's own.
        settings: what the code that reads the file has to be told, since no shape tells it.
    """

    format: str
    weights: tuple[str, ...]
    tensors: dict[Path, int]
    licence: str
    settings: dict[str, Any]


def export_file(
    path: Path, out: Path, *, format: str = "", weights: str = "", base: Path | None = None
) -> Exported:
    """Write a checkpoint's weights as their format's authors publish them.

    Args:
        path: a checkpoint or run folder.
        out: the file to write; its suffix says whether it is a PyTorch or a safetensors file.
        format: a name in `FORMATS`, that of a tokenizer for the one that a model carries; empty finds it.
        weights: "model" or "ema"; empty for the averaged ones where there are any, and both where a format has both.
        base: write the masked branch of an HMAR to `out` as a model of its own, and its next-scale model here.

    Raises:
        UserError: nothing of the sort lies there, or the format does not hold it.
    """
    tokenizer = bool(format) and FORMATS[format].is_tokenizer
    checkpoint = find_tokenizer(path) if tokenizer else open_checkpoint(path)
    name = _format(checkpoint)
    if format not in ("", name):
        raise UserError(
            f"{checkpoint.folder} is exported to the format {name}, not {format}",
            f"use --format {name}, or leave it out",
        )
    _require_shape(checkpoint)
    targets = [each for each in (out, base) if each is not None]
    if base is not None and not isinstance(checkpoint.recipe.objective, MaskedObjective):
        raise UserError(f"{checkpoint.folder} has no masked branch to part from its base", "leave out --base")
    _require_targets(targets)
    places = PLAIN if out.suffix == ".safetensors" else WRAPPED.get(name, PLAIN)
    used = {key: checkpoint.weights_file(weights or default).stem for key, default in places.items()}
    parts: dict[str, list[State]] = {}
    for which in sorted(set(used.values()), reverse=True):
        state = checkpoint.load(which)
        whole = [state] if base is None else [*reversed(split(state))]
        parts[which] = [_published(each, checkpoint.recipe) for each in whole]
    counts = {}
    for i, target in enumerate(targets):
        content = {key: parts[which][i] for key, which in used.items()}
        _write(target, content.get("", content))
        counts[target] = len(next(iter(content.values())))
    return Exported(name, tuple(parts), counts, checkpoint.licence, _untold(checkpoint.recipe))


def _format(checkpoint: Checkpoint) -> str:
    """The published format of a checkpoint.

    Raises:
        UserError: there is none.
    """
    model = checkpoint.recipe.model
    if isinstance(model, Classifier):
        raise UserError(
            f"{checkpoint.folder} holds a classifier, which no published format does",
            "export a tokenizer or a model",
        )
    if isinstance(model, NextScale):
        return "var" if model.pattern == "causal" else "hmar"
    if isinstance(model, MaskedAr):
        return "mar" if model.pivots == "none" else "himar"
    return checkpoint.recipe.tokenizer.kind


def _require_shape(checkpoint: Checkpoint) -> None:
    """Refuse settings that change what weights mean, and that the published code has not.

    Raises:
        UserError: there is one.
    """
    recipe = checkpoint.recipe
    if recipe.text is not None:
        raise UserError(
            f"{checkpoint.folder} draws from captions, published models from classes",
            "only models of classes can be exported",
        )
    if isinstance(recipe.tokenizer, Msvq):
        grids = recipe.scales.grids
    else:
        grids = (recipe.grid, recipe.pivot_grid or (1, 1)) if recipe.model else ()
    if oblong := [f"{height}x{width}" for height, width in grids if height != width]:
        raise UserError(
            f"{checkpoint.folder} has tokens on {oblong[-1]}, published models on squares alone",
            "only models of square images can be exported",
        )
    if isinstance(recipe.objective, MaskedObjective) and recipe.objective.leak_free:
        raise UserError(
            f"{checkpoint.folder} masks tokens before they are upsampled, the published code after it",
            "finetune without objective.leak_free, or export the model that it was finetuned from",
        )


def _require_targets(targets: list[Path]) -> None:
    """Refuse files that are there, that are one, or whose suffix says nothing.

    Raises:
        UserError: there is one.
    """
    for target in targets:
        if target.suffix not in SUFFIXES:
            raise UserError(f"{target}: cannot tell the kind of file", f"end it in {' or '.join(SUFFIXES)}")
        if target.exists() or targets.count(target) > 1:
            raise UserError(f"{target} exists", "choose another file, or remove it")


def _published(state: State, recipe: Recipe) -> State:
    """Weights under their published names, in the published shapes."""
    if isinstance(recipe.model, NextScale):
        return write_transformer(state, recipe.scales.lengths, recipe.model.pattern)
    if isinstance(recipe.model, MaskedAr):
        transformer = recipe.model.dense_head == "transformer"
        positions = sincos_table(*recipe.grid, recipe.model.dense_head_width) if transformer else None
        return write_masked(state, positions)
    if isinstance(recipe.tokenizer, Msvq):
        return write_msvq(state, len(recipe.scales))
    return write_kl(state)


def _untold(recipe: Recipe) -> dict[str, Any]:
    """What no published file holds of its settings."""
    told: dict[str, Any] = {}
    if isinstance(recipe.tokenizer, Msvq):
        told["scales"] = list(recipe.tokenizer.scales)
        told |= {} if recipe.model else {"phi_ratio": recipe.tokenizer.phi_ratio}
    if isinstance(recipe.model, MaskedAr):
        told |= {"heads": recipe.model.heads, "buffer_size": recipe.model.buffer_size}
        told |= {"dense_head_heads": recipe.model.dense_head_heads} if recipe.model.pivots != "none" else {}
    if isinstance(recipe.tokenizer, Kl):
        told["latent_scale"] = recipe.tokenizer.latent_scale or None
    return told


def _write(target: Path, content: Mapping[str, State] | Mapping[str, Tensor]) -> None:
    """Write tensors, or sets of them, to a file that is complete or absent."""
    with atomic_file(target) as temporary:
        if target.suffix == ".safetensors":
            write_tensors(temporary, content)  # type: ignore[arg-type]
        else:
            with temporary.open("wb") as file:  # a full disk is then told as one
                torch.save(content, file)
