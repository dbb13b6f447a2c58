"""CLIP with both its towers (Radford et al. 2021): how well an image and a text belong together.

Letters: B images or captions, D width of the space that both are mapped into.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hmar_cli.models.text import (
    FILE_SUFFIXES,
    OPENAI_KEYS,
    download,
    read_state,
    tokenizer_of,
    tower_config,
)


class Clip(nn.Module):
    """A frozen model of open_clip; see `from_pretrained`.

    Args:
        network: open_clip's model.
        tower: its name, which decides how captions become ids.
        preprocessing: how images are made to fit, by open_clip's names; without any as OpenAI's models have it.

    Attributes:
        preprocess: from a picture of PIL to what the image tower takes, [3, R, R].
        preprocessing: how it does so, for the record.
    """

    def __init__(self, network: nn.Module, tower: str, preprocessing: Mapping[str, Any]) -> None:
        super().__init__()
        from open_clip.transform import PreprocessCfg, image_transform_v2

        chosen = PreprocessCfg(size=network.visual.image_size, **preprocessing)  # type: ignore[union-attr]
        self.network, self.preprocess = network, image_transform_v2(chosen, is_train=False)
        self.preprocessing = {name: getattr(chosen, name) for name in ("size", *PREPROCESSING)}
        self._tokenizer = tokenizer_of(tower)
        self.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, tower: str, tag: str, file: Path | None = None) -> "Clip":
        """Load a model.

        The tag says how images are made to fit and which form of GELU the model has; for a file without a tag these
        are open_clip's defaults for the tower, or OpenAI's where the file is theirs.

        Args:
            tower: a name of open_clip, such as "ViT-L-14".
            tag: of its weights, such as "openai"; open_clip downloads them unless there is a file.
            file: the weights of the whole model in open_clip's or OpenAI's names, as .safetensors or written by
                `torch.save`.

        Raises:
            ValueError: an unknown tower or tag (the choices are in the message), or a file that holds other weights
                or more than tensors.
            FileNotFoundError: no such file.
            ConnectionError: the weights of the tag cannot be downloaded.
        """
        import open_clip

        config = tower_config(tower)
        known = open_clip.list_pretrained_tags_by_model(tower)
        about: Mapping[str, Any] = open_clip.get_pretrained_cfg(tower, tag) if tag else {}
        if not about and (tag or file is None):
            raise ValueError(f"expected one of the weights of {tower}, {', '.join(known)}, got {tag!r}")
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"no such file: {file}")
        if file is not None and file.suffix not in FILE_SUFFIXES:
            raise ValueError(f"expected a file {', '.join(sorted(FILE_SUFFIXES))}, got {file}")
        state = read_state(file or download(about, f"{tower} {tag}"), skip="")
        quick = any(
            map(bool, (config.get("quick_gelu"), about.get("quick_gelu"), state.keys() & OPENAI_KEYS))
        )
        network = _build(config, quick)
        _load(network, state, str(file or f"{tower} {tag}"))
        return cls(network, tower, {name: about[name] for name in PREPROCESSING if name in about})

    @torch.inference_mode()
    def images(self, pictures: Tensor) -> Tensor:
        """Map preprocessed pictures [B, 3, R, R] to unit vectors [B, D]."""
        return self.network.encode_image(pictures, normalize=True)  # type: ignore[operator,no-any-return]

    @torch.inference_mode()
    def texts(self, captions: Sequence[str]) -> Tensor:
        """Map B captions to unit vectors [B, D]; what does not fit is cut off before the end token."""
        ids = self._tokenizer(list(captions)).to(self.device)  # [B, T]
        return self.network.encode_text(ids, normalize=True)  # type: ignore[operator,no-any-return]

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.network.parameters()).device


PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
"""What decides how a picture is made to fit, by open_clip's names."""


def _build(config: Mapping[str, Any], quick_gelu: bool) -> nn.Module:
    """The untrained model of a tower's configuration."""
    from open_clip import CLIP, CoCa, CustomTextCLIP

    kind = CoCa if "multimodal_cfg" in config else CustomTextCLIP if config.get("custom_text") else CLIP
    given = {key: value for key, value in config.items() if key != "custom_text"}
    if "timm_model_name" in given["vision_cfg"]:
        given["vision_cfg"] = {**given["vision_cfg"], "timm_model_pretrained": False}
    return kind(**{**given, "quick_gelu": quick_gelu})  # type: ignore[no-any-return]


def _load(network: nn.Module, state: Mapping[str, Tensor], origin: str) -> None:
    """Load the weights of a whole model; each of them must have its place and fit."""
    from open_clip.model import convert_to_custom_text_state_dict

    weights = {name: value for name, value in state.items() if name not in OPENAI_KEYS}
    if "positional_embedding" in weights and not hasattr(network, "positional_embedding"):
        weights = convert_to_custom_text_state_dict(weights)
    own = network.state_dict()
    for name in own.keys() & weights.keys():  # the temperature is a scalar, or a vector of one number
        if name.startswith("logit_") and own[name].numel() == weights[name].numel():
            weights[name] = weights[name].reshape(own[name].shape)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise ValueError(f"{origin}: {' '.join(lines[1:2] or lines)}") from error
