"""Readers of the published formats of MAR, Hi-MAR and their KL-16 tokenizer.

As in `published`, a reader renames a state dict to this project's names and accounts for every key.

Letters: P phases (1 in MAR, 2 in Hi-MAR), S pivots, N dense tokens, L = S + N, D width, w width of a head, C latent
channels.
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from hmar_cli.checkpoints.published import Imported, convolution_settings, require_known, require_present
from hmar_cli.errors import UserError
from hmar_cli.settings import Kl

KL16_SCALE = 0.2325
"""What the published models multiply KL-16's latents by; it is no part of the file."""

_KL = re.compile(r"(encoder|decoder|quant_conv|post_quant_conv)\..+")
_KL_ATTENTION = re.compile(r"((?:encoder|decoder)\..*attn[\w.]*)\.([qkv])\.(weight|bias)")


_SIDES = (
    (re.compile(r"(encoder|decoder)_pos_embed_learned"), r"\1.pos_embed"),
    (re.compile(r"(encoder|decoder)_norm\.(weight|bias)"), r"\1.norm.\2"),
    (re.compile(r"(encoder|decoder)_task_emb\.weight"), r"\1.scale_vector.embed.weight"),
    (re.compile(r"(encoder|decoder)_blocks_ada\.1\.(weight|bias)"), r"\1.scale_vector.linear.\2"),
    (re.compile(r"(encoder|decoder)_blocks\.(\d+)\.(norm[12]\.(?:weight|bias))"), r"\1.blocks.\2.\3"),
    (
        re.compile(r"(encoder|decoder)_blocks\.(\d+)\.attn\.((?:qkv|proj)\.(?:weight|bias))"),
        r"\1.blocks.\2.attention.\3",
    ),
    (
        re.compile(r"(encoder|decoder)_blocks\.(\d+)\.mlp\.(fc[12]\.(?:weight|bias))"),
        r"\1.blocks.\2.feed_forward.\3",
    ),
    (
        re.compile(r"(encoder|decoder)_blocks\.(\d+)\.adaLN_(scale|shift)"),
        r"\1.blocks.\2.modulation.\3",
    ),
)
_WHOLE = {
    "fake_latent": "null_embed",
    "class_emb.weight": "class_embed.weight",
    "mask_token": "mask_token",
    "cond_tokens": "empty_pivots",
    "diffusion_pos_embed_learned": "head_pos_embed",
}
_LAYERS = {
    "z_proj": "token_proj",
    "z_proj_ln": "token_norm",
    "cond_proj": "pivot_proj",
    "cond_z_proj": "conditional_proj",
    "decoder_embed": "decoder_embed",
}
_HEAD = {
    # both heads
    "final_layer.linear": "output",
    "final_layer.adaLN_modulation.1": "modulation",
    # the MLP
    "time_embed.mlp.0": "time_embed.fc1",
    "time_embed.mlp.2": "time_embed.fc2",
    "cond_embed": "condition",
    "input_proj": "input",
    # the transformer
    "t_embedder.mlp.0": "time_embed.fc1",
    "t_embedder.mlp.2": "time_embed.fc2",
    "c_embedder.proj": "condition",
    "x_embedder.proj": "input",
}
_HEAD_BLOCK = {
    "in_ln": "norm",
    "mlp.0": "fc1",
    "mlp.2": "fc2",
    "adaLN_modulation.1": "modulation",
    "attn.qkv": "attention.qkv",
    "attn.proj": "attention.proj",
    "mlp.fc1": "feed_forward.fc1",
    "mlp.fc2": "feed_forward.fc2",
}
_DERIVED = re.compile(r"(cond_)?diffloss\.net\.(c_)?pos_embed")
"""The transformer head's fixed sine table, and one that no output depends on."""


