"""Imports go one way, as CONTRIBUTING.md lays the packages out."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = {"errors", "files", "console", "launch", "__version__"}
KERNEL_USERS = {"models", "tokenizers", "benchmarks"}
MAY_IMPORT = {
    "settings.py": {"models"},
    "recipe.py": {"settings"},
    "sizes.py": {"settings"},
    "errors.py": set(),
    "files.py": set(),
    "console.py": set(),
    "report.py": set(),
    "launch.py": set(),
    "models": set(),
    "tokenizers": {"models"},
    "checkpoints": {"recipe", "settings"},
    "data": {"models", "tokenizers", "settings"},
    "training": {"models", "tokenizers", "data", "checkpoints", "recipe", "settings"},
    "sampling": {"models", "tokenizers", "report", "settings"},
    "pictures": {"models", "tokenizers", "sampling", "report", "settings"},
    "evaluation": {"models", "tokenizers", "data", "builders"},
    "benchmarks": {
        "models",
        "tokenizers",
        "training",
        "sampling",
        "builders",
        "recipe",
        "report",
        "settings",
    },
    "builders.py": {"models", "tokenizers", "training", "checkpoints", "recipe", "settings"},
    "serving.py": {"models", "tokenizers", "sampling", "pictures", "report", "settings"},
    "analysis": {
        "models",
        "tokenizers",
        "data",
        "training",
        "sampling",
        "evaluation",
        "benchmarks",
        "checkpoints",
        "builders",
        "runs",
        "recipe",
        "report",
        "settings",
        "sizes",
    },
    "imports.py": {"builders", "checkpoints", "models", "recipe", "settings"},
    "exports.py": {"imports", "builders", "checkpoints", "models", "settings"},
    "previews.py": {"models", "tokenizers", "data", "training", "sampling", "builders", "report", "settings"},
}
OUTSIDE = {
    "torch",
    "hmar_kernels",
    "open_clip",
    "safetensors",
}  # what models may import, with the standard library


def imported_anything(path: Path) -> set[str]:
    """What a file imports anywhere, functions included: "hmar_cli.models.scales", "torch.nn"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported(path: Path) -> set[str]:
    """Of what a file imports, the modules of the project."""
    return {name for name in imported_anything(path) if name.split(".")[0] in ("hmar_cli", "hmar_kernels")}


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_packages_import_only_what_lies_below_them(place: str) -> None:
    path = ROOT / "hmar_cli" / place
    files = [path] if path.is_file() else sorted(path.rglob("*.py"))
    allowed = MAY_IMPORT[place] | SHARED | {place} if place != "models" else {"models"}
    assert files
    for file in files:
        for name in imported(file):
            root, part = name.split(".")[:2]
            fine = place in KERNEL_USERS if root == "hmar_kernels" else part in allowed
            assert fine, f"{file.relative_to(ROOT)} imports {name}"


def test_models_import_few_packages() -> None:
    files = sorted((ROOT / "hmar_cli" / "models").rglob("*.py"))
    assert files
    for file in files:
        found = {name.split(".")[0] for name in imported_anything(file)} - {"hmar_cli"}
        strange = found - sys.stdlib_module_names - OUTSIDE
        assert not strange, f"{file.relative_to(ROOT)} imports {', '.join(strange)}"


def test_nothing_but_the_application_imports_commands() -> None:
    for file in sorted((ROOT / "hmar_cli").rglob("*.py")):
        if file.parent.name != "commands" and file.name != "app.py":
            assert not any(name.startswith("hmar_cli.commands") for name in imported(file)), file


def test_kernels_stand_alone() -> None:
    """An implementation, one file or several, imports what is shared and itself; what is shared imports nothing."""
    shared = {"common", "tiles"}
    files = sorted((ROOT / "kernels").glob("*.py"))
    implementations = {path.stem for path in files} - {"__init__", "api"} - shared
    assert {"reference", "sdpa", "masked", "flex", "varlen"} <= implementations
    for file in files:
        names = imported(file)
        assert not any(name.startswith("hmar_cli") for name in names), file
        modules = {name.split(".")[1] for name in names}
        if file.stem in shared or file.stem == "reference":
            assert not modules, f"{file.name} imports {modules}"
        elif file.stem in implementations:
            strange = {m for m in modules - shared if m.split("_")[0] != file.stem.split("_")[0]}
            assert not strange, f"{file.name} imports {strange}"
