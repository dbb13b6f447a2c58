"""Images in tables: folders, parquet and WebDataset files and names of the hub, read by `datasets`."""

import difflib
import glob
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from hmar_cli.data.images import UNLABELLED, Example, ImageSource, decode_image, unusable
from hmar_cli.data.spelling import check_options, flag
from hmar_cli.errors import UserError, first_line

OPTIONS = ("split", "image", "label", "caption", "config", "streaming", "classes")
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo")
LABEL_NAMES = ("label", "labels", "class", "cls", "category", "target")
CAPTION_NAMES = ("caption", "captions", "text", "txt", "prompt", "description")
SPLIT_FOLDERS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
READ_ROWS = 32  # rows fetched from a table at a time


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Which columns of a table hold what; `json.label` is a field of the column `json`."""

    image: str
    label: str | None
    caption: str | None

    def roots(self) -> list[str]:
        """The columns to read."""
        names = [name.split(".")[0] for name in (self.image, self.label, self.caption) if name]
        return list(dict.fromkeys(names))


@dataclass(frozen=True, kw_only=True)
class Labels:
    """How a label column is read."""

    names: tuple[str, ...]
    by_value: Mapping[Any, int] = field(default_factory=dict)  # where values are names

    def of(self, value: Any) -> int:
        """Return the label.

        Raises:
            ValueError: no label, or one that is none of the classes.
        """
        if value is None:
            raise ValueError("no label")
        label = self.by_value.get(value, -1) if isinstance(value, str) else int(value)
        if not 0 <= label < len(self.names):
            raise ValueError(f"label {value!r} is none of the {len(self.names)} classes")
        return label


class TableSource(ImageSource):
    """Rows of a `datasets.Dataset` or `IterableDataset`, whose images are decoded here, one by one."""

    def __init__(
        self, name: str, data: Any, *, columns: Columns, labels: Labels, length: int | None, streaming: bool
    ) -> None:
        super().__init__(name, labels.names, length, captioned=columns.caption is not None)
        self._data = data.select_columns(columns.roots())
        self._columns, self._labels, self._streaming = columns, labels, streaming
        self._stream: Iterator[Any] = iter(())
        self._next = -1  # index of the stream's next row; -1 before it is opened

    @property
    def random_access(self) -> bool:
        """Unless it is a stream."""
        return not self._streaming

    def deferred(self, start: int, stop: int) -> Iterator[Callable[[], Example]]:
        """Yield functions that decode the images."""
        rows = self._stream_rows(start, stop) if self._streaming else self._table_rows(start, stop)
        for index, row in enumerate(rows, start):
            yield partial(self._decode, index, row)

    def example(self, index: int) -> Example:
        """Fetch and decode one image."""
        return self[index]

    def pick(self, indices: Sequence[int]) -> Iterator[Callable[[], Example]]:
        """Yield functions that decode some images, whose rows are fetched together."""
        if indices and not 0 <= min(indices) <= max(indices) < len(self):
            raise IndexError(f"expected indices below {len(self)}, got {min(indices)}..{max(indices)}")
        for index, row in zip(indices, _rows(self._data[list(indices)]), strict=True):
            yield partial(self._decode, index, row)

    def _table_rows(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        stop = min(stop, len(self))
        for first in range(start, stop, READ_ROWS):
            yield from _rows(self._data[first : min(first + READ_ROWS, stop)])

    def _stream_rows(self, start: int, stop: int) -> Iterator[dict[str, Any]]:
        """Go on where the last reading ended, skipping rows undecoded; go back to the start only if asked."""
        if self._next < 0 or start < self._next:
            self._stream, self._next = iter(self._data), 0
        for row in self._stream:
            self._next += 1
            if self._next > start:
                yield row
            if self._next >= stop:
                return

    def _decode(self, index: int, row: Mapping[str, Any]) -> Example:
        columns = self._columns
        try:
            label = self._labels.of(_field(row, columns.label)) if columns.label else 0
            image = decode_image(_field(row, columns.image))
        except Exception as error:  # whatever a codec raises on broken bytes
            return unusable(index, error)
        text = _field(row, columns.caption) if columns.caption else None
        texts = text if isinstance(text, list) else [text]
        return Example(index, image, label, tuple(each for each in texts if isinstance(each, str) and each))


def open_table(spec: str, location: str, options: Mapping[str, str]) -> TableSource:
    """Open a table; location and options as `open_source` describes them.

    Raises:
        UserError: nothing there, an unknown option, or no column of images.
    """
    check_options(spec, options, OPTIONS)
    streaming = flag(options.get("streaming", "false"), "streaming")
    data = _load(spec, location, options, streaming)
    if data.features is None:
        raise UserError(f"{spec} does not say which columns it has", "leave out streaming=true")
    columns = _find_columns(spec, data, options)
    if not streaming and not len(data):
        raise UserError(f"{spec} holds no images")
    labels = _find_labels(spec, data, columns.label, options, streaming)
    datasets = _datasets()
    if isinstance(data.features[columns.image.split(".")[0]], datasets.Image):
        data = data.cast_column(columns.image, datasets.Image(decode=False))
    length = _stream_length(data) if streaming else len(data)
    return TableSource(spec, data, columns=columns, labels=labels, length=length, streaming=streaming)


def _datasets() -> Any:
    """The `datasets` package, without progress bars where nobody watches."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _load(spec: str, location: str, options: Mapping[str, str], streaming: bool) -> Any:
    """Call `datasets.load_dataset` as the location asks."""
    datasets = _datasets()
    arguments = _arguments(spec, location, options)
    try:
        return datasets.load_dataset(**arguments, streaming=streaming)
    except UserError:
        raise
    except Exception as error:  # `datasets` raises many kinds; its first line says what is wrong
        cause = f" ({error.__cause__})" if error.__cause__ else ""
        hint = "check the name, and the options after '?': split=…, config=…"
        raise UserError(f"cannot open {spec}: {first_line(error)}{cause}", hint) from error