def read_masked(state: Mapping[str, Tensor]) -> Imported:
    """Rename a published MAR or Hi-MAR; which of them it is, the pivots' tensors tell.

    Raises:
        UserError: keys that the format doesn't have, or not such a file.
    """
    imported = Imported("himar" if "cond_tokens" in state else "mar", {})
    phases = 2 if imported.format == "himar" else 1
    unknown = []
    for key, value in state.items():
        if _DERIVED.fullmatch(key):
            imported.derived.append(key)
        elif (target := masked_key(key, phases)) is not None:
            imported.state[target] = _reshaped(target, value.float(), phases)
        else:
            unknown.append(key)
    require_known(unknown, len(state), imported.format)
    require_present(imported, ("class_embed.weight", "encoder.pos_embed", "token_proj.weight"))
    return imported


def masked_key(key: str, phases: int) -> str | None:
    """This project's name of a published key of MAR (`phases` 1) or Hi-MAR (2); None if there is none."""
    if key in _WHOLE:
        return _WHOLE[key]
    for pattern, target in _SIDES:
        if pattern.fullmatch(key):
            return pattern.sub(target, key)
    if match := re.fullmatch(r"(cond_)?diffloss\.net\.(.+)", key):
        head = "pivot_head" if phases == 2 and not match[1] else "dense_head"
        inner = _head_key(match[2])
        return f"{head}.{inner}" if inner else None
    layer, _, leaf = key.rpartition(".")
    return f"{_LAYERS[layer]}.{leaf}" if layer in _LAYERS and leaf in ("weight", "bias") else None


def _head_key(key: str) -> str | None:
    """This project's name of a key inside a diffusion head."""
    layer, _, leaf = key.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    match = re.fullmatch(r"(?:res_)?blocks\.(\d+)\.(.+)", layer)
    if match is None:
        return f"{_HEAD[layer]}.{leaf}" if layer in _HEAD else None
    return f"blocks.{match[1]}.{_HEAD_BLOCK[match[2]]}.{leaf}" if match[2] in _HEAD_BLOCK else None


def _reshaped(target: str, value: Tensor, phases: int) -> Tensor:
    """A published tensor in this project's shape: without singleton axes, phases apart from positions."""
    if target in ("encoder.pos_embed", "decoder.pos_embed", "mask_token"):
        return value.reshape(phases, -1, value.shape[-1])  # [P, places, D]
    if target in ("head_pos_embed", "empty_pivots"):
        return value.flatten(0, 1)  # [L, D] or [S, C]
    if target == "null_embed":
        return value.flatten()  # [D]
    if re.search(r"\.modulation\.(scale|shift)$", target):
        return value.flatten(1)  # [P, 4 D]
    if re.fullmatch(r"\w+_head\.(input|condition)\.weight", target):
        return value.flatten(1)  # a 1x1 convolution [w, C, 1, 1] is a linear layer [w, C]
    return value


def require_alike(weights: Mapping[str, Imported]) -> None:
    """Refuse averaged weights that are not of the same tensors as the raw ones.

    Raises:
        UserError: one of the two lacks a tensor, or has another shape of it.
    """
    shapes = [{k: v.shape for k, v in each.state.items()} for each in weights.values()]
    differing = sorted({k for each in shapes for k in each if any(each[k] != o.get(k) for o in shapes)})
    if differing:
        raise UserError(
            f"the averaged weights do not fit the raw ones: {len(differing)} tensors differ",
            "download the file again",
            differing[:8],
        )


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
    require_present(imported, ("encoder.conv_in.weight", "encoder.down.0.block.0.conv2.weight"))
    require_present(imported, ("quant_conv.weight", "post_quant_conv.weight"))
    return imported


def kl_settings(imported: Imported) -> Kl:
    """Read the settings of a KL autoencoder off its shapes; one of KL-16's stride and channels gets its scale.

    Args:
        imported: of format "kl".
    """
    state, convolutions = imported.state, convolution_settings(imported.state)
    last = len(convolutions["multipliers"]) - 1
    settings = Kl(
        **convolutions,
        z_channels=state["post_quant_conv.weight"].shape[0],
        attention=f"encoder.down.{last}.attn.0.qkv.weight" in state,
    )
    same = (settings.stride, settings.z_channels) == (Kl().stride, Kl().z_channels)
    return replace(settings, latent_scale=KL16_SCALE) if same else settings
