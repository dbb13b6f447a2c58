"""Two processes that train without end, until process 1 has done two steps: `told_to_end.py OUT HOW`.

HOW: "launcher", the launcher gets a SIGTERM then; "process", process 1 does; "failure", process 1 dies.
Written to OUT: a run, rank-N.json with the step and the signal at which process N ended, and how many seconds the
launcher gave the processes when it ended them.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import toys
from torch.distributed.elastic.multiprocessing.api import SubprocessContext

from hmar_cli.launch import _launch, end
from hmar_cli.training.trainer import fit

out, how = Path(sys.argv[1]), sys.argv[2]


def train(rank: int) -> None:
    objective, recipe = toys.Toy(), toys.recipe(steps=10**6, log_every=10**6, save_every=10**6)

    def on_step(step: int) -> None:
        toys.Toy.on_step(objective, step)
        if (rank, step) == (1, 2):
            if how == "failure":
                os._exit(3)
            os.kill(os.getppid() if how == "launcher" else os.getpid(), signal.SIGTERM)

    objective.on_step = on_step  # type: ignore[method-assign]
    outcome = fit(
        objective,
        toys.batches,
        recipe=recipe,
        images=toys.IMAGES,
        out=out,
        save=toys.saver(recipe),
        device="cpu",
    )
    (out / f"rank-{rank}.json").write_text(json.dumps([outcome.step, outcome.interrupted]))


def launch() -> int:
    close = SubprocessContext._close

    def watched(self: SubprocessContext, death_sig: signal.Signals, timeout: int = 30) -> None:
        if not (out / "seconds").exists():
            (out / "seconds").write_text(str(timeout))
        close(self, death_sig, timeout)

    patched: Any = SubprocessContext
    patched._close = watched
    return _launch(2, True, [__file__, str(out), how])


if "RANK" in os.environ:
    train(int(os.environ["RANK"]))
else:
    end(launch())
