"""Where images come from: files, hub names, COCO's annotations and drawings, by one spelling.

    photos/                               a folder for each class (or pictures without classes)
    photo.jpg, photos/*.png               pictures without classes
    samples/                              what `hmar sample` wrote, with the classes or prompts of its images
    data/train.parquet, data/*.parquet    parquet files, or a folder of them
    shards/*.tar                          WebDataset files, or a folder of them
    samples.npz                           images as ADM's evaluator reads them (`arr_0`), without labels
    owner/name                            a data set of the Hugging Face hub
    coco:captions.json?images=FOLDER      captions in COCO's own format, and the folder of their images
    builtin:shapes                        coloured shapes, drawn by this program
    builtin:scenes                        two of them, and a caption that says which lies where

Options follow a question mark: `owner/name?split=test&label=fine_label&streaming=true`.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from hmar_cli.data import scenes, shapes
from hmar_cli.data.arrays import open_arrays
from hmar_cli.data.coco import open_coco
from hmar_cli.data.images import Example, ImageSource
from hmar_cli.data.samples import is_samples, open_samples
from hmar_cli.data.spelling import check_options, number, split_options
from hmar_cli.data.tables import open_table
from hmar_cli.data.transforms import height_width
from hmar_cli.errors import UserError
from hmar_cli.models.scales import Side

BUILTIN = {"builtin:shapes": ("count", "seed"), "builtin:scenes": ("count", "seed", "split")}
"""Drawn sources and their options."""


class DrawnSource(ImageSource):
    """Pictures that a function draws from their index, such as `builtin:shapes`."""

    def __init__(
        self, name: str, class_names: tuple[str, ...], count: int, draw: Callable[[int], shapes.Drawing]
    ) -> None:
        super().__init__(name, class_names, count, captioned=True)
        self.draw = draw

    def example(self, index: int) -> Example:
        """Draw one image."""
        drawing = self.draw(index)
        return Example(index, drawing.image, drawing.label, (drawing.caption,))


def open_source(spec: str, *, size: Side | None = None) -> ImageSource:
    """Open a source by its spelling (see the module's description).

    Args:
        spec: SOURCE or SOURCE?key=value&key=value. Keys of tables: split, image, label, caption (names of
            columns; `label=none` ignores labels), config, streaming=true, classes (names by comma, or a
            number, where a stream does not tell). Keys of `coco:`: images. Keys of
            `builtin:`: count, seed, and of scenes split (all, train or test: other arrangements).
        size: size at which pictures are drawn, 64 by default; other sources ignore it.

    Raises:
        UserError: nothing there, an unknown option, no column of images, or generated images that are not all there.
    """
    location, options = split_options(spec)
    if location.startswith("builtin:"):
        return _open_drawn(spec, location, options, height_width(64 if size is None else size))
    if location.startswith("coco:"):
        return open_coco(spec, location.removeprefix("coco:"), options)
    if location.endswith(".npz"):
        check_options(spec, options, ())
        return open_arrays(Path(location).expanduser())
    if is_samples(folder := Path(location).expanduser()):
        if options:
            raise UserError(
                f"{spec}: images of `hmar sample` come with what they were drawn as",
                "leave out what follows the question mark",
            )
        return open_samples(folder)
    return open_table(spec, location, options)


def _open_drawn(spec: str, location: str, options: Mapping[str, str], size: tuple[int, int]) -> DrawnSource:
    if location not in BUILTIN:
        raise UserError(f"no built-in data called '{location}'", f"there is {' and '.join(BUILTIN)}")
    check_options(spec, options, BUILTIN[location])
    count, seed = number(options.get("count", "10000"), "count"), number(options.get("seed", "0"), "seed")
    if count < 1:
        raise UserError(f"count={count} in {spec}: expected at least 1")
    if location == "builtin:shapes":
        return DrawnSource(spec, shapes.SHAPES, count, partial(shapes.draw, size=size, seed=seed))
    split = options.get("split", "all")
    if split not in scenes.SPLITS:
        raise UserError(f"split={split} in {spec}: expected {', '.join(scenes.SPLITS)}")
    draw = partial(scenes.draw, size=size, seed=seed, split=split)
    return DrawnSource(spec, scenes.CLASSES, count, draw)
