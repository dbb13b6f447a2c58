"""How papers measure: extractor, metrics, number of images, size, crop and reference, each under one name."""

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

from hmar_cli.console import console
from hmar_cli.data.arrays import open_arrays
from hmar_cli.data.transforms import Crop
from hmar_cli.errors import UserError
from hmar_cli.evaluation.references import is_statistics
from hmar_cli.files import atomic_file, cache_folder

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
        given: a source or file; "" for the published one, from `published_file`.
        fetch: download that if need be; else its address stands for it.

    Raises:
        UserError: another file than the preset's, or none for a preset without a published one.
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
    path = Path(given).expanduser() if given else published_file(preset.address)
    if not is_statistics(path):
        raise UserError(f"{name} measures against {preset.reference}, and {path} holds no statistics", hint)
    _, height, width, _ = open_arrays(path).shape
    if (height, width) != (preset.size, preset.size):
        raise UserError(
            f"{path} is of images of {width} x {height}, {name} of {preset.size} x {preset.size}", hint
        )
    return str(path)


def published_file(address: str, folder: Path | None = None) -> Path:
    """Download a published file once, and keep it.

    Args:
        address: of the file.
        folder: where it is kept; None for the user's cache.

    Raises:
        UserError: nothing can be downloaded; the line says what to fetch, and how to pass it.
    """
    target = (folder or cache_folder() / "references") / address.rsplit("/", 1)[1]
    if target.is_file():
        return target
    console.print(f"downloading {address}", highlight=False)
    try:
        with atomic_file(target) as temporary:
            torch.hub.download_url_to_file(address, str(temporary), progress=sys.stderr.isatty())
            if not zipfile.is_zipfile(temporary):
                raise ValueError("what came is no whole .npz file")
    except (OSError, ValueError) as error:  # no network, no such address, or an incomplete file
        raise UserError(
            f"cannot download {address}: {error}", f"fetch it elsewhere and give --reference {target.name}"
        ) from error
    return target
