import io
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for `pictures`, which the tests here share

from pictures import Classes, encoded, picture


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps `datasets` away from the network and from the user's own cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("hf"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("hf-child")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes of three pictures; one is broken, and names like `test-…` must not become a split."""
    root = tmp_path / "photos"
    for number, name in enumerate(("dog/a.png", "dog/b.png", "dog/test-c.png", "cat/a.png", "cat/val_b.jpg")):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path)
    (root / "cat" / "z.png").write_bytes(encoded(9)[:40])
    (root / "cat" / "notes.txt").write_text("not a picture")
    return root


@pytest.fixture
def make_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Writes a parquet file from columns; `image` is encoded bytes."""

    def make(name: str = "pictures.parquet", count: int = 6, **columns: object) -> Path:
        import datasets

        table = {"image": [{"bytes": encoded(i), "path": None} for i in range(count)], **columns}
        features = datasets.Features(
            {key: datasets.Image() if key == "image" else _feature(values) for key, values in table.items()}
        )
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {key: getattr(values, "values", values) for key, values in table.items()}
        datasets.Dataset.from_dict(table, features=features).to_parquet(str(path))
        return path

    return make


def _feature(values: object) -> object:
    import datasets

    if isinstance(values, Classes):
        return datasets.ClassLabel(names=values.names)
    assert isinstance(values, list)
    if isinstance(values[0], list):
        return datasets.Sequence(datasets.Value("string"))
    return datasets.Value(
        {str: "string", int: "int64", float: "float64"}[type(next(v for v in values if v is not None))]
    )


@pytest.fixture
def tar(tmp_path: Path) -> Path:
    """A WebDataset file of five pictures, with a label each and a caption in JSON."""
    path = tmp_path / "shards" / "part-000.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as file:
        for number in range(5):
            entries = {
                "png": encoded(number),
                "cls": str(number % 3).encode(),
                "json": b'{"caption": "number %d", "kind": "%s"}'
                % (number, b"odd" if number % 2 else b"even"),
            }
            for extension, data in entries.items():
                info = tarfile.TarInfo(f"{number:04d}.{extension}")
                info.size = len(data)
                file.addfile(info, io.BytesIO(data))
    return path
