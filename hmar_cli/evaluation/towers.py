"""Image towers of open_clip as extractors: from uint8 images of any size to an embedding.

Images are scaled and normalised as open_clip's own preprocessing does, on the device.

Letters: B images of a batch, H W their rows and columns, R the tower's resolution, F features.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hmar_cli.errors import UserError
from hmar_cli.models.text import FILE_SUFFIXES
from hmar_cli.tokenizers.blocks import hash_weights


class ImageTower(nn.Module):
    """The image side of a CLIP model (Radford et al. 2021) of open_clip.

    Args:
        network: open_clip's image tower.
        size: (R, R), rows and columns that it takes.
        mean: of the three colours, in [0, 1].
        std: likewise.

    Attributes:
        fingerprint: SHA-256 of the weights.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, network: nn.Module, size: tuple[int, int], mean: tuple[float, ...], std: tuple[float, ...]
    ) -> None:
        super().__init__()
        self.network, self.size = network, size
        self.fingerprint = hash_weights(network.state_dict(), b"open_clip image tower")
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def describe(self) -> dict[str, Any]:
        """The preprocessing, for the record."""
        return {"resize": f"{self.size[1]} x {self.size[0]}, bicubic with antialiasing, centre crop"}

    def forward(self, pixels: Tensor) -> Tensor:
        """Embeddings [B, F], not normalised, of uint8 images [B, 3, H, W]."""
        (height, width), (rows, columns) = pixels.shape[2:], self.size
        scale = max(rows / height, columns / width)
        images = pixels.float()
        if scale != 1:
            target = (max(round(height * scale), rows), max(round(width * scale), columns))
            images = F.interpolate(images, target, mode="bicubic", antialias=True, align_corners=False)
            images = images.round().clamp(0, 255)  # as a picture of 8 bits a colour
        top, left = (images.shape[2] - rows) // 2, (images.shape[3] - columns) // 2
        images = images[:, :, top : top + rows, left : left + columns]  # B 3 H W -> B 3 R R
        found = self.network((images / 255 - self.mean) / self.std)  # B 3 R R -> B F
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


def open_image_tower(tower: str, tag: str, weights: Path | None, device: torch.device) -> ImageTower:
    """Load the image tower of a model of open_clip.

    Args:
        tower: its name, such as "ViT-B-32".
        tag: of its weights, such as "openai", which open_clip downloads.
        weights: a local file of the whole model instead.
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
    if weights is None and tag not in tags:
        raise UserError(
            f"extractor {spec}: " + (f"no weights {tag!r} of {tower}" if tag else "weights are not named"),
            f"open_clip knows {', '.join(tags)}; or pass a file: --extractor-weights FILE"
            if tags
            else "pass a file: --extractor-weights FILE",
        )
    if weights is not None and weights.suffix not in FILE_SUFFIXES:
        raise UserError(
            f"{weights}: unknown kind of file", f"expected one of {', '.join(sorted(FILE_SUFFIXES))}"
        )
    try:
        model = open_clip.create_model(tower, pretrained=str(weights) if weights else tag, weights_only=True)
    except Exception as error:  # open_clip raises whatever its readers and the hub do
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(
            f"extractor {spec}: the weights cannot be loaded: {line}",
            "fetch them where there is a network and pass the file: --extractor-weights FILE",
        ) from error
    about = open_clip.get_model_preprocess_cfg(model)
    side = about["size"]
    size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    made = ImageTower(model.visual, size, tuple(about["mean"]), tuple(about["std"]))
    return made.requires_grad_(False).to(device).eval()
