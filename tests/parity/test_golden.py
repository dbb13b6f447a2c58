"""The reader of the fixtures itself: checksums, families, and no fixture passed over in silence."""

import json
import subprocess
import sys
from pathlib import Path

import golden
import pytest


def _write(folder: Path, name: str, value: dict) -> None:
    (folder / f"{name}.json").write_text(json.dumps(value))


def test_every_fixture_has_a_family():
    assert all(golden.families().values())


@pytest.mark.parametrize("path", list(golden.families()), ids=golden.fixture_id)
def test_fixture_loads_with_checksums(path):
    description, tensors = golden.load_fixture(path)
    assert description["family"]
    generated = {entry[0] for entry in description.get("generated_state", {}).get("entries", [])}
    assert generated <= set(tensors)


def test_wrong_checksum_is_refused():
    values = golden.rebuild([2, 3], 7, 0.5, crc32=3593540762)
    assert values.shape == (2, 3)
    assert values[0, 0].item() == pytest.approx(2 * 0.5 * 0.0763082894 - 0.5)
    with pytest.raises(ValueError, match="checksum"):
        golden.rebuild([2, 3], 8, 0.5, crc32=3593540762)


def test_missing_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HMAR_GOLDEN", str(tmp_path))
    golden.families.cache_clear()
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        golden.families()
    golden.families.cache_clear()


@pytest.mark.parametrize("workers", [[], ["-n", "1"]], ids=["alone", "workers"])
def test_unbuilt_family_is_named_in_the_summary(tmp_path, workers):
    _write(tmp_path, "from-elsewhere", {"family": "never-built"})
    command = [sys.executable, "-m", "pytest", str(Path(__file__).parent / "test_golden.py"), "-q", *workers]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", "-k", "has_a_family"],
        env={
            "HMAR_GOLDEN": str(tmp_path),
            "PATH": "/usr/bin:/bin",
            "PYTHONPATH": ":".join(filter(None, sys.path)),
        },
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "from-elsewhere (never-built)" in run.stdout
