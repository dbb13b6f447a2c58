"""Networks that turn images into features: what every metric of generated images is a function of.

    inception                          torch-fidelity's Inception, with the published weights (or --extractor-weights)
    open_clip:ViT-B-32/openai          the image tower of any model of open_clip, with a tag of its weights
    torchscript:FILE                   a TorchScript file; `?return_features=true` and the like are given to it
    module:package.module:callable     what the callable returns
    runs/classifier-cifar10            a classifier that `hmar train` made

All take uint8 images and compute in float32, without TF32 or autocast, so that numbers of two machines compare.

Letters: B images of a batch, H W their rows and columns, F pooled features, S spatial features, C classes, R what a
tower of open_clip scales them to.
"""

import hashlib
import importlib
import inspect
import os
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from hmar_cli.data.spelling import split_options
from hmar_cli.data.transforms import height_width
from hmar_cli.errors import UserError, first_line
from hmar_cli.evaluation import inception
from hmar_cli.files import file_sha256
from hmar_cli.models.scales import Side
from hmar_cli.tokenizers.blocks import hash_weights
from hmar_cli.tokenizers.msvq import full_float32

SPELLINGS = (
    "inception, open_clip:TOWER/TAG, torchscript:FILE, module:package.module:callable, or a classifier"
)

CLIP_HINT = "such as open_clip:ViT-B-32/openai; where nothing can be downloaded: --extractor-weights FILE"


class Features(NamedTuple):
    """What an extractor says of B images.

    Attributes:
        pooled: [B, F], float32: one vector an image, for FID, KID, precision and recall.
        spatial: [B, S], float32: where things are, for sFID; None where the extractor has none.
        logits: [B, C], float32: of classes, for the Inception Score and accuracy; None where it has none.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """A network that turns images into features.

    Attributes:
        name: under which its numbers are printed, such as "classifier-cifar10".
        fingerprint: SHA-256 of its weights.
        look: uint8 images [B, 3, H, W] on the device to features.
        device: where it computes.
        class_names: what it calls its classes; empty where it has no names for them.
        size: to which images have to be scaled; None for any.
        standard: whether it is the Inception that papers use, with the published weights.
        about: what else the record says of it.
    """

    name: str
    fingerprint: str
    look: Callable[[Tensor], Features]
    device: torch.device
    class_names: tuple[str, ...] = ()
    size: Side | None = None
    standard: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Features:
        """Look at images.

        Args:
            pixels: [B, 3, H, W], uint8, on any device.

        Raises:
            ValueError: other images.
            UserError: the network gives something other than one finite vector an image.
        """
        if pixels.dtype != torch.uint8 or pixels.ndim != 4 or pixels.shape[1] != 3:
            raise ValueError(f"expected uint8 [B, 3, H, W], got {pixels.dtype} {list(pixels.shape)}")
        with full_float32(self.device):
            found = self.look(pixels.to(self.device))
        parts = [None if part is None else self._checked(part, len(pixels)) for part in found]
        assert parts[0] is not None
        return Features(parts[0], parts[1], parts[2])

    def _checked(self, part: Tensor, count: int) -> Tensor:
        if not torch.is_tensor(part) or part.ndim != 2 or len(part) != count:
            shape = list(part.shape) if torch.is_tensor(part) else type(part).__name__
            raise UserError(
                f"extractor {self.name} gave {shape} for {count} images",
                "an extractor gives features [B, F], or (features, logits), for uint8 images [B, 3, H, W]",
            )
        if not part.isfinite().all():
            raise UserError(f"extractor {self.name} gave numbers that are not finite", "check its weights")
        return part.float()

    def describe(self) -> dict[str, Any]:
        """The extractor as JSON has it."""
        size = None if self.size is None else list(height_width(self.size))
        return {"name": self.name, "fingerprint": self.fingerprint, "size": size, **self.about}


def open_extractor(spec: str, device: str | torch.device = "cpu", weights: Path | None = None) -> Extractor:
    """Open an extractor by its spelling (see the module's description).

    Args:
        spec: the spelling.
        device: where it is to compute.
        weights: a local file for Inception, or for an open_clip tower.

    Raises:
        UserError: an unknown spelling, or weights that are missing, broken or of another network.
    """
    place, (kind, colon, rest) = torch.device(device), spec.partition(":")
    if weights is not None and kind not in ("inception", "open_clip"):
        raise UserError(
            f"extractor {spec} has weights of its own", "--extractor-weights is for inception and open_clip"
        )
    if weights is not None and not weights.is_file():
        raise UserError(f"no file {weights}", "give the file of the extractor's weights")
    if spec == "inception":
        return _open_inception(place, weights)
    if colon and kind in ("open_clip", "torchscript", "module"):
        if not rest:
            raise UserError(f"extractor {spec}: nothing after the colon", f"expected {SPELLINGS}")
        if kind == "open_clip":
            return _open_clip(rest, place, weights)
        return _open_torchscript(rest, place) if kind == "torchscript" else _open_module(rest, place)
    if not Path(spec).exists():
        raise UserError(f"no extractor {spec!r}", f"expected {SPELLINGS}")
    return _open_classifier(spec, place)


def _open_inception(device: torch.device, weights: Path | None) -> Extractor:
    """Inception with weights of a file, or with the published ones."""
    path = weights or inception.published_weights()
    network, digest = inception.Inception(path, device), file_sha256(path)
    standard = digest.startswith(inception.PUBLISHED)
    return Extractor(
        name="inception" if standard else f"inception:{path.name}",
        fingerprint=digest,
        look=lambda pixels: Features(*network(pixels)),
        device=device,
        standard=standard,
        about={"file": path.name, "features": 2048, "resize": "299 px, bilinear as TensorFlow 1"},
    )


def _open_classifier(path: str, device: torch.device) -> Extractor:
    """A classifier that `hmar train` made."""
    from hmar_cli.builders import load_classifier

    network, checkpoint = load_classifier(path)
    network = network.to(device)

    def look(pixels: Tensor) -> Features:
        features = network.features(pixels.float().div(127.5).sub(1.0))  # B 3 H W -> B F
        return Features(features, logits=network.head(features))

    return Extractor(
        name=checkpoint.recipe.name,
        fingerprint=checkpoint.tokenizer_hash,
        look=look,
        device=device,
        class_names=checkpoint.class_names,
        size=checkpoint.recipe.data.size,
        about={
            "checkpoint": str(checkpoint.folder),
            "recipe": checkpoint.recipe.name,
            "weights": "ema" if "ema" in checkpoint.weights else "model",
            "features": network.width,
        },
    )


def _open_torchscript(text: str, device: torch.device) -> Extractor:
    """A TorchScript file."""
    location, options = split_options(text)
    path = Path(location).expanduser()
    if not path.is_file():
        raise UserError(f"no file {path}", "torchscript:FILE takes a file that torch.jit.save wrote")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PyTorch means to leave TorchScript behind
            network = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, EOFError) as error:
        raise UserError(
            f"cannot read {path} as TorchScript: {first_line(error)}", "torch.jit.save writes one"
        ) from error
    given = {key: _value(value) for key, value in options.items()}
    return Extractor(
        name=f"torchscript:{path.name}" + "".join(f"?{key}={value}" for key, value in options.items()),
        fingerprint=file_sha256(path),
        look=_foreign(f"torchscript:{path.name}", lambda pixels: network(pixels, **given)),
        device=device,
        about={"file": str(path), "options": given},
    )


def _value(text: str) -> bool | int | str:
    """An option as a TorchScript function takes it."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    return int(text) if text.isdecimal() else text


def _open_module(text: str, device: torch.device) -> Extractor:
    """What a callable of an importable module returns: a network, or any function of images."""
    name, colon, attribute = text.partition(":")
    if not colon:
        raise UserError(f"extractor module:{text}", "expected module:package.module:callable")
    try:
        make = getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"extractor module:{text}: {error}", "is its folder on PYTHONPATH?") from error
    look = make() if callable(make) else None
    if not callable(look):
        raise UserError(
            f"extractor module:{text}: not a function that returns a network", f"expected {SPELLINGS}"
        )
    source = inspect.getsourcefile(inspect.unwrap(make))
    digest = hashlib.sha256(Path(source).read_bytes() if source else b"")
    if isinstance(look, nn.Module):
        look = look.to(device).eval()
        digest.update(hash_weights(look.state_dict(), b"").encode())
    return Extractor(
        name=f"module:{text}",
        fingerprint=digest.hexdigest(),
        look=_foreign(f"module:{text}", look),
        device=device,
        about={"file": source},
    )


