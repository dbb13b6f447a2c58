"""Images in one array of an `.npz`: read row by row, and refused where they are something else."""

import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmar_cli.data.arrays import open_arrays
from hmar_cli.errors import UserError


def images(count: int = 5) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 6, 3), dtype=np.uint8)


def read(path: Path, start: int = 0, stop: int = 10**9) -> list[np.ndarray[Any, Any]]:
    return [np.asarray(example.image) for example in open_arrays(path).read(start, stop)]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_come_as_they_were_written(save: Any, tmp_path: Path) -> None:
    path, expected = tmp_path / "samples.npz", images()
    save(path, arr_0=expected, mu=np.zeros(3))
    source = open_arrays(path)
    assert (len(source), source.shape, source.name) == (5, (5, 4, 6, 3), str(path))
    assert np.array_equal(np.stack(read(path)), expected)
    assert np.array_equal(np.stack(read(path, 1, 3)), expected[1:3])
    assert np.array_equal(np.asarray(source[4].image), expected[4])
    assert [example.index for example in source.read(2, 9)] == [2, 3, 4]
    with pytest.raises(IndexError):
        source[5]


def test_a_newer_header_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "samples.npz"
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        np.lib.format.write_array(file, images(), version=(2, 0))
    assert np.array_equal(np.stack(read(path)), images())


def test_the_array_never_lies_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    np.savez(path, arr_0=np.zeros((2000, 64, 64, 3), np.uint8))  # 25 MB
    tracemalloc.start()
    assert sum(1 for _ in open_arrays(path).read(0, 2000)) == 2000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 5e6


def test_what_holds_no_images_is_refused(tmp_path: Path) -> None:
    def refused(path: Path, *words: str) -> None:
        with pytest.raises(UserError) as caught:
            open_arrays(path)
        assert all(word in str(caught.value) for word in words) and "arr_0" in caught.value.hint

    refused(tmp_path / "none.npz", "no file")
    path = tmp_path / "bad.npz"
    path.write_bytes(b"no archive")
    refused(path, "cannot read")
    np.savez(path, mu=np.zeros(3))
    refused(path, "holds no array arr_0")
    for wrong in (
        images().astype(np.float32),
        images()[0],
        images()[..., :1],
        np.asfortranarray(images()),
        images(0),
    ):
        np.savez(path, arr_0=wrong)
        refused(path, f"is {wrong.dtype} {wrong.shape}")
    np.savez(path, arr_0=np.array([{}], dtype=object))
    refused(path, "object")


def test_a_file_that_is_cut_off_is_told(tmp_path: Path) -> None:
    path = tmp_path / "cut.npz"
    data = np.lib.format
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as file:
        data.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (5, 4, 6, 3)})
        file.write(images(3).tobytes())
    with pytest.raises(UserError, match="image 3 is cut off"):
        read(path)
