"""How papers measure: extractor, metrics, number of images, size, crop and reference, each under one name."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

from hmar_cli.data.arrays import open_arrays
from hmar_cli.data.transforms import Crop
from hmar_cli.errors import UserError
from hmar_cli.evaluation.references import is_statistics
from hmar_cli.files import cache_folder, fetch

ADM_BATCHES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
ADM_METRICS = ("fid", "sfid", "is", "precision", "recall")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One protocol.

    Attributes:
        about: whose, in one line.
        extractor: its spelling.
        metrics: what is measured.
        count: images that are drawn and measured.
        size: to which images are cut, in pixels.
        crop: how.
        reference: what it is, for people.
        address: where its file is published; empty where the user brings the images.
    """

    about: str
    extractor: str = "inception"
    metrics: tuple[str, ...]
    count: int
    size: int
    crop: Crop = "adm"
    reference: str
    address: str = ""


PRESETS = {
    "adm-imagenet-256": Preset(
        about="ImageNet 256 x 256 as ADM, and after it VAR, MAR, HMAR and Hi-MAR: 50 images a class",
        metrics=ADM_METRICS,
        count=50_000,
        size=256,
        reference="ADM's VIRTUAL_imagenet256_labeled.npz",
        address=f"{ADM_BATCHES}/256/VIRTUAL_imagenet256_labeled.npz",
    ),
    "adm-imagenet-512": Preset(
        about="ImageNet 512 x 512 as ADM, and after it VAR and HMAR: 50 images a class",
        metrics=ADM_METRICS,
        count=50_000,
        size=512,
        reference="ADM's VIRTUAL_imagenet512.npz",
        address=f"{ADM_BATCHES}/512/VIRTUAL_imagenet512.npz",
    ),
    "coco-30k": Preset(
        about="MS-COCO 256 x 256 as U-ViT and Hi-MAR (section 4.1): 30,000 prompts of the validation set",
        metrics=("fid",),
        count=30_000,
        size=256,
        reference="the images of COCO's validation set of 2014, or their statistics",
    ),
}


def find_preset(name: str) -> Preset:
    """The preset of a name.

    Raises:
        UserError: there is none.
    """
    if name not in PRESETS:
        raise UserError(f"no preset {name!r}", f"there are {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_reference(name: str, preset: Preset, given: str, fetch: bool = True) -> str:
    """The reference of a preset: the one that was given, if it can be it, else the published file.

    Args:
        name: the preset's name, for messages.
        preset: which.
        given: a source or file; "" for the published one, from the user's cache.
        fetch: download that if need be; else its address stands for it.

    Raises:
        UserError: another file than the preset's, none for a preset without a published one, or one that cannot be
            downloaded.
    """
    if not preset.address:
        if not given:
            raise UserError(
                f"{name} needs --reference: {preset.reference}",
                'give --reference "coco:captions_val2014.json?images=val2014"',
            )
        return given
    if not given and not fetch:
        return preset.address
    hint = f"leave --reference out, or give the file of {preset.address}"
    path = Path(given).expanduser() if given else _published(preset.address)
    if not is_statistics(path):
        raise UserError(f"{name} measures against {preset.reference}, and {path} holds no statistics", hint)
    _, height, width, _ = open_arrays(path).shape
    if (height, width) != (preset.size, preset.size):
        raise UserError(
            f"{path} is of images of {width} x {height}, {name} of {preset.size} x {preset.size}", hint
        )
    return str(path)


def _published(address: str) -> Path:
    target = cache_folder() / "references" / address.rpartition("/")[2]
    hint = f"fetch {address} elsewhere and pass it: --reference FILE"
    return fetch(address, target, hint, whole=zipfile.is_zipfile)
