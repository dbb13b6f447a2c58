"""Image towers of open_clip as extractors: from uint8 images of any size to an embedding.

Images go through open_clip's own preprocessing, picture by picture, so that nothing differs from its users' numbers.

Letters: B images of a batch, H W their rows and columns, R the tower's resolution, F features.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from hmar_cli.errors import UserError
from hmar_cli.models.text import FILE_SUFFIXES
from hmar_cli.tokenizers.blocks import hash_weights

ELSEWHERE = "fetch them where there is a network and pass the file: --extractor-weights FILE"


class ImageTower:
    """The image side of a CLIP model (Radford et al. 2021) of open_clip.

    Args:
        network: open_clip's image tower.
        preprocess: from a picture to its input [3, R, R].
        device: where it computes.

    Attributes:
        fingerprint: SHA-256 of the weights.
    """

    def __init__(
        self, network: nn.Module, preprocess: Callable[[Image.Image], Tensor], device: torch.device
    ) -> None:
        self.fingerprint = hash_weights(network.state_dict(), b"open_clip image tower")
        self.network, self.preprocess, self.device = network.to(device), preprocess, device

    def __call__(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, F], not normalised, of uint8 images [B, 3, H, W]."""
        pictures = [Image.fromarray(each) for each in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        inputs = torch.stack([self.preprocess(each) for each in pictures])  # B 3 H W -> B 3 R R
        found = self.network(inputs.to(self.device))  # B 3 R R -> B F
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def open_image_tower(tower: str, tag: str, weights: Path | None, device: torch.device) -> ImageTower:
    """Load the image tower of a model of open_clip.

    Args:
        tower: its name, such as "ViT-B-32".
        tag: of its weights, such as "openai", which open_clip downloads.
        weights: a local file of the whole model instead; the tag, if there is one, still says how its images are
            prepared and which GELU it has.
        device: where it is to compute.

    Raises:
        UserError: an unknown tower or tag, or weights that are missing, cannot be downloaded, or do not fit.
    """
    import open_clip

    spec, tags = f"open_clip:{tower}" + f"/{tag}" * bool(tag), open_clip.list_pretrained_tags_by_model(tower)
    if tower not in open_clip.list_models():
        raise UserError(
            f"extractor {spec}: open_clip has no tower {tower!r}", "such as open_clip:ViT-B-32/openai"
        )
    if (tag or weights is None) and tag not in tags:
        known = (
            f"open_clip knows {', '.join(tags)}" if tags else "open_clip knows none: --extractor-weights FILE"
        )
        raise UserError(
            f"extractor {spec}: " + (f"no weights {tag!r}" if tag else "its weights are missing"), known
        )
    if weights is not None and weights.suffix not in FILE_SUFFIXES:
        raise UserError(
            f"{weights}: unknown kind of file", f"expected one of {', '.join(sorted(FILE_SUFFIXES))}"
        )
    config: dict[str, Any] = open_clip.get_pretrained_cfg(tower, tag) if tag else {}
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            tower,
            pretrained=str(weights) if weights else tag,
            weights_only=True,
            force_quick_gelu=bool(config.get("quick_gelu", False)),
            image_mean=config.get("mean"),
            image_std=config.get("std"),
            image_interpolation=config.get("interpolation"),
            image_resize_mode=config.get("resize_mode"),
        )
    except Exception as error:  # open_clip raises whatever its readers and the hub do
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"extractor {spec}: the weights cannot be loaded: {line}", ELSEWHERE) from error
    return ImageTower(model.visual.requires_grad_(False).eval(), preprocess, device)
