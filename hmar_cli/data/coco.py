"""COCO from its own files: a JSON of images and captions, and the folder that the images lie in."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hmar_cli.data.images import UNLABELLED, Example, ImageSource, decode_image, unusable
from hmar_cli.data.spelling import check_options
from hmar_cli.errors import UserError
from hmar_cli.files import read_json


class CocoSource(ImageSource):
    """Images in the order of their list, each with all its captions.

    What the captions mention but the list of images does not hold comes last, as images that cannot be used.

    Args:
        name: the spelling that opened it.
        folder: where the images lie.
        images: id and file name of each image.
        captions: of each id, in their order.
    """

    def __init__(
        self, name: str, folder: Path, images: Mapping[Any, str], captions: Mapping[Any, list[str]]
    ) -> None:
        strays = [key for key in captions if key not in images]
        super().__init__(name, UNLABELLED, len(images) + len(strays), captioned=True)
        self.folder = folder
        self._captions = [tuple(captions.get(key, ())) for key in images]
        self._files, self._strays = list(images.values()), strays

    def example(self, index: int) -> Example:
        """Decode one image."""
        if index >= len(self._files):
            stray = self._strays[index - len(self._files)]
            return unusable(index, f"captions name the image {stray}, which the list of images lacks")
        try:
            image = decode_image(str(self.folder / self._files[index]))
        except Exception as error:  # no such file, or whatever a codec raises on broken bytes
            return unusable(index, error)
        return Example(index, image, 0, self._captions[index])

    def captions(self, index: int) -> tuple[str, ...]:
        """The texts of one image, which is not opened."""
        return self._captions[index] if index < len(self._files) else ()


def open_coco(spec: str, annotations: str, options: Mapping[str, str]) -> CocoSource:
    """Open COCO's captions, as `captions_train2014.json` holds them.

    Args:
        spec: the whole spelling.
        annotations: path of the JSON: `images` with `id` and `file_name`, `annotations` with `image_id` and
            `caption`.
        options: `images`, the folder of the images.

    Raises:
        UserError: no such file or folder, or a JSON of another form.
    """
    check_options(spec, options, ("images",))
    path, folder = Path(annotations).expanduser(), Path(options.get("images", "")).expanduser()
    if "images" not in options:
        raise UserError(f"{spec} does not say where its images are", f"coco:{annotations}?images=FOLDER")
    if not path.is_file():
        raise UserError(
            f"no such file: {path}", "give the JSON of the captions, such as captions_train2014.json"
        )
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}", "images=FOLDER is where the images of the JSON lie")
    table = read_json(path)
    try:
        images = {each["id"]: str(each["file_name"]) for each in table["images"]}
        captions: dict[Any, list[str]] = {}
        for each in table["annotations"]:
            captions.setdefault(each["image_id"], []).append(str(each["caption"]).strip())
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is no JSON of captions in COCO's form: {type(error).__name__}: {error}",
            'it has "images" with id and file_name, and "annotations" with image_id and caption',
        ) from error
    if not images or not captions:
        raise UserError(f"{path} holds {len(images)} images and captions of {len(captions)}")
    return CocoSource(spec, folder, images, captions)
