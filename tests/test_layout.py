"""Imports go one way, as CONTRIBUTING.md lays the packages out."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = {"errors", "files", "console"}
MAY_IMPORT = {
    "settings.py": {"models"},
    "recipe.py": {"settings"},
    "sizes.py": {"settings"},
    "models": set(),
    "tokenizers": {"models"},
    "checkpoints": {"models", "recipe", "settings"},
    "data": {"models", "tokenizers", "settings"},
    "training": {"models", "tokenizers", "data", "checkpoints", "recipe", "settings"},
    "sampling": {"models", "tokenizers", "report"},
    "evaluation": {"models", "tokenizers", "data"},
    "builders.py": {"models", "tokenizers", "training", "checkpoints", "recipe", "settings"},
}


def imported(path: Path) -> set[str]:
    """Modules of the project that a file imports anywhere, functions included: "hmar_cli.models.scales"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("hmar_cli", "hmar_kernels")}


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_packages_import_only_what_lies_below_them(place: str) -> None:
    path = ROOT / "hmar_cli" / place
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    allowed = MAY_IMPORT[place] | SHARED | {place} if place != "models" else {"models"}
    assert files
    for file in files:
        for name in imported(file):
            root, part = name.split(".")[:2]
            fine = place == "models" if root == "hmar_kernels" else part in allowed
            assert fine, f"{file.relative_to(ROOT)} imports {name}"


def test_nothing_but_the_application_imports_commands() -> None:
    for file in sorted((ROOT / "hmar_cli").rglob("*.py")):
        if file.parent.name != "commands" and file.name != "app.py":
            assert not any(name.startswith("hmar_cli.commands") for name in imported(file)), file


def test_kernels_stand_alone() -> None:
    implementations = sorted({path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__", "api"})
    assert "reference" in implementations
    for file in sorted((ROOT / "kernels").glob("*.py")):
        assert not any(name.startswith("hmar_cli") for name in imported(file)), file
        if file.stem in implementations:
            assert not imported(file), file
