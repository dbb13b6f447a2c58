"""Generated images as a source: a folder that `hmar sample` wrote, or any other folder of images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hmar_cli.data.images import UNLABELLED, Example, ImageSource, decode_image, unusable
from hmar_cli.data.sources import open_source
from hmar_cli.errors import UserError
from hmar_cli.files import read_json


class SampleSource(ImageSource):
    """Images of a folder that `hmar sample` wrote; image i is of the i-th class name, modulo their number."""

    def __init__(self, folder: Path, paths: Sequence[Path], drawn: Sequence[str]) -> None:
        super().__init__(str(folder), tuple(dict.fromkeys(drawn)) or UNLABELLED, len(paths))
        self._paths = tuple(paths)
        self._labels = [self.class_names.index(name) for name in drawn] or [0]

    def example(self, index: int) -> Example:
        """Decode one image."""
        try:
            image = decode_image(str(self._paths[index]))
        except Exception as error:  # whatever a codec raises on broken bytes
            return unusable(index, error)
        return Example(index, image, self._labels[index % len(self._labels)])


def read_samples(folder: Path) -> tuple[dict[str, Any], list[Path]]:
    """Read what `hmar sample` wrote: its settings, and the paths of all images in order.

    Raises:
        UserError: another folder, or images that are missing.
    """
    hint = "give a folder that `hmar sample` wrote"
    if not (folder / "sample.json").is_file():
        raise UserError(f"no sample.json in {folder}", hint)
    about: Any = read_json(folder / "sample.json")
    if not isinstance(about, dict):
        raise UserError(f"{folder / 'sample.json'} holds no settings", hint)
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


def open_samples(folder: Path) -> ImageSource:
    """Open a folder of images, by the labels that they were drawn with where `hmar sample` wrote it.

    Raises:
        UserError: no folder, none with images, or one whose images are not all there.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", "give one that `hmar sample` wrote, or any with images")
    if not (folder / "sample.json").is_file():
        return open_source(str(folder))
    about, images = read_samples(folder)
    names, labels = about.get("class_names"), about.get("labels")
    known = isinstance(names, list) and isinstance(labels, list) and len(names) == len(labels)
    return SampleSource(folder, images, [str(name) for name in names] if known and names else [])
