"""What `hmar eval samples` looks at: images that are there, or those that a checkpoint draws for it."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hmar_cli.errors import UserError
from hmar_cli.files import cache_folder, read_json

if TYPE_CHECKING:
    from hmar_cli.commands.drawing import Contents, Drawing, Order
    from hmar_cli.data.images import ImageSource

LONG = 32
"""Entries of a list that a report holds in full; longer ones are named by their hash."""


@dataclass(frozen=True)
class Subject:
    """Images to be measured.

    Attributes:
        source: the images.
        about: where they come from, for the report.
        drawing: how fast they were drawn, where they were.
    """

    source: "ImageSource"
    about: dict[str, Any]
    drawing: dict[str, Any] = field(default_factory=dict)


def is_checkpoint(path: Path) -> bool:
    """Whether a checkpoint lies there, or a run folder with some."""
    from hmar_cli.checkpoints.store import list_steps

    return (path / "checkpoint.json").is_file() or bool(list_steps(path))


def open_images(spelling: str, size: Any) -> Subject:
    """Images that are there; `size` is that of drawn ones, such as `builtin:shapes`.

    Raises:
        UserError: nothing there.
    """
    from hmar_cli.data.samples import RECORD, is_samples
    from hmar_cli.data.sources import open_source

    source = open_source(spelling, size=size)
    about: dict[str, Any] = {"kind": "images", "source": spelling}
    if is_samples(folder := Path(spelling).expanduser()):
        about |= {"kind": "samples", "sampling": condensed(read_json(folder / RECORD))}
    return Subject(source, about)


@contextlib.contextmanager
def drawn_images(order: "Order", keep: Path | None, device: str) -> Iterator[Subject]:
    """Draw what is asked of a checkpoint, on all processes, which stay together.

    The images lie in `keep`, or in the user's cache until the block ends well: a run that was stopped goes on with
    what is there.

    Raises:
        UserError: the checkpoint cannot draw them, or another command is drawing the same images.
    """
    from hmar_cli.console import console
    from hmar_cli.data.samples import RECORD, open_samples
    from hmar_cli.launch import join_processes, wait_for_processes
    from hmar_cli.sampling.images import Keep, draw_images

    model, codec, about = order.load()
    job = order.job()
    about |= job.describe()
    first = join_processes(device).rank == 0
    with contextlib.ExitStack() as stack:
        out = keep
        if out is None:
            out = place_of({**about, "precision": order.loading.precision})
            stack.enter_context(passing_folder(out, first))
        speed = draw_images(model, codec, job, out, device, about, Keep()) or {}
        del model, codec
        wait_for_processes()
        source = open_samples(out)
        record = condensed(read_json(out / RECORD))
        source.name = str(keep or order.checkpoint.folder)
        found = {"kind": "checkpoint", "recipe": order.checkpoint.recipe.name, "step": order.checkpoint.step}
        if keep and first:
            console.print(f"{job.count} images in {keep}", highlight=False)
        yield Subject(source, {**found, "sampling": record}, speed)


def place_of(record: Mapping[str, Any]) -> Path:
    """Where images of these settings lie while they are needed: the same place for the same images."""
    text = json.dumps(record, sort_keys=True, default=str)
    return cache_folder() / "eval" / hashlib.sha256(text.encode()).hexdigest()[:16]


@contextlib.contextmanager
def passing_folder(folder: Path, first: bool) -> Iterator[None]:
    """A folder that is removed once the block has ended well; else it stays, and a line says so.

    The file by which others are kept out is never removed: a lock on a file without a name would keep out nobody.

    Args:
        folder: which.
        first: whether this process is the one that looks after it.

    Raises:
        UserError: another command is using it.
    """
    import fcntl

    from hmar_cli.console import console

    if not first:
        yield
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another command is drawing these images in {folder}",
                "wait for it, or give each its own --keep FOLDER",
            ) from error
        try:
            yield
        except BaseException:
            if any(folder.glob("*.png")):
                console.print(
                    f"images drawn so far stay in {folder}: the same command goes on", highlight=False
                )
            raise
        shutil.rmtree(folder, ignore_errors=True)


def condensed(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `hmar sample` recorded, less what images do not depend on; long lists by their length and hash."""

    def short(value: Any) -> Any:
        if not isinstance(value, list | tuple) or len(value) <= LONG:
            return value
        digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
        return {"count": len(value), "sha256": digest, "first": value[:3]}

    return {key: short(value) for key, value in record.items() if key != "made_with"}


def order_images(
    checkpoint: Path,
    asked: dict[str, Any],
    loading: "Drawing",
    contents: "Contents",
    count: int,
    batch_size: int,
    reference: str,
) -> "Order":
    """Check what is to be drawn.

    A model that reads texts and is given none gets captions of the reference, chosen by the seed.

    Args:
        checkpoint: checkpoint or run folder of a model.
        asked: settings of the sampler that are not the recipe's.
        loading: with which weights, and how.
        contents: classes or prompts.
        count: images to draw.
        batch_size: images at once; 0 is the recipe's.
        reference: where captions may come from.

    Raises:
        UserError: flags that the checkpoint cannot follow, or no number of images.
    """
    from hmar_cli.checkpoints.store import open_checkpoint
    from hmar_cli.commands.drawing import place_order

    prompts, opened = contents.prompts(), open_checkpoint(checkpoint)
    if not count:
        raise UserError(f"{opened.folder} can draw any number of images", "say how many: --count 10000")
    if opened.recipe.text is not None and not prompts and reference:
        prompts = captions_of(reference, count, loading.seed)
    return place_order(
        opened.folder,
        asked,
        loading,
        labels=contents.labels,
        prompts=prompts,
        count=count,
        batch_size=batch_size,
    )


def captions_of(reference: str, count: int, seed: int) -> list[str]:
    """Captions of a reference; none where it is a file of statistics, or has none.

    Raises:
        UserError: it has some, but too few.
    """
    from hmar_cli.data.captions import draw_captions
    from hmar_cli.data.sources import open_source

    if reference.endswith(".npz"):
        return []
    source = open_source(reference)
    return draw_captions(source, count, seed) if source.captioned else []
