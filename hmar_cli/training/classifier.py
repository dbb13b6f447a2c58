"""Training a classifier, whose features measure generated images.

Letters: B batch, H W height and width of the image.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hmar_cli.models.classifier import ImageClassifier
from hmar_cli.training.objective import Objective
from hmar_cli.training.tokenizer import to_signed


class ClassifierTraining(Objective):
    """Cross-entropy of labels, on images that are shifted at random while training.

    Reported: `loss` and `accuracy`, both of the shifted images.

    Args:
        model: the classifier.
        label_smoothing: share of the target that is spread over all classes.
        shift: share of its side by which an image moves at most.
    """

    graphable = True

    def __init__(self, model: ImageClassifier, *, label_smoothing: float = 0.1, shift: float = 0.125) -> None:
        super().__init__()
        self.model, self.label_smoothing, self.shift = model, label_smoothing, shift
        self.networks = {"model": model}

    def forward(self, batch: dict[str, Tensor], progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss of a batch: "image" [B, 3, H, W], uint8 or in [-1, 1], and "label" [B] int64."""
        images, labels = to_signed(batch["image"]), batch["label"]
        if self.training:
            images = shifted(images, self.shift)
        logits = self.model(images).float()
        loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        right = logits.argmax(dim=1) == labels
        return loss, {"loss": loss.detach(), "accuracy": right.float().mean()}


def shifted(images: Tensor, share: float) -> Tensor:
    """Move each image by whole pixels, at random; what comes in at its borders is mirrored.

    Args:
        images: [B, 3, H, W].
        share: of H and W, by which an image moves at most; up to 0.5.

    Returns:
        [B, 3, H, W].
    """
    count, _, height, width = images.shape
    down, right = round(height * share), round(width * share)
    padded = F.pad(images, (right, right, down, down), mode="reflect").permute(0, 2, 3, 1)  # [B, H', W', 3]

    def window(most: int, length: int) -> Tensor:
        first = torch.randint(2 * most + 1, (count, 1), device=images.device)
        return first + torch.arange(length, device=images.device)  # [B, length]

    rows, columns = window(down, height)[:, :, None], window(right, width)[:, None, :]
    image = torch.arange(count, device=images.device)[:, None, None]
    return padded[image, rows, columns].permute(0, 3, 1, 2)  # B H W 3 -> B 3 H W
