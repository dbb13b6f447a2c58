"""The wheel, installed in a fresh environment outside the checkout, does what the README says."""

import json
import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IN_WHEEL = {"hmar_cli": "hmar_cli", "kernels": "hmar_kernels", "recipes": "hmar_cli/recipes"}


def run(*command: str | Path, cwd: Path) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=environment | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gets no build folders."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in IN_WHEEL:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", out, source, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a new environment with the wheel; its dependencies are those of this environment.

    They come by a path line in a .pth file: .pth files of that folder, an editable install's among them, are
    not followed.
    """
    folder = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    binaries = folder / "bin"
    run(
        *(sys.executable, "-m", "pip", "--python", binaries / "python", "install"),
        *("--no-deps", "--no-index", wheel),
        cwd=folder,
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    paths = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "dependencies.pth").write_text("\n".join(paths) + "\n")
    return binaries


def test_the_wheel_holds_every_module_and_recipe(wheel: Path) -> None:
    expected = {
        f"{target}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, target in IN_WHEEL.items()
        for pattern in ("*.py", "*.toml", "py.typed")
        for path in (ROOT / folder).rglob(pattern)
    }
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == expected
    assert any(name.endswith("/LICENSE") for name in zipfile.ZipFile(wheel).namelist())


def test_an_installed_wheel_lists_recipes_and_trains(installed: Path, tmp_path: Path) -> None:
    hmar = installed / "hmar"
    code = "import hmar_cli, hmar_kernels; print(hmar_cli.__file__, hmar_kernels.__file__)"
    for path in run(installed / "python", "-c", code, cwd=tmp_path).split():
        assert Path(path).is_relative_to(installed.parent)
    rows = json.loads(run(hmar, "recipes", "list", "--json", cwd=tmp_path))
    assert {path.stem for path in (ROOT / "recipes").glob("*.toml")} == {row["name"] for row in rows}

    small = ("--set", "train.steps=2", "--set", "train.batch_size=4")
    images = "builtin:shapes?count=16"
    run(hmar, "train", "--recipe", "msvq-tiny", "--data", images, "--out", "codec", *small, cwd=tmp_path)
    run(
        *(hmar, "tokenize", images, "--recipe", "hmar-tiny", "--tokenizer", "codec", "--out", "cache"),
        cwd=tmp_path,
    )
    run(hmar, "train", "--recipe", "hmar-tiny", "--data", "cache", "--out", "run", *small, cwd=tmp_path)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == 2
    assert (tmp_path / "run" / "step-00000002" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["recipes", "list"], ["train", "--help"], ["bench-attention", "--help"]]
)
def test_light_commands_import_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "hmar_cli", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported = set(re.findall(r"\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "hmar_cli.app" in imported
    heavy = {"torch", "numpy", "accelerate", "datasets", "PIL", "torchvision", "safetensors", "triton"}
    assert not heavy & imported
