"""Recipes of tiny models, caches of a tiny run, and ways to run it: as a command, or in processes of its own."""

import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from typer.testing import CliRunner, Result

from hmar_cli.app import app
from hmar_cli.builders import build_tokenizer
from hmar_cli.checkpoints.store import save_checkpoint
from hmar_cli.data.cache import CacheSettings
from hmar_cli.data.sources import open_source
from hmar_cli.data.transforms import to_tensor
from hmar_cli.data.writer import CacheWriter
from hmar_cli.settings import MsvqObjective, Recipe

ROOT = Path(__file__).parents[1]
IMAGES = 30

MSVQ = """
[tokenizer]
channels = 32
multipliers = [1, 1]
res_blocks = 1
z_channels = 8
vocab_size = 32
scales = [1, 2, 4]
phi_count = 2
"""
"""A tokenizer of pictures of 8 px, a part of a recipe."""

RECIPE = f"""
name = "toy"
[data]
size = 8
mirror = true
{MSVQ}[model]
pattern = "diagonal"
depth = 2
width = 32
heads = 2
drop_path = 0.2
gamma_init = 0.1
[objective]
kind = "next-scale"
label_drop = 0.2
[optim]
base_lr = 0.1
schedule = "lin0"
weight_decay_end = 0.1
warmup = 0.2
[train]
batch_size = 8
accumulate = 2
steps = 20
ema = 0.9
log_every = 1
save_every = 10
sample_every = 10
keep = 2
[sample]
top_k = 8
"""

MASKED = """
extends = "./toy.toml"
name = "toy-masked"
[objective]
kind = "masked"
layers = 1
[train]
steps = 4
save_every = 4
sample_every = 4
[sample]
schedule = [[1], [1, 3], [16]]
"""

TOKENIZER = f"""
name = "toy-msvq"
[data]
source = "builtin:shapes?count=16"
size = 8
{MSVQ}[objective]
kind = "msvq"
perceptual = "none"
revive_after = 2
[optim]
base_lr = 0.01
[train]
batch_size = 8
accumulate = 2
steps = 4
ema = 0.9
log_every = 1
save_every = 2
sample_every = 4
"""

NEXT_SCALE = """
[data]
source = "builtin:shapes"
size = 16
[tokenizer]
kind = "msvq"
channels = 8
multipliers = [1, 2]
res_blocks = 1
z_channels = 8
vocab_size = 16
scales = [1, 2, 4, 8]
[model]
kind = "next-scale"
pattern = "PATTERN"
depth = 2
width = 64
heads = 2
num_classes = 8
[sample]
kind = "next-scale"
top_k = 16
top_p = 0.0
"""
HMAR_REST = """schedule = [[1], [1, 3], [16], [64]]
[objective]
kind = "masked"
layers = 1
"""
KL = """
[tokenizer]
kind = "kl"
channels = 8
multipliers = [1, 2]
res_blocks = 1
z_channels = 4
"""
"""Another, of pictures of 16 px; `latent_scale` may follow."""

MASKED_AR = """
[model]
kind = "masked-ar"
encoder_depth = 1
decoder_depth = 1
width = 16
heads = 2
buffer_size = 2
pivot_head_depth = 1
pivot_head_width = 16
dense_head_depth = 1
dense_head_width = 16
dense_head_heads = 2
"""
"""A Hi-MAR for it; more of [model] may follow, such as `NO_PIVOTS`, which makes it a MAR."""

NO_PIVOTS = """pivots = "none"
scale_vector = "none"
dense_head = "mlp"
"""
HIMAR_REST = """num_classes = 8
[data]
source = "builtin:scenes"
size = 16
pivot_size = 8
[objective]
kind = "masked-ar"
[sample]
kind = "masked-ar"
steps = 3
pivot_steps = 2
head_sampler = "dpm++"
head_steps = 3
pivot_head_steps = 3
"""
JOINT_TEXT = """
[text]
kind = "joint"
width = 16
depth = 1
heads = 2
context_length = 12
"""
VAR = NEXT_SCALE.replace("PATTERN", "causal")
HMAR = NEXT_SCALE.replace("PATTERN", "diagonal") + HMAR_REST
HIMAR = f"{KL}latent_scale = 0.5\n{MASKED_AR}{HIMAR_REST}"
MAR = f"{KL}latent_scale = 0.5\n{MASKED_AR}{NO_PIVOTS}{HIMAR_REST}"
FAMILIES = {"var": VAR, "hmar": HMAR, "mar": MAR, "himar": HIMAR, "text": HIMAR + JOINT_TEXT}
"""Whole recipes that draw pictures of 16 px, of eight classes or of what a text says."""


GOLDEN = {
    family: f"""
extends = "{family}-b"
[data]
{size}
[model]
encoder_depth = 2
decoder_depth = 2
width = 64
heads = 4
buffer_size = 4
pivot_head_depth = 2
pivot_head_width = 64
dense_head_depth = 2
dense_head_width = 64
dense_head_heads = 4
[sample]
steps = 4
pivot_steps = 16
"""
    for family, size in (("mar", "size = 64"), ("himar", "size = 128\npivot_size = 64"))
}
"""Recipes of the golden MAR and Hi-MAR."""


def make_cache(
    folder: Path, recipe: Recipe, seed: int, class_names: tuple[str, ...] = (), images: int = IMAGES
) -> Path:
    """A cache of drawn shapes, encoded by a random tokenizer."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer(recipe.tokenizer).eval()
    source = open_source(f"builtin:shapes?count={images}", size=recipe.data.size)
    settings = CacheSettings(
        source=source.name,
        length=images,
        class_names=class_names or source.class_names,
        tokenizer_hash=tokenizer.fingerprint(),
        scales=recipe.scales.sides(),
        vocab_size=recipe.tokenizer.vocab_size,
        size=(8, 8),
        crop="adm",
        mirror=True,
        shard_size=16,
    )

    def encode(pixels: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            return {"tokens": tokenizer.encode(to_tensor(pixels)).numpy().astype(np.uint16)}

    writer = CacheWriter(folder, source, settings, encode)
    writer.begin()
    writer.run()
    writer.finish()
    save_checkpoint(
        folder / "tokenizer",
        recipe=replace(recipe, name="toy-msvq", model=None, objective=MsvqObjective()),
        weights={"model": tokenizer.state_dict()},
        class_names=settings.class_names,
        step=0,
        tokenizer=None,
        tokenizer_hash=settings.tokenizer_hash,
    )
    return folder


def hmar(*arguments: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(app, [str(each) for each in arguments], prog_name="hmar")


def run_python(
    *arguments: str | Path, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, as a user would, on one thread."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / ".typing"), env.get("PYTHONPATH", "")])
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=env, cwd=ROOT)


JOIN = """
import sys
from torch import distributed
rank = int(sys.argv[1])
distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{sys.argv[2]}", rank=rank, world_size=2)
"""


def run_two(code: str, *arguments: str | Path, timeout: float = 200) -> list[list[str]]:
    """Run Python in two processes that are joined by Gloo; return the lines that each prints, Gloo's own too.

    Args:
        code: what follows `JOIN`: it knows `rank`, `distributed` and `sys`.
        arguments: its `sys.argv[3:]`.
        timeout: seconds.
    """
    code = f"{JOIN}{code}\ndistributed.destroy_process_group()\n"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), port, *map(str, arguments)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    try:
        lines = [worker.communicate(timeout=timeout)[0].splitlines() for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], lines
    return lines
