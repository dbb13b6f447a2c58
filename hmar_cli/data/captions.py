"""What a cache keeps of captions, and a model gets of prompts: token ids, or the embeddings of a frozen tower."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from hmar_cli.data.images import ImageSource
from hmar_cli.errors import UserError
from hmar_cli.settings import ClipText, JointText

if TYPE_CHECKING:
    import torch

BATCHES = {"cpu": 1, "cuda": 128}
"""Captions that a tower encodes at once: always as many, since rows round alike in batches of one size only."""


def read_prompts(path: Path) -> list[str]:
    """Read a text file with a prompt on every line; blank lines are passed over.

    Raises:
        UserError: a file that cannot be read, or holds none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        hint = "give a text file with a prompt on every line"
        raise UserError(f"cannot read {path}: {error}", hint) from error
    prompts = [prompt for line in lines if (prompt := line.strip())]
    if not prompts:
        raise UserError(f"{path} holds no prompt", "write one on every line")
    return prompts


def draw_captions(source: ImageSource, count: int, seed: int) -> list[str]:
    """Choose images of a source by chance, each at most once, and one of the captions of each.

    Args:
        source: images with captions.
        count: how many.
        seed: of both choices.

    Raises:
        UserError: fewer images with captions, or a stream.
    """
    rng, texts = np.random.default_rng([seed, count]), []
    for index in rng.permutation(len(source)).tolist():
        if captions := source.captions(index):
            texts.append(captions[int(rng.integers(len(captions)))])
        if len(texts) == count:
            return texts
    raise UserError(
        f"{source.name} has {len(texts)} images with captions, and {count} prompts were asked for",
        "give --prompt-file FILE, or a smaller --count",
    )


def describe(settings: ClipText | JointText) -> str:
    """Name what encodes captions, as caches record it: "ids:<tokens>" or "clip:<tower>:<weights>"."""
    if isinstance(settings, JointText):
        return f"ids:{settings.context_length}"
    return f"clip:{settings.tower}:{settings.weights}"


def caption_encoder(
    settings: ClipText | JointText, device: "torch.device | str"
) -> Callable[[Sequence[str]], npt.NDArray[Any]]:
    """Make the function that encodes captions for a recipe's `[text]`.

    Letters: n captions, T tokens of a caption, W width of the tower.

    Args:
        settings: the recipe's.
        device: where a frozen tower runs.

    Returns:
        From n captions to ids (n, T) uint16, or to embeddings (n, T, W) float16. What a caption becomes does not
        depend on those beside it.

    Raises:
        UserError: a tower, a tag or a file that is not there or not to be read.
    """
    if isinstance(settings, JointText):
        length = settings.context_length
        return lambda captions: _ids(captions, length)
    return _frozen_tower(settings, device)


def _ids(captions: Sequence[str], length: int) -> npt.NDArray[np.uint16]:
    from hmar_cli.models.text import tokenize

    return tokenize(captions, length).numpy().astype(np.uint16)


def _frozen_tower(
    settings: ClipText, device: "torch.device | str"
) -> Callable[[Sequence[str]], npt.NDArray[Any]]:
    import torch

    from hmar_cli.models.text import ClipTextEncoder

    try:
        tower = ClipTextEncoder.from_pretrained(settings.tower, settings.weights).to(device)
    except ConnectionError as error:
        hint = "download them elsewhere and set text.weights to the file, or use text.kind=joint"
        raise UserError(str(error), hint) from error
    except FileNotFoundError as error:
        raise UserError(str(error), "text.weights is a tag of open_clip, or a file of weights") from error
    except ValueError as error:
        raise UserError(f"[text]: {error}", "see text.tower and text.weights of the recipe") from error
    kind = torch.device(device).type
    size = BATCHES.get(kind, 1)

    def encode(captions: Sequence[str]) -> npt.NDArray[np.float16]:
        padded = [*captions, *[""] * (-len(captions) % size)]
        with torch.inference_mode(), torch.autocast(kind, enabled=False):  # alike for captions and prompts
            batches = (tower.tokenize(padded[i : i + size]) for i in range(0, len(padded), size))
            nothing = torch.empty(0, tower.context_length, tower.width, device=device)
            hidden = torch.cat([nothing, *(tower(ids.to(device)) for ids in batches)])  # n T W, and padding
        hidden = hidden[: len(captions)]
        half = hidden.half().cpu().numpy()
        if not np.isfinite(half).all():
            raise UserError(
                f"{describe(settings)} gave embeddings that are not finite in 16 bits",
                "its weights are broken",
            )
        return half

    return encode
