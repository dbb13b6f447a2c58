"""Generated images as a source: a folder that `hmar sample` wrote."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmar_cli.data.images import UNLABELLED, Example, ImageSource, decode_image, unusable
from hmar_cli.errors import UserError
from hmar_cli.files import read_json

RECORD = "sample.json"
"""What `hmar sample` writes beside the images."""


class SampleSource(ImageSource):
    """Images of a folder that `hmar sample` wrote, with what each was drawn as.

    Args:
        folder: its name.
        paths: the images in order.
        classes: name of each class by its label in the model; empty without classes.
        labels: image i was drawn as the i-th of them, modulo their number.
        prompts: the same of texts; empty without.
    """

    def __init__(
        self,
        folder: str,
        paths: Sequence[Path],
        classes: dict[int, str],
        labels: Sequence[int],
        prompts: Sequence[str],
    ) -> None:
        order = {label: place for place, label in enumerate(sorted(classes))}  # that of the model's classes
        names = tuple(classes[label] for label in order)
        super().__init__(folder, names or UNLABELLED, len(paths), captioned=bool(prompts))
        self._paths, self._prompts = tuple(paths), tuple(prompts)
        self._labels = [order[label] for label in labels] if order else [0]

    def example(self, index: int) -> Example:
        """Decode one image."""
        try:
            image = decode_image(str(self._paths[index]))
        except Exception as error:  # whatever a codec raises on broken bytes
            return unusable(index, error)
        captions = (self._prompts[index % len(self._prompts)],) if self._prompts else ()
        return Example(index, image, self._labels[index % len(self._labels)], captions)


def read_samples(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Read what `hmar sample` wrote: its settings, and the paths of all images in order.

    Raises:
        UserError: another folder, or images that are missing.
    """
    hint = "give a folder that `hmar sample` wrote"
    if not is_samples(folder):
        raise UserError(f"no {RECORD} in {folder}", hint)
    about: Any = read_json(folder / RECORD)
    if not isinstance(about, dict):
        raise UserError(f"{folder / RECORD} holds no settings", hint)
    images = sorted(folder.glob("[0-9]" * 6 + ".png"))
    if not images:
        raise UserError(f"no images in {folder}", hint)
    count = max(len(images), int(about.get("count", 0)))
    there = {path.name for path in images}
    gap = next((i for i in range(count) if f"{i:06d}.png" not in there), None)
    if gap is not None:
        raise UserError(
            f"{folder / f'{gap:06d}.png'} is missing", "run the same `hmar sample` again: it goes on"
        )
    return about, images


def is_samples(folder: Path) -> bool:
    """Whether `hmar sample` wrote this folder."""
    return (folder / RECORD).is_file()


def open_samples(folder: Path) -> SampleSource:
    """Open a folder that `hmar sample` wrote, by the labels or prompts that its images were drawn with.

    Raises:
        UserError: another folder, or one whose images are not all there.
    """
    about, images = read_samples(folder)
    names, labels, prompts = (about.get(key) or [] for key in ("class_names", "labels", "prompts"))
    try:
        classes = {int(label): str(name) for label, name in zip(labels, names, strict=True)}
        texts = [str(each) for each in prompts]
    except (TypeError, ValueError):  # not of this program, or of another version
        classes, labels, texts = {}, [], []
    return SampleSource(str(folder), images, classes, [int(label) for label in labels], texts)
