"""What the tests share: after the parity tests, the fixtures that none of them covers are named."""

import importlib.util
from pathlib import Path
from typing import Any


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the golden fixtures whose family has no test yet, so that they are not taken for passed.

    It stands here and not beside the parity tests because with several workers only this file is read by the
    process that prints.
    """
    reports = [report for group in terminalreporter.stats.values() for report in group]
    if not any("parity/" in getattr(report, "nodeid", "") for report in reports):
        return
    spec = importlib.util.spec_from_file_location("golden", Path(__file__).parent / "parity" / "golden.py")
    assert spec is not None and spec.loader is not None
    golden = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(golden)
    if unbuilt := golden.unbuilt():
        line = f"golden fixtures without a test, their family is not built yet: {', '.join(unbuilt)}"
        terminalreporter.write_line(line, yellow=True)