def _arguments(spec: str, location: str, options: Mapping[str, str]) -> dict[str, Any]:
    """The arguments of `load_dataset`, by what the location is."""
    split = options.get("split", "train")
    named: dict[str, Any] = {"name": options["config"]} if "config" in options else {}
    path = Path(location).expanduser()
    if path.is_dir():
        kind = _folder_kind(path)
        if kind == "imagefolder":
            return _image_folder_arguments(spec, path, options)
        return {"path": str(path.resolve()), "split": split, **named}
    found = glob.glob(str(path), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
    files = [path] if path.is_file() else sorted(map(Path, found))
    if files:
        kinds = [_file_kind(file) for file in files]
        if "" in kinds or len(set(kinds)) > 1:
            raise UserError(
                f"cannot read {files[kinds.index('') if '' in kinds else 0]} as a source of images",
                "give pictures, .parquet files, WebDataset .tar files, a folder, or owner/name of the hub",
            )
        names = [glob.escape(str(file.resolve())) for file in files]
        labels = {"drop_labels": True} if kinds[0] == "imagefolder" else {}
        return {"path": kinds[0], "data_files": {_split_name(split): names}, "split": split, **labels}
    hub = re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", location) and path.suffix.lower() not in FILE_KINDS
    if hub and not path.parent.exists():
        return {"path": location, "split": split, **named}
    raise UserError(
        f"no such source: {location}",
        "give a folder of images, .parquet or .tar files, owner/name of the hub, coco:…, or builtin:shapes",
    )


FILE_KINDS = {".parquet": "parquet", ".tar": "webdataset"}


def _file_kind(file: Path) -> str:
    """What a data file or a picture is opened as, by its name; empty for anything else."""
    suffix = file.suffix.lower()
    return FILE_KINDS.get(suffix, "imagefolder" if suffix in Image.registered_extensions() else "")


def _split_name(split: str) -> str:
    """The name in a split such as `train[:10%]`."""
    return split.split("[")[0]


def _folder_kind(folder: Path) -> str:
    """What a folder holds: the kind of its first data file, else images."""
    for _, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            if kind := _file_kind(Path(file)):
                return kind
    raise UserError(f"no images, .parquet or .tar files in {folder}", "give a folder that holds some")


def _image_folder_arguments(spec: str, folder: Path, options: Mapping[str, str]) -> dict[str, Any]:
    """Arguments for a folder of images; `folder/train` and the like are splits, other folders are classes."""
    split = options.get("split", "train")
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    if _split_name(split) in folders and ("split" in options or set(folders) <= SPLIT_FOLDERS):
        folder = folder / _split_name(split)
    elif "split" in options and _split_name(split) != "train":
        raise UserError(
            f"{spec}: no folder '{_split_name(split)}' in {folder}", f"it has {', '.join(folders)}"
        )
    classes = any(path.is_dir() and path.name[0] != "." for path in folder.iterdir())
    described = any((folder / f"metadata.{suffix}").exists() for suffix in ("csv", "jsonl", "parquet"))
    # without `drop_labels`, `datasets` would give no labels to a single class
    labels = {} if described else {"drop_labels": not classes}
    pattern = glob.escape(str(folder.resolve())) + "/**"
    return {"path": "imagefolder", "data_files": {_split_name(split): pattern}, "split": split, **labels}


def _rows(block: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a block of columns."""
    return (dict(zip(block, values, strict=True)) for values in zip(*block.values(), strict=True))


def _field(row: Mapping[str, Any], name: str | None) -> Any:
    """A value of a row; the name may be a path such as `json.label`."""
    value: Any = row
    for key in (name or "").split("."):
        value = None if value is None else value.get(key)
    return value


def _find_columns(spec: str, data: Any, options: Mapping[str, str]) -> Columns:
    """Find the columns by option, else by type, else by name."""
    features = _flatten(data.features)
    for key in ("image", "label", "caption"):
        if (name := options.get(key, "none")) != "none" and name not in features:
            near = difflib.get_close_matches(name, features, 1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise UserError(f"{spec}: no column '{name}'", f"{hint}columns are {', '.join(features)}")
    datasets = _datasets()
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    image = options.get("image") or next(iter(images + _named(features, IMAGE_NAMES)), None)
    if image is None:
        raise UserError(f"{spec}: no column of images", f"say image=NAME; columns are {', '.join(features)}")
    label = options.get("label") or _guess_label(spec, features)
    caption = options.get("caption") or next(iter(_named(features, CAPTION_NAMES)), None)
    return Columns(
        image=image,
        label=None if label == "none" else label,
        caption=None if caption in ("none", label) else caption,
    )


def _flatten(features: Mapping[str, Any]) -> dict[str, Any]:
    """Columns by name, and the fields of structures as `column.field`."""
    flat: dict[str, Any] = {}
    for name, feature in features.items():
        flat[name] = feature
        if isinstance(feature, Mapping) and not {"bytes", "path"} & set(feature):
            flat |= {f"{name}.{key}": value for key, value in _flatten(feature).items()}
    return flat


def _named(features: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """The columns of common names, in the order of `names`; whole structures are passed over."""
    plain = {name: f for name, f in features.items() if not isinstance(f, Mapping) or "bytes" in f}
    return [column for name in names for column in plain if column.split(".")[-1].lower() == name]


def _guess_label(spec: str, features: Mapping[str, Any]) -> str | None:
    datasets = _datasets()
    classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    named = _named(features, LABEL_NAMES)
    for name in named:
        if name in classes:
            return name
    if len(classes) > 1:
        raise UserError(f"{spec} has several columns of labels", f"say label={' or label='.join(classes)}")
    return next(iter(classes + named), None)


def _find_labels(
    spec: str, data: Any, column: str | None, options: Mapping[str, str], streaming: bool
) -> Labels:
    """Class names and how values become labels: from `classes=`, the column's type, or its values."""
    if column is None:
        return Labels(names=UNLABELLED)
    feature = _flatten(data.features)[column]
    if classes := options.get("classes"):
        names = tuple(map(str, range(int(classes)))) if classes.isdecimal() else tuple(classes.split(","))
        return Labels(names=names, by_value={name: i for i, name in enumerate(names)})
    if isinstance(feature, _datasets().ClassLabel):
        return Labels(names=tuple(feature.names), by_value={name: i for i, name in enumerate(feature.names)})
    if streaming:
        raise UserError(
            f"{spec}: a stream does not tell the classes of its column '{column}'",
            "say classes=cat,dog or classes=10, or label=none",
        )
    values = _unique(data, column) - {None}
    if values and all(isinstance(value, str) for value in values):
        names = tuple(sorted(values))
        return Labels(names=names, by_value={name: i for i, name in enumerate(names)})
    if values and all(isinstance(value, int) for value in values):
        return Labels(names=tuple(map(str, range(max(values | {0}) + 1))))
    raise UserError(
        f"{spec}: the column '{column}' holds neither names nor whole numbers", "choose another by label=NAME"
    )


def _unique(data: Any, column: str) -> set[Any]:
    """The values of a column."""
    root, *rest = column.split(".")
    table = data.select_columns([root])
    return set((table.flatten() if rest else table).unique(column))


def _stream_length(data: Any) -> int | None:
    """How many rows a stream says it has."""
    splits = getattr(data.info, "splits", None) or {}
    known = splits.get(str(data.split)) if data.split is not None else None
    return int(known.num_examples) if known and known.num_examples else None
