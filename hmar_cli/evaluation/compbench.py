"""T2I-CompBench (Huang et al. 2023): its prompts in, images in the layout that its own evaluators read.

Its prompts lie in one file a category, `color_val.txt` and so on, a prompt a line; what follows a tab is no part of
the prompt. Its evaluators look at one category at a time, in a folder `samples` of files `PROMPT_INDEX.png`: the
prompt is what stands before the first underscore, and the index, of six digits, goes on through the category, so
that all images of one prompt follow one another.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from hmar_cli.data.captions import read_prompts
from hmar_cli.errors import UserError
from hmar_cli.files import atomic_folder

SUFFIX = "_val.txt"
"""Of the names of the files that hold the prompts to be measured."""

LONGEST = 255 - len("_000000.png")
"""Bytes of a prompt that still fits into the name of a file."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Category:
    """A category and its prompts, in the order of the file."""

    name: str
    prompts: tuple[str, ...]


def read_categories(folder: Path, names: Sequence[str] = (), limit: int = 0) -> list[Category]:
    """Read the prompts of a folder's files `CATEGORY_val.txt`.

    Args:
        folder: such as `examples/dataset` of T2I-CompBench.
        names: of the categories; none is all that are there, in the order of the alphabet.
        limit: of each category's first prompts; 0 is all.

    Raises:
        UserError: no such folder or category, a file without prompts, or a prompt that cannot name a file.
    """
    hint = "give T2I-CompBench's examples/dataset, or a folder with files such as color_val.txt"
    if not folder.is_dir():
        raise UserError(f"no folder {folder}", hint)
    there = {path.name.removesuffix(SUFFIX): path for path in sorted(folder.glob(f"*{SUFFIX}"))}
    if not there:
        raise UserError(f"no files *{SUFFIX} in {folder}", hint)
    if strange := [name for name in names if name not in there]:
        raise UserError(f"no {strange[0]}{SUFFIX} in {folder}", f"there are {', '.join(there)}")
    return [Category(name, _read_prompts(there[name], limit)) for name in names or there]


def _read_prompts(path: Path, limit: int) -> tuple[str, ...]:
    prompts = [line.split("\t")[0].rstrip() for line in read_prompts(path)][: limit or None]
    for prompt in prompts:
        if "_" in prompt or "/" in prompt or "\0" in prompt or len(prompt.encode()) > LONGEST:
            raise UserError(
                f"{path}: the prompt {prompt[:60]!r} cannot be part of a file's name as the evaluators read it",
                f"leave out _ and /, and keep to {LONGEST} bytes",
            )
    return tuple(prompts)


def all_prompts(categories: Sequence[Category]) -> list[str]:
    """The prompts of all categories, in the order in which images are drawn: image i is of prompt i, modulo n."""
    return [prompt for category in categories for prompt in category.prompts]


def by_category(
    drawn: Sequence[Value], categories: Sequence[Category], per_prompt: int
) -> dict[str, list[Value]]:
    """Sort what is known of each drawn image into the categories, in the order of the evaluators' index.

    Args:
        drawn: of image i, which is of prompt i, modulo the n prompts of all categories; n * per_prompt values.
        categories: as they were drawn.
        per_prompt: images of a prompt.

    Raises:
        ValueError: another number of values.
    """
    count = len(all_prompts(categories))
    if len(drawn) != count * per_prompt:
        raise ValueError(f"expected {count * per_prompt} values, got {len(drawn)}")
    found, first = {}, 0
    for category in categories:
        places = range(first, first + len(category.prompts))
        found[category.name] = [drawn[place + i * count] for place in places for i in range(per_prompt)]
        first = places.stop
    return found


def lay_out(images: Mapping[str, Sequence[Path]], categories: Sequence[Category], out: Path) -> list[Path]:
    """Give images the places and names that the evaluators expect: `OUT/CATEGORY/samples/PROMPT_INDEX.png`.

    Files are linked, or copied where the file system has no links; what lay in these folders before is gone.

    Args:
        images: files by category, in the order of the index.
        categories: the prompts.
        out: folder of the categories' folders.

    Returns:
        The folders `OUT/CATEGORY`, which the evaluators take.
    """
    folders = []
    for category in categories:
        paths = images[category.name]
        per_prompt = len(paths) // len(category.prompts)
        with atomic_folder(out / category.name / "samples") as folder:
            for index, path in enumerate(paths):
                target = folder / f"{category.prompts[index // per_prompt]}_{index:06d}.png"
                try:
                    os.link(path, target)
                except OSError:  # another file system, or one without links
                    shutil.copyfile(path, target)
        folders.append(out / category.name)
    return folders
