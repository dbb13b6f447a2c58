"""A tiny cache of tokens, its tokenizer and recipes for it: everything that a real run needs, in seconds."""

import sys
from pathlib import Path

import pytest

from hmar_cli.recipe import load_recipe
from hmar_cli.settings import Recipe

sys.path.insert(0, str(Path(__file__).parent))  # for toys.py
from toy_runs import MASKED, RECIPE, TOKENIZER, make_cache


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with recipes toy.toml, toy-masked.toml and toy-msvq.toml."""
    folder = tmp_path_factory.mktemp("toys")
    for name, text in (("toy", RECIPE), ("toy-masked", MASKED), ("toy-msvq", TOKENIZER)):
        (folder / f"{name}.toml").write_text(text)
    return folder


@pytest.fixture
def toy(toys: Path) -> Recipe:
    return load_recipe(str(toys / "toy.toml"))


@pytest.fixture(scope="session")
def cache(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("caches") / "toy", load_recipe(str(toys / "toy.toml")), 0)


@pytest.fixture(scope="session")
def other_cache(toys: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images by another tokenizer."""
    return make_cache(tmp_path_factory.mktemp("caches") / "other", load_recipe(str(toys / "toy.toml")), 1)
