"""Inception as FID's authors and ADM used it: torch-fidelity's port of the TensorFlow graph of 2015, and its weights.

torch-fidelity's network takes uint8 images of any size, scales them to 299 px as TensorFlow 1 did, and gives the 2048
pooled features and the logits without bias that FID, KID, the Inception Score and ADM's precision and recall are
defined on. sFID's features (Nash et al. 2021; ADM's `mixed_6/conv`) are read from a layer inside.

Letters: B images of a batch, H W their rows and columns.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmar_cli.errors import UserError, first_line
from hmar_cli.files import fetch

PUBLISHED = "6726825d"
"""First digits of the SHA-256 of the published weights; their file's name carries them too."""

SPATIAL_CHANNELS = 7
"""Channels of `mixed_6/conv` that sFID takes: 17 x 17 x 7 numbers are about as many as pooled features."""


class Inception:
    """The network, and what it computes on the way.

    Args:
        path: a file of weights as torch-fidelity publishes it.
        device: where it is to compute.

    Raises:
        UserError: the file holds other weights, or more than tensors.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        _require_tensors(path)
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
            )
        except RuntimeError as error:
            raise UserError(f"{path} holds other weights: {first_line(error)}", _where_from()) from error
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)
        self._network, self._inside = network.to(device), torch.empty(0)

    def _keep(self, module: Any, arguments: Any, output: Tensor) -> None:
        self._inside = output[:, :SPATIAL_CHANNELS]  # B 192 17 17 -> B 7 17 17

    def __call__(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pooled features [B, 2048], spatial ones [B, 2023] and logits [B, 1008] of uint8 images [B, 3, H, W]."""
        pooled, logits = self._network(pixels)
        spatial = self._inside.permute(0, 2, 3, 1).flatten(1)  # B 7 17 17 -> B 2023, in TensorFlow's order
        self._inside = torch.empty(0)
        return pooled, spatial, logits


def published_weights() -> Path:
    """The published weights, downloaded where they are not there yet, to where torch-fidelity looks for them.

    Raises:
        UserError: they cannot be downloaded; the message names the file and its address.
    """
    url = _address()
    target = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    return fetch(url, target, _where_from(), sha256=PUBLISHED)


def _address() -> str:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    return str(URL_INCEPTION_V3)


def _where_from() -> str:
    return f"fetch {_address()} elsewhere and pass it: --extractor-weights FILE"


def _require_tensors(path: Path) -> None:
    """See that a file holds tensors alone: torch-fidelity unpickles whatever it holds.

    Raises:
        UserError: it holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        raise UserError(f"cannot read {path} as weights: {first_line(error)}", _where_from()) from error
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise UserError(f"{path} holds no weights by their names", _where_from())
