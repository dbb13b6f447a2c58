"""The real `hmar`, but it kills itself with SIGKILL at one moment: `killed.py step:13 train --recipe …`.

Moments: `step:N` in the middle of the step after N, `write:N` while the checkpoint of step N is half-written,
`delete:N` while the checkpoint of step N is half-deleted, `interrupt:N` is a Ctrl-C in that step instead.
"""

import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from hmar_cli.checkpoints import store
from hmar_cli.training.trainer import Trainer

moment, number = sys.argv[1].split(":")
sys.argv = ["hmar", *sys.argv[2:]]
step = int(number)


def die(sign: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), sign)


def at_step(self: Trainer, stream: Any) -> None:
    if self.step == step:
        die(signal.SIGINT if moment == "interrupt" else signal.SIGKILL)
    train_step(self, stream)


def at_write(folder: Path) -> None:
    if folder.name.startswith(f".step-{step:08d}"):
        (folder / "model.safetensors").write_bytes(b"half")
        die()
    flush(folder)


def at_delete(folder: Any, *args: Any, **kwargs: Any) -> None:
    if Path(folder).name == f".step-{step:08d}.old":
        (Path(folder) / "recipe.toml").unlink()
        die()
    rmtree(folder, *args, **kwargs)


train_step, flush, rmtree = Trainer.train_step, store._flush, shutil.rmtree
if moment in ("step", "interrupt"):
    Trainer.train_step = at_step  # type: ignore[method-assign]
elif moment == "write":
    store._flush = at_write
elif moment == "delete":
    shutil.rmtree = at_delete  # type: ignore[assignment]

from hmar_cli.app import main  # noqa: E402

main()