def _foreign(name: str, network: Callable[[Tensor], Any]) -> Callable[[Tensor], Features]:
    """A network of someone else's; what it complains about is the user's business, a full GPU is not."""

    def look(pixels: Tensor) -> Features:
        try:
            return _features(network(pixels))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            rows, columns = pixels.shape[2:]
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"extractor {name} cannot look at images of {columns} x {rows}: {lines[-1]}",
                "it is given uint8 images [B, 3, H, W]; --size cuts them to what it takes",
            ) from error

    return look


def _features(found: Any) -> Features:
    """What a network of someone else's gives: features, (features, logits), or `Features`."""
    if isinstance(found, Features):
        return found
    if isinstance(found, tuple | list) and len(found) in (1, 2):
        return Features(found[0], logits=found[1] if len(found) == 2 else None)
    return Features(found)


def _open_clip(text: str, device: torch.device, weights: Path | None) -> Extractor:
    """An image tower of open_clip (CLIP, Radford et al. 2021), with open_clip's own preprocessing."""
    from hmar_cli.models.clip import Clip

    tower, _, tag = text.partition("/")
    try:
        model = Clip.from_pretrained(tower, tag, weights)
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        raise UserError(f"extractor open_clip:{text}: {error}", CLIP_HINT) from error
    network: Any = model.network.visual
    network.to(device)
    pool = ThreadPoolExecutor(min(16, os.cpu_count() or 1))

    def look(pixels: Tensor) -> Features:
        pictures = [Image.fromarray(each) for each in pixels.permute(0, 2, 3, 1).cpu().numpy()]
        inputs = torch.stack([*pool.map(model.preprocess, pictures)]).to(device)  # B 3 H W -> B 3 R R
        found = network(inputs)  # B 3 R R -> B F, or with the features of all places
        return Features(found[0] if isinstance(found, tuple) else found)

    chosen = [part for part in (tag, weights.name if weights else "") if part]
    return Extractor(
        name="/".join([f"open_clip:{tower}", *chosen]),
        fingerprint=hash_weights(network.state_dict(), b"open_clip image tower"),
        look=look,
        device=device,
        about={"weights": str(weights) if weights else tag, "preprocessing": model.preprocessing},
    )
