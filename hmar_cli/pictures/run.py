"""Edits of files: results beside each other in a folder, a record of what made them, going on where a run stopped."""

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hmar_cli.console import console, progress, warn
from hmar_cli.errors import UserError
from hmar_cli.files import file_sha256, read_json, write_json
from hmar_cli.pictures.editing import (
    Plan,
    edit_picture,
    preview,
    reconstruction,
    sheet,
    window_views,
)
from hmar_cli.pictures.painter import ModelPainter
from hmar_cli.pictures.picture import read_picture
from hmar_cli.pictures.request import Request, plan_for
from hmar_cli.report import save_png

SHOWN = 21
"""Most variations on a sheet."""

BLURRED = 2.0
"""Above this enlargement of what a model draws there is a warning."""


@dataclass(frozen=True)
class Run:
    """A request that is carried out on pictures, with a model."""

    request: Request
    painter: ModelPainter
    about: dict[str, Any]
    out: Path
    variations: int
    together: int

    def edit(self, files: dict[str, Path]) -> list[dict[str, Any]]:
        """Edit every picture; of a folder those that cannot be edited are told at the end.

        Raises:
            UserError: pictures that could not be edited.
        """
        return self._each(files, self._edit_one)

    def look(self, files: dict[str, Path]) -> list[dict[str, Any]]:
        """Show what the model would see of every picture."""
        return self._each(files, self._look_at_one)

    def _each(self, files: dict[str, Path], do: Any) -> list[dict[str, Any]]:
        report, failed = [], []
        for name, path in files.items():
            try:
                report.append(do(name, path))
            except UserError as error:  # noqa: PERF203
                if len(files) == 1:
                    raise
                failed.append(f"{path.name}: {error}")
        if failed:
            raise UserError(
                f"{len(failed)} of {len(files)} pictures could not be edited; the others are in {self.out}",
                "mend or move them, then run the same command again",
                failed,
            )
        return report

    def _edit_one(self, name: str, path: Path) -> dict[str, Any]:
        plan = self._plan(path)
        self._claim(name, path, plan)
        targets = [self.out / f"{name}-{i:03d}.png" for i in range(self.variations)]
        missing = [i for i, target in enumerate(targets) if not target.exists()]
        if line := self.painter.select_attention(self.together):
            console.print(line, highlight=False)
        start = time.perf_counter()
        with progress(f"editing {path.name}", len(missing) * len(plan.windows), "windows") as bar:
            drawn = edit_picture(
                plan,
                self.painter,
                missing,
                match=self.about["match_colours"],
                erase=self.about["erase"],
                together=self.together,
                advance=bar.advance,
            )
            for i, result in drawn:
                save_png(result.image(), targets[i])
        seconds = time.perf_counter() - start
        shown = (read_picture(target) for target in targets[:SHOWN])
        overview = sheet(plan, reconstruction(plan, self.painter), shown)
        save_png(overview, self.out / f"{name}-sheet.png")
        console.print(f"{path.name}: {self.variations} variations, all in {self.out / f'{name}-sheet.png'}")
        return {
            **_described(plan, path),
            "variations": [str(target) for target in targets],
            "sheet": str(self.out / f"{name}-sheet.png"),
            "already_there": self.variations - len(missing),
            "seconds": round(seconds, 3),
        }

    def _plan(self, path: Path) -> Plan:
        """What is drawn of a picture; a line says how much the model's drawing is enlarged for it."""
        size = self.painter.size
        plan = plan_for(self.request, read_picture(path), path, size)
        times = max(window.height for window in plan.windows) / size[0]
        line = f"{path.name}: seen at {size[1]} x {size[0]} px: enlarged {times:.1f} times"
        if times > BLURRED:
            part = (
                "a --box around a part"
                if self.request.whole
                else "a smaller --box or mask, or less --context,"
            )
            warn(f"{line}, and so blurred; {'a smaller --window' if plan.blank else part} is sharper")
        elif round(times, 1) > 1:
            console.print(line, highlight=False)
        return plan

    def _claim(self, name: str, path: Path, plan: Plan) -> None:
        """Record what makes the variations of a picture.

        Raises:
            UserError: variations of something else are there.
        """
        target = self.out / f"{name}.json"
        record = {**self.about, **_described(plan, path), "sha256": file_sha256(path)}
        record["region_sha256"] = hashlib.sha256(plan.region.data).hexdigest()  # of a mask, too
        record = json.loads(json.dumps({**record, "precision": self.painter.precision}))
        if target.exists():
            found = read_json(target)
            found = found if isinstance(found, dict) else {}
            if keys := [key for key in {**found, **record} if found.get(key) != record.get(key)]:
                raise UserError(
                    f"{self.out} holds other edits of {path.name} ({', '.join(keys)})",
                    "choose another --out",
                    [f"{key}: {found.get(key)} there, {record.get(key)} now" for key in keys],
                )
        elif (self.out / f"{name}-000.png").exists():
            raise UserError(f"{self.out} holds pictures of an unknown origin", "choose another --out")
        write_json(target, record)

    def _look_at_one(self, name: str, path: Path) -> dict[str, Any]:
        plan = self._plan(path)
        views = window_views(plan, self.painter, erase=self.about["erase"])
        target = self.out / f"{name}-region.png"
        save_png(preview(plan, views), target)
        described = _described(plan, path)
        grids = [
            [
                {"name": grid.name, "tokens": grid.drawn.size, "drawn": int(grid.drawn.sum())}
                for grid in tokens
            ]
            for _, _, tokens in views
        ]
        console.print(
            f"{path.name}: {described['width']} x {described['height']}, region {described['region']:.1%}, "
            f"feather {plan.feather}; in {target}",
            highlight=False,
        )
        for place, tokens in zip(described["windows"], grids, strict=True):
            console.print(
                f"  window {place['width']} x {place['height']} at {place['left']}, {place['top']}:",
                highlight=False,
            )
            for grid in tokens:
                console.print(
                    f"    {grid['name']}: {grid['drawn']} of {grid['tokens']} tokens drawn", highlight=False
                )
        return {**described, "preview": str(target), "token_grids": grids}


def _described(plan: Plan, path: Path) -> dict[str, Any]:
    """What a plan comes to, for records."""
    return {
        "picture": path.name,
        "height": plan.canvas.size[0],
        "width": plan.canvas.size[1],
        "region": round(float(plan.region.mean(dtype=float)) / 255, 6),
        "feather": plan.feather,
        "windows": [asdict(window) for window in plan.windows],
    }
