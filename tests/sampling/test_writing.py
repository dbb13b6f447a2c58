"""Images are written in threads: completely, or with an error."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hmar_cli.sampling import images
from hmar_cli.sampling.images import _Writer


def paths(folder: Path, count: int) -> list[Path]:
    return [folder / f"{i}.png" for i in range(count)]


def test_all_is_written_when_it_ends(tmp_path: Path) -> None:
    pictures = torch.linspace(-1, 1, 8)[:, None, None, None].expand(8, 3, 5, 4)
    with _Writer(2) as save:
        for first in range(0, 8, 3):
            save(pictures[first : first + 3], paths(tmp_path, 8)[first : first + 3])
    found = [np.asarray(Image.open(path)) for path in paths(tmp_path, 8)]
    assert [int(each[0, 0, 0]) for each in found] == [round(255 * i / 7) for i in range(8)]
    assert all(each.shape == (5, 4, 3) for each in found)


@pytest.mark.parametrize("calls", [1, 2])
def test_what_cannot_be_written_is_an_error(tmp_path: Path, calls: int) -> None:
    """At the next batch, or at the end."""
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), _Writer(2) as save:
        for _ in range(calls):
            save(torch.zeros(1, 3, 4, 4), [tmp_path / "file" / "0.png"])


def test_a_failure_leaves_what_had_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, written = threading.Event(), threading.Event(), []

    def slow(picture: Any, path: Path, **_: Any) -> None:
        begun.set()
        go.wait(10)
        written.append(path)

    monkeypatch.setattr(images, "save_png", slow)
    with pytest.raises(KeyboardInterrupt), _Writer(1) as save:
        save(torch.zeros(4, 3, 4, 4), paths(tmp_path, 4))
        begun.wait(10)
        threading.Timer(0.2, go.set).start()
        raise KeyboardInterrupt
    assert written == paths(tmp_path, 1)
