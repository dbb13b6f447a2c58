"""Readers of the published formats of MAR, Hi-MAR and their KL-16 tokenizer.

As in `published`, a reader renames a state dict to this project's names and accounts for every key.

Letters: P phases (1 in MAR, 2 in Hi-MAR), S pivots, N dense tokens, L = S + N, D width, w width of a head, C latent
channels.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from hmar_cli.checkpoints.published import Imported, require_present
from hmar_cli.errors import UserError
from hmar_cli.settings import Kl

KL16_SCALE = 0.2325
"""What the published models multiply KL-16's latents by; it is no part of the file."""

_KL = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\..+")
_KL_ATTENTION = re.compile(r"((?:encoder|decoder)\..*attn[\w.]*)\.([qkv])\.(weight|bias)")


def read_kl(state: Mapping[str, Tensor]) -> Imported:
    """Rename a published KL autoencoder; its attention's query, key and value are joined into one convolution.

    Whatever is no part of encoder and decoder, such as the discriminator of its training, is left out.

    Raises:
        UserError: not such a file, or attention with a part missing.
    """
    imported = Imported("kl", {})
    apart: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        if match := _KL_ATTENTION.fullmatch(key):
            apart.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = value.float()
        elif _KL.fullmatch(key):
            imported.state[key] = value.float()
        else:
            imported.unused.append(key)
    for target, parts in apart.items():
        if len(parts) < 3:
            raise UserError(
                f"this is no whole kl file: {target} needs q, k and v, found {', '.join(sorted(parts))}",
                "download the file again",
            )
        imported.state[target] = torch.cat([parts[name] for name in "qkv"])  # [3D] or [3D, D, 1, 1]
    require_present(imported, ("encoder.conv_in.weight", "quant_conv.weight", "post_quant_conv.weight"))
    return imported


def kl_settings(imported: Imported) -> Kl:
    """Read the settings of a KL autoencoder off its shapes.

    Args:
        imported: of format "kl".
    """
    state = imported.state
    levels = 1 + max(int(k.split(".")[2]) for k in state if k.startswith("encoder.down."))
    channels = state["encoder.conv_in.weight"].shape[0]
    widths = [state[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    return Kl(
        channels=channels,
        multipliers=tuple(width // channels for width in widths),
        res_blocks=1 + max(int(k.split(".")[4]) for k in state if k.startswith("encoder.down.0.block.")),
        z_channels=state["post_quant_conv.weight"].shape[0],
        attention=f"encoder.down.{levels - 1}.attn.0.qkv.weight" in state,
        latent_scale=KL16_SCALE,
    )
