"""Where the numbers of a run go: means kept on the device, a JSONL file, TensorBoard, and wandb if asked."""

import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hmar_cli.errors import UserError
from hmar_cli.files import atomic_file

Row = dict[str, Any]


class Means:
    """Means of metrics since they were last read, summed where the metrics are computed.

    Nothing waits for the device until `read`. Scalars and vectors (one number a scale) both work; a number of a
    vector is NaN where there is none, and None once it is read.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Count one more value of each metric."""
        for name, value in metrics.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def reduced(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The sums, averaged over processes by one call of `reduce` on a flat vector."""
        if not self.sums:
            return {}
        flat = reduce(torch.cat([value.flatten() for value in self.sums.values()]))
        parts = torch.split(flat, [value.numel() for value in self.sums.values()])
        return {
            name: part.view_as(value) for part, (name, value) in zip(parts, self.sums.items(), strict=True)
        }

    def read(self, reduce: Callable[[Tensor], Tensor]) -> dict[str, float | list[float | None]]:
        """The means as numbers; starts anew."""
        sums = {name: value.cpu() for name, value in self.reduced(reduce).items()}
        means = {name: (value.double() / self.counts[name]).tolist() for name, value in sums.items()}
        self.sums, self.counts = {}, {}
        return {
            name: [None if math.isnan(v) else v for v in mean] if isinstance(mean, list) else mean
            for name, mean in means.items()
        }

    def load(self, sums: Mapping[str, Tensor], counts: Mapping[str, int], device: torch.device) -> None:
        """Take back sums and counts, so that a resumed run reports the same means as one never stopped."""
        self.sums = {name: sums[name].to(device) for name in counts}
        self.counts = dict(counts)


class Log:
    """Writes the rows of one run; only the main process has one.

    Args:
        out: the run folder.
        step: steps done so far; rows of later ones, left by a run that was killed, are removed.
        wandb: also report to Weights & Biases.
        name: name of the run there.

    Raises:
        UserError: wandb was asked for and is not installed.
    """

    def __init__(self, out: Path, step: int, *, wandb: bool = False, name: str = "") -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        self.path = out / "metrics.jsonl"
        truncate_rows(self.path, step)
        board = str(out / "tensorboard")
        self.board = SummaryWriter(board, purge_step=step + 1) if step else SummaryWriter(board)
        self.wandb = start_wandb(out, name) if wandb else None

    def write(self, row: Row) -> None:
        """Write one row: numbers by name, lists for one number (or None) a scale; "step" says when."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        flat = flatten(row)
        for name, value in flat.items():
            self.board.add_scalar(name, value, row["step"])
        if self.wandb is not None:
            self.wandb.log(flat, step=row["step"])

    def picture(self, step: int, pixels: Any) -> None:
        """Show a grid, uint8 (H, W, 3), in TensorBoard."""
        self.board.add_image("samples", pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Finish all files."""
        self.board.close()
        if self.wandb is not None:
            self.wandb.finish()


def flatten(row: Row) -> dict[str, float]:
    """Numbers by name, with "loss_per_scale/03" for the third number of a list."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat.update({f"{name}/{i:02d}": float(v) for i, v in enumerate(value, 1) if v is not None})
        elif name != "step":
            flat[name] = float(value)
    return flat


def read_rows(path: Path) -> list[Row]:
    """Rows of a metrics file; a last line that was cut off is left out.

    Raises:
        UserError: the file holds something else.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    try:
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except ValueError as error:
        raise UserError(f"{path} is broken: {error}", "expected one JSON object a line") from error


def truncate_rows(path: Path, step: int) -> None:
    """Keep the rows of the first `step` steps."""
    if path.exists():
        kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
        with atomic_file(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def require_wandb() -> None:
    """See that wandb is there, before a run folder is made.

    Raises:
        UserError: it is not installed.
    """
    if importlib.util.find_spec("wandb") is None:
        raise UserError("--wandb: wandb is not installed", 'pip install "hmar-cli[wandb]"')


def start_wandb(out: Path, name: str) -> Any:
    """Start a run of Weights & Biases that goes on if the same folder is resumed."""
    require_wandb()
    import wandb

    identity = "".join(c if c.isalnum() else "-" for c in str(out.resolve()))[-64:]
    return wandb.init(project="hmar", name=name, dir=str(out), id=identity, resume="allow")
