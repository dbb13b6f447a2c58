"""What is said on standard error is said as it is."""

import pytest

from hmar_cli.console import console, progress, warn


def test_brackets_are_text(capsys: pytest.CaptureFixture[str]) -> None:
    """Names of metrics and files may hold brackets: "FID[classifier]-2k" must not become "FID-2k"."""
    console.print("FID[judge]-2k of [/photos]", highlight=False)
    warn("FID[judge]-2k says little of [/photos]")
    with progress("runs/[/a]", 1) as bar:
        bar.note("[/b]")
        bar.advance()
    said = capsys.readouterr().err
    assert "FID[judge]-2k of [/photos]\n" in said
    assert "warning: FID[judge]-2k says little of [/photos]\n" in said
    assert "runs/[/a]" in said and "[/b]" in said
