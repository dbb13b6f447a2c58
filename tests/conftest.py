"""What the tests share: random models; after the parity tests, the fixtures that none of them covers are named.

Without a GPU Triton's kernels run in its interpreter, which has to be known before anything imports Triton.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hmar_cli.settings import KlObjective, Msvq, MsvqObjective, Recipe

sys.path.insert(0, str(Path(__file__).parent))  # for golden.py and toy_runs.py

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def save_random() -> Callable[[Path, Recipe, tuple[str, ...]], None]:
    """Writes a checkpoint of a recipe's model with random weights, all of them of some size, and its tokenizer's."""
    from hmar_cli.builders import build_model, build_tokenizer
    from hmar_cli.checkpoints.store import save_checkpoint

    def save(target: Path, recipe: Recipe, class_names: tuple[str, ...]) -> None:
        torch.manual_seed(0)
        tokenizer, model = build_tokenizer(recipe.tokenizer), build_model(recipe)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        objective = MsvqObjective() if isinstance(recipe.tokenizer, Msvq) else KlObjective()
        shared: dict[str, Any] = {"step": 1, "tokenizer_hash": tokenizer.fingerprint()}
        save_checkpoint(
            target.parent / "tokenizers" / target.name,
            recipe=replace(recipe, model=None, text=None, objective=objective),
            weights={"model": tokenizer.state_dict()},
            class_names=(),
            tokenizer=None,
            **shared,
        )
        save_checkpoint(
            target,
            recipe=recipe,
            weights={"model": model.state_dict()},
            class_names=class_names,
            tokenizer=target.parent / "tokenizers" / target.name,
            **shared,
        )

    return save


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the golden fixtures whose family has no test yet, so that they are not taken for passed.

    It stands here and not beside the parity tests because with several workers only this file is read by the
    process that prints.
    """
    reports = [report for group in terminalreporter.stats.values() for report in group]
    if not any("parity/" in getattr(report, "nodeid", "") for report in reports):
        return
    import golden

    if unbuilt := golden.unbuilt():
        line = f"golden fixtures without a test, their family is not built yet: {', '.join(unbuilt)}"
        terminalreporter.write_line(line, yellow=True)
