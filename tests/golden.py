"""Golden fixtures: a JSON file that describes a tiny random model, and a safetensors file of its tensors."""

import json
import os
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

FAMILIES = (
    "msvq",
    "var",
    "hmar-nsp",
    "hmar-mp",
    "hmar-full",
    "sampling-filter",
    "loss-weights",
    "klvae",
    "diffusion",
    "mar",
    "himar",
    "sincos",
    "schedules",
)
"""The families that the parity tests cover; fixtures of others are listed in the test summary."""


def folder() -> Path:
    """Where the fixtures lie: $HMAR_GOLDEN, or the copies of this repository."""
    return Path(os.environ.get("HMAR_GOLDEN") or Path(__file__).parent / "fixtures" / "golden")


@cache
def families() -> dict[Path, str]:
    """The family of every fixture in the folder, by path.

    Raises:
        FileNotFoundError: no fixture lies there.
    """
    found = {path: str(_read(path).get("family", "")) for path in sorted(folder().glob("*.json"))}
    if not found:
        raise FileNotFoundError(f"expected golden fixtures (*.json) in {folder()}")
    return found


def fixtures_of(*names: str) -> list[Path]:
    """Paths of the fixtures of some families, to parametrise a test with; pass `ids=fixture_id` along."""
    unknown = set(names) - set(FAMILIES)
    if unknown:
        raise ValueError(f"expected families among {FAMILIES}, got {sorted(unknown)}")
    return [path for path, family in families().items() if family in names]


def fixture_id(path: object) -> str | None:
    """The name of a fixture in test ids; other values keep pytest's own."""
    return path.stem if isinstance(path, Path) else None


def unbuilt() -> list[str]:
    """Fixtures whose family has no test yet, as "name (family)"."""
    return [
        f"{path.stem} ({family or 'no family'})"
        for path, family in families().items()
        if family not in FAMILIES
    ]


def load_fixture(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read a fixture.

    Returns:
        The description, and all tensors: those stored, and those that `generated_state` says how to rebuild.

    Raises:
        ValueError: a rebuilt tensor has another checksum than recorded, or was stored too.
    """
    description = _read(path)
    stored = path.with_suffix(".safetensors")
    tensors = load_file(stored) if stored.is_file() else {}
    for key, shape, seed, half_width, crc32 in description.get("generated_state", {}).get("entries", []):
        if key in tensors:
            raise ValueError(f"{path.name}: {key} is both stored and generated")
        tensors[key] = rebuild(shape, seed, half_width, crc32)
    return description, tensors


def rebuild(shape: list[int], seed: int, half_width: float, crc32: int) -> Tensor:
    """Rebuild a random tensor from numpy's frozen legacy stream.

    Raises:
        ValueError: the result has another checksum than `crc32`.
    """
    uniform = np.random.RandomState(seed).random_sample(int(np.prod(shape)))
    values = (half_width * (2 * uniform - 1)).astype("<f4")
    if zlib.crc32(values.tobytes()) != crc32:
        raise ValueError(
            f"a tensor rebuilt from seed {seed} has checksum {zlib.crc32(values.tobytes())}, not {crc32}"
        )
    return torch.from_numpy(values.astype(np.float32).reshape(shape))


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix such as "state.", without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def tolerance(description: dict[str, Any]) -> dict[str, float]:
    """Bounds for comparing floats: 1e-4, or less where the fixture says so."""
    said = description.get("tolerance", {})
    return {name: min(1e-4, float(said.get(name, 1e-4))) for name in ("atol", "rtol")}


def bound(description: dict[str, Any], name: str) -> float:
    """The largest `distance` that a fixture allows for a recorded tensor: 1e-5, or 20 times its noise floor."""
    said = description["tolerance"]
    return max(float(said["default"]), 20 * float(said["float32_noise_floor"].get(name, 0.0)))


def distance(actual: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest magnitude of the recorded tensor; infinite for other shapes."""
    if actual.shape != expected.shape:
        return float("inf")
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


def _read(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text(encoding="utf-8"))
    return value if isinstance(value, dict) else {}
