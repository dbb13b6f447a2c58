"""Trains the rows of a table one after another, each a run of its own that is resumed where it was stopped."""

from collections.abc import Mapping
from pathlib import Path

from hmar_cli.console import console
from hmar_cli.runs import Options, train
from hmar_cli.settings import Recipe


def train_rows(recipes: Mapping[Path, Recipe], data: str, *, device: str = "") -> None:
    """Train each recipe on the same data, if its run is not finished yet.

    Args:
        recipes: by the folders of their runs.
        data: cache folder (models) or image source (classifiers, tokenizers).
        device: "cpu", "cuda" or "" for a GPU where there is one.

    Raises:
        UserError: as `train`; so is a run there that has other settings.
        KeyboardInterrupt: Ctrl-C; the run has saved and goes on from there the next time.
    """
    for number, (out, recipe) in enumerate(recipes.items(), start=1):
        console.print(f"training {out.name} ({number} of {len(recipes)})", highlight=False)
        resume = (out / "recipe.toml").is_file()
        outcome = train(recipe, Options(data=data, out=str(out), resume=resume, device=device))
        if outcome.interrupted:
            raise KeyboardInterrupt
