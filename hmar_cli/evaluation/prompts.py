"""CLIP score: how well images show what their prompts say (Hessel et al. 2021).

Of an image and its prompt, the cosine of their vectors by CLIP. Two numbers are in use: the mean cosine, which
T2I-CompBench reports of ViT-B/32, and the mean of 100 max(cosine, 0), which others report, mostly of ViT-L/14. Both
depend on the model, whose name and hash belong to them.
"""

import contextlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from hmar_cli.console import console
from hmar_cli.data.images import Example, ImageSource
from hmar_cli.data.sharing import Share, gather, shared_batches
from hmar_cli.errors import UserError
from hmar_cli.models.clip import Clip
from hmar_cli.tokenizers.blocks import hash_weights


@dataclass(frozen=True)
class ClipJudge:
    """A model of CLIP that compares images with texts.

    Attributes:
        name: its spelling, such as "ViT-L-14/openai".
        clip: the model, on its device.
        file: its weights, where they came from a file.
        fingerprint: SHA-256 of the weights.
    """

    name: str
    clip: Clip
    file: str
    fingerprint: str

    def describe(self) -> dict[str, Any]:
        """The judge as JSON has it, with how images are made to fit."""
        return {"name": self.name, "fingerprint": self.fingerprint, **self.clip.preprocessing}


def open_judge(spec: str, weights: Path | None = None, device: str | torch.device = "cpu") -> ClipJudge:
    """Load a model of CLIP.

    Args:
        spec: TOWER/TAG by open_clip's names, such as "ViT-L-14/openai"; TOWER alone takes its weights from a file.
        weights: a local file, in place of the tag's download.
        device: where it is to compute.

    Raises:
        UserError: an unknown tower or tag, or weights that cannot be had or are of another model.
    """
    tower, _, tag = spec.partition("/")
    console.print(f"loading CLIP {spec}", highlight=False)
    try:
        clip = Clip.from_pretrained(tower, tag, weights)
    except ConnectionError as error:
        raise UserError(
            str(error), "fetch the file where there is a network, and give --clip-weights FILE"
        ) from error
    except FileNotFoundError as error:
        raise UserError(
            f"CLIP {spec}: {error}", "give the file of its weights: --clip-weights FILE"
        ) from error
    except ValueError as error:
        raise UserError(f"CLIP {spec}: {error}", "such as --clip ViT-L-14/openai") from error
    fingerprint = hash_weights(clip.network.state_dict(), b"clip")
    return ClipJudge(spec, clip.to(device), str(weights or ""), fingerprint)


@dataclass
class PromptScores:
    """What a judge says of the images of a source.

    Attributes:
        cosines: of each image and its prompt, by the image's place in the source.
        captions: the prompts, likewise.
        unreadable: images that could not be read, which count nowhere else.
        error: why the first of them could not.
        shown: the first images, small, with their prompts and cosines.
        seconds: that all took, with reading the images.
    """

    cosines: dict[int, float] = field(default_factory=dict)
    captions: dict[int, str] = field(default_factory=dict)
    unreadable: int = 0
    error: str = ""
    shown: list[tuple[Image.Image, str, float]] = field(default_factory=list)
    seconds: float = 0.0

    def gather(self) -> "PromptScores":
        """Join what all processes found, where there are several; what is shown stays that of each one."""
        found = gather(replace(self, shown=[]))
        joined = {index: part for part in found for index in part.cosines}
        return PromptScores(
            {index: joined[index].cosines[index] for index in sorted(joined)},
            {index: joined[index].captions[index] for index in sorted(joined)},
            sum(part.unreadable for part in found),
            next((part.error for part in found if part.error), ""),
            self.shown,
            max(part.seconds for part in found),
        )

    @property
    def prompts(self) -> list[str]:
        """One of each image, in the order of the source."""
        return [self.captions[index] for index in sorted(self.captions)]


def clip_score(cosines: Sequence[float]) -> float:
    """The mean of 100 max(cosine, 0).

    Raises:
        ValueError: no cosine.
    """
    return math.fsum(100 * max(cosine, 0.0) for cosine in cosines) / _some(cosines)


def mean_cosine(cosines: Sequence[float]) -> float:
    """The mean as it is.

    Raises:
        ValueError: no cosine.
    """
    return math.fsum(cosines) / _some(cosines)


def _some(cosines: Sequence[float]) -> int:
    if not cosines:
        raise ValueError("expected at least one cosine, got none")
    return len(cosines)


def score_images(
    judge: ClipJudge,
    source: ImageSource,
    *,
    count: int = 0,
    batch_size: int = 64,
    workers: int = 0,
    shown: int = 0,
    share: Share = (0, 1),
) -> PromptScores:
    """Compare images with their prompts, a batch at a time; a bar in the first process shows how far it is.

    Args:
        judge: the model.
        source: images with captions, of which the first one of each image counts.
        count: of the first images; 0 is all.
        batch_size: images at once.
        workers: threads that decode; 0 for one a processor, up to 16.
        shown: of the first images that are kept.
        share: this process and how many there are; each takes its part of the batches.

    Raises:
        UserError: images without prompts, or none that can be read.
    """
    require_prompts(source)
    found = PromptScores()

    def look(example: Example) -> tuple[Example, Tensor | None]:
        return example, None if example.image is None else judge.clip.preprocess(example.image)

    batches = shared_batches(
        source,
        look,
        title="comparing with prompts",
        count=count,
        batch_size=batch_size,
        workers=workers,
        share=share,
    )
    start = time.perf_counter()
    with contextlib.closing(batches):
        for batch in batches:
            faults = [example.fault for example, pixels in batch if pixels is None]
            found.unreadable += len(faults)
            found.error = found.error or next(iter(faults), "")
            good = [(example, pixels) for example, pixels in batch if pixels is not None]
            if not good:
                continue
            _require_captions(source, [example for example, _ in good])
            pictures = torch.stack([pixels for _, pixels in good]).to(judge.clip.device)  # [B, 3, R, R]
            texts = judge.clip.texts([example.caption for example, _ in good])  # [B, D]
            cosines = (judge.clip.images(pictures) * texts).sum(dim=1).double().tolist()
            for (example, _), cosine in zip(good, cosines, strict=True):
                found.cosines[example.index], found.captions[example.index] = cosine, example.caption
                if len(found.shown) < shown and example.image is not None:
                    found.shown.append((example.image, example.caption, cosine))
    found.seconds = time.perf_counter() - start
    return found


def require_prompts(source: ImageSource) -> None:
    """See that the images of a source have prompts.

    Raises:
        UserError: they have none.
    """
    if not source.captioned:
        raise UserError(
            f"the images of {source.name} have no prompts",
            "give a folder that `hmar sample --prompt-file` wrote, or a source with captions",
        )


def _require_captions(source: ImageSource, examples: Sequence[Example]) -> None:
    for example in examples:
        if not example.caption:
            raise UserError(
                f"image {example.index} of {source.name} has no prompt", "leave it out of the source"
            )
