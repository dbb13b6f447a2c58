"""The project's own checkpoints: a folder of safetensors files, a resolved recipe and a description.

    step-00001000/
        checkpoint.json        what this is: kind, step, class names, licence, origin, tokenizer's hash
        recipe.toml            the recipe with every setting
        model.safetensors      the trained weights
        ema.safetensors        their running average, if one was kept
        tokenizer/             the tokenizer, itself a checkpoint folder, where the model needs one
        training/              optimizer moments and counters, where training can go on from here

A run folder holds such folders, one a saved step. Nothing in them is ever unpickled.
"""

import contextlib
import errno
import math
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hmar_cli.errors import UserError
from hmar_cli.files import atomic_folder, file_sha256, read_json, write_json
from hmar_cli.recipe import recipe_from_dict, to_toml
from hmar_cli.settings import Recipe

FORMAT, VERSION = "hmar", 1
STEP_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint folder that was opened; weights are read on demand.

    Attributes:
        folder: where it lies.
        kind: what it holds: a tokenizer ("msvq", "kl"), a model ("next-scale", "masked-ar") or a "classifier".
        recipe: the resolved recipe that made it.
        class_names: one name a class, in the order of the class embedding.
        step: optimizer steps that made it.
        weights: the sets of weights, "model" and perhaps "ema".
        licence: licence of the weights, empty if they are the user's own.
        source: file name and SHA-256 of an imported file, else None.
        tokenizer_hash: fingerprint of the tokenizer (of the weights themselves, for a tokenizer or classifier).
    """

    folder: Path
    kind: str
    recipe: Recipe
    class_names: tuple[str, ...]
    step: int
    weights: tuple[str, ...]
    licence: str
    source: dict[str, Any] | None
    tokenizer_hash: str

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the tokenizer inside the checkpoint; None if it carries none."""
        folder = self.folder / "tokenizer"
        return folder if folder.is_dir() else None

    @property
    def resumable(self) -> bool:
        """Whether training can go on from here."""
        return (self.folder / "training" / "state.json").is_file()

    def weights_file(self, which: str = "") -> Path:
        """The file of some weights.

        Args:
            which: "model", "ema", or "" for "ema" where it exists.

        Raises:
            UserError: the checkpoint has no such weights.
        """
        which = which or ("ema" if "ema" in self.weights else "model")
        if which not in self.weights:
            raise UserError(f"{self.folder} has no weights '{which}'", f"it has {', '.join(self.weights)}")
        return self.folder / f"{which}.safetensors"

    def describe(self, which: str = "") -> dict[str, Any]:
        """The checkpoint with some of its weights, for the record.

        Args:
            which: see `weights_file`.

        Raises:
            UserError: the checkpoint has no such weights.
        """
        file = self.weights_file(which)
        return {
            "checkpoint": str(self.folder),
            "recipe": self.recipe.name,
            "step": self.step,
            "weights": file.stem,
            "weights_sha256": file_sha256(file),
            "tokenizer_hash": self.tokenizer_hash,
        }

    def load(self, which: str = "") -> dict[str, Tensor]:
        """Read weights on the CPU.

        Args:
            which: see `weights_file`.

        Raises:
            UserError: the checkpoint has no such weights, or their file is broken.
        """
        return read_tensors(self.weights_file(which))

    def parameters(self) -> int:
        """Count the numbers of the weights "model" by the head of their file, which is all that is read.

        Raises:
            UserError: their file is broken.
        """
        path = self.folder / "model.safetensors"
        with _told(path), safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118

    def counters(self) -> dict[str, Any]:
        """Read the plain part of what training needs to go on, such as the step and the data's name.

        Raises:
            UserError: the checkpoint holds weights alone, or the file is broken.
        """
        if not self.resumable:
            raise UserError(
                f"{self.folder} holds weights alone, without the state of the optimizer",
                f"start a new run from it with --init {self.folder}",
            )
        counters: dict[str, Any] = read_json(self.folder / "training" / "state.json")
        return counters

    def training(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read all that training needs to go on: tensors by name, and `counters`.

        Raises:
            UserError: the checkpoint holds weights alone, or a file is broken.
        """
        counters = self.counters()
        return read_tensors(self.folder / "training" / "optimizer.safetensors"), counters


def save_checkpoint(
    folder: Path,
    *,
    recipe: Recipe,
    weights: Mapping[str, Mapping[str, Tensor]],
    class_names: Sequence[str],
    step: int,
    tokenizer: Path | None,
    tokenizer_hash: str,
    licence: str = "",
    source: Mapping[str, Any] | None = None,
    training: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None,
) -> None:
    """Write a checkpoint folder, which appears only once it is complete and on the disk.

    Args:
        folder: the folder to make.
        recipe: the resolved recipe; the checkpoint's kind is that of what it trains.
        weights: state dicts by name: "model", and "ema" if there is one.
        class_names: one name a class.
        step: optimizer steps done.
        tokenizer: a checkpoint folder to carry along (hard-linked where the file system can).
        tokenizer_hash: fingerprint of the tokenizer.
        licence: licence of the weights.
        source: file name and SHA-256 of an imported file.
        training: tensors and counters from which training goes on.

    Raises:
        OSError: the disk is full, or the folder cannot be written; nothing is left behind.
        ValueError: no weights called "model".
    """
    if "model" not in weights:
        raise ValueError(f"expected weights called 'model', got {sorted(weights)}")
    about = {
        "format": FORMAT,
        "version": VERSION,
        "kind": recipe.trains,
        "step": step,
        "class_names": list(class_names),
        "weights": sorted(weights, key=lambda name: name != "model"),
        "licence": licence,
        "source": dict(source) if source else None,
        "tokenizer_hash": tokenizer_hash,
        "versions": {"python": platform.python_version(), "torch": str(torch.__version__)},
    }
    with atomic_folder(folder) as temporary:
        (temporary / "recipe.toml").write_text(to_toml(recipe), encoding="utf-8")
        for name, state in weights.items():
            write_tensors(temporary / f"{name}.safetensors", state)
        if tokenizer is not None:
            _carry(tokenizer, temporary / "tokenizer")
        if training is not None:
            tensors, counters = training
            (temporary / "training").mkdir()
            write_tensors(temporary / "training" / "optimizer.safetensors", tensors)
            write_json(temporary / "training" / "state.json", dict(counters))
        write_json(temporary / "checkpoint.json", about)
        _flush(temporary)


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a checkpoint folder, or the newest checkpoint of a run folder.

    Raises:
        UserError: nothing there, not a checkpoint, broken, or of a newer format.
    """
    folder = find_checkpoint(path)
    about = read_json(folder / "checkpoint.json")
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise UserError(f"{folder}/checkpoint.json does not describe a checkpoint of hmar")
    if about.get("version") != VERSION:
        found = f"version {about.get('version')}"
        raise UserError(
            f"{folder} has {found} of the format, this program reads {VERSION}", "update hmar-cli"
        )
    try:
        text = (folder / "recipe.toml").read_text(encoding="utf-8")
        return Checkpoint(
            folder=folder,
            kind=about["kind"],
            recipe=recipe_from_dict(tomli.loads(text)),
            class_names=tuple(about["class_names"]),
            step=int(about["step"]),
            weights=tuple(about["weights"]),
            licence=about["licence"],
            source=about["source"],
            tokenizer_hash=about["tokenizer_hash"],
        )
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{folder} is not a whole checkpoint: {type(error).__name__}: {error}") from error


def find_checkpoint(path: Path | str) -> Path:
    """Return the checkpoint folder at `path`: itself, or the newest complete step of a run folder.

    Raises:
        UserError: the path does not exist, or holds no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"no such checkpoint: {path}", "give a checkpoint folder, or the --out folder of a run"
        )
    if (path / "checkpoint.json").is_file():
        return path
    steps = list_steps(path)
    if not steps:
        if (path / "tokenizer" / "checkpoint.json").is_file():
            raise UserError(
                f"{path} is a cache, no checkpoint", f"it carries a tokenizer in {path}/tokenizer"
            )
        raise UserError(
            f"no checkpoint in {path}", "expected checkpoint.json, or folders such as step-00001000"
        )
    return steps[-1]


def list_steps(run: Path) -> list[Path]:
    """Complete checkpoints of a run folder, oldest first."""
    if not run.is_dir():
        return []
    found = [(int(match[1]), path) for path in run.iterdir() if (match := STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if (path / "checkpoint.json").is_file()]


def step_folder(run: Path, step: int) -> Path:
    """Where a run keeps the checkpoint of a step."""
    return run / f"step-{step:08d}"


def prune(run: Path, keep: int, never: Path | None = None) -> None:
    """Delete all but the newest `keep` checkpoints of a run folder, at least one.

    Args:
        run: the run folder.
        keep: how many to keep.
        never: a checkpoint that stays in any case.
    """
    for folder in list_steps(run)[: -max(keep, 1)]:
        if never is None or folder.resolve() != never.resolve():
            # renamed first, so that a checkpoint is whole or gone, whatever interrupts the deletion
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.old")))


def clean(run: Path) -> None:
    """Delete what a killed run left half-written or half-deleted in its folder."""
    for leftover in [*run.glob(".step-*.tmp"), *run.glob(".step-*.old")]:
        shutil.rmtree(leftover, ignore_errors=True)


def remap_class_embedding(old: Tensor, fresh: Tensor, places: Sequence[int]) -> Tensor:
    """Carry class embeddings over to another list of classes.

    Args:
        old: embeddings to start from, one row a class, and in some models more below them ("no class").
        fresh: initial embeddings of the new classes and of as many rows more.
        places: where each of the new classes is among the old ones; -1 keeps its initial embedding.

    Raises:
        ValueError: more classes than embeddings, or one that is not among the old ones.
    """
    more = len(fresh) - len(places)
    if not 0 <= more <= len(old) or max(places, default=-1) >= len(old) - more:
        raise ValueError(
            f"expected a row a class and as many more in both, got {len(old)}, and {len(fresh)} for {list(places)}"
        )
    result = fresh.clone()
    result[len(places) :] = old[len(old) - more :]
    for new, place in enumerate(places):
        if place >= 0:
            result[new] = old[place]
    return result


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: as the system reports it, for instance on a full disk.
    """
    try:
        save_file(_separate(tensors), path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU.

    Raises:
        UserError: the file is missing, cut short or not of this format.
    """
    with _told(path):
        return dict(load_file(path))


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Say of a safetensors file that it is missing or broken."""
    if not path.is_file():
        raise UserError(f"missing file of a checkpoint: {path}")
    try:
        yield
    except SafetensorError as error:
        raise UserError(
            f"{path} is broken: {error}",
            "make this checkpoint again; in a run's folder an older one may be whole",
        ) from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, each in memory of its own, as safetensors wants them."""
    result: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().to("cpu").contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.numel() * tensor.element_size():
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _carry(source: Path, target: Path) -> None:
    """Copy the parts of a checkpoint that describe a network; whole files are hard-linked where possible."""
    source = find_checkpoint(source)
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():  # the sets of weights, the recipe and the description, but not the training state
            _link(path, target / path.name)


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where links cannot be made."""
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP):
            raise
        shutil.copy2(source, target)


def _flush(folder: Path) -> None:
    """Push every file of a folder to the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
