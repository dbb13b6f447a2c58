"""How papers measure: extractor, metrics, number of images, size, crop and reference, each under one name."""

from dataclasses import dataclass

from hmar_cli.data.transforms import Crop

ADM_BATCHES = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"


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
        address: where the file of the reference is published; empty where the user brings it.
        reference_count: images that the reference has; 0 where its file does not tell.
        spread: whether classes come equally often, so that the number of images is a multiple of theirs.
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
        about="ImageNet 256 x 256 as ADM and after it VAR, MAR, HMAR and Hi-MAR: 50 images a class",
        metrics=("fid", "sfid", "is", "precision", "recall"),
        count=50_000,
        size=256,
        reference="VIRTUAL_imagenet256_labeled.npz of ADM",
        address=f"{ADM_BATCHES}/256/VIRTUAL_imagenet256_labeled.npz",
    ),
    "adm-imagenet-512": Preset(
        about="ImageNet 512 x 512 as ADM and after it VAR and HMAR: 50 images a class",
        metrics=("fid", "sfid", "is", "precision", "recall"),
        count=50_000,
        size=512,
        reference="VIRTUAL_imagenet512.npz of ADM",
        address=f"{ADM_BATCHES}/512/VIRTUAL_imagenet512.npz",
    ),
    "coco-30k": Preset(
        about="MS-COCO 256 x 256 as U-ViT and Hi-MAR (section 4.1): 30,000 prompts of the validation set",
        metrics=("fid",),
        count=30_000,
        size=256,
        reference="all images of COCO's validation set of 2014",
    ),
}
