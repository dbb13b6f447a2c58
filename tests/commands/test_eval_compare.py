"""`hmar eval compare`: what compares stands side by side, and what does not is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hmar_cli.app import app
from hmar_cli.evaluation.reports import Measured, Report, flat, read_report

SETTINGS: dict[str, Any] = {
    "extractor": {"name": "judge", "fingerprint": "aa"},
    "size": [8, 8],
    "crop": "adm",
    "count": 2000,
    "reference": {"sha256": "bb", "count": 100},
    "protocol": {"seed": 2020, "is_splits": 10},
}


def report(fid: float = 2.5, cfg: float = 1.5, **settings: Any) -> Report:
    metrics = {
        "fid": Measured("FID[judge]-2k", fid),
        "is": Measured("IS[judge]-2k", 10 - fid, 0.25),
        "accuracy": Measured("Accuracy[judge]", fid / 10),
    }
    about = {"sampling": {"cfg": cfg, "weights_sha256": "cc", "labels": [0, 1]}, "right": round(fid)}
    return Report(metrics, SETTINGS | settings, about, made_with={"device": "cpu"})


def compare(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["eval", "compare", *map(str, arguments)], prog_name="hmar")


def refused(result: Any, message: str, hint: str) -> None:
    assert result.exit_code == 2 and result.stdout == "", result.output
    lines = result.stderr.splitlines()
    assert message in lines[0] and lines[0].startswith("error: "), result.stderr
    assert hint in lines[-1] and lines[-1].startswith("hint: "), result.stderr


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    written = Report(
        {"kid": Measured("KID-2k", 0.5, 0.1, {"subset_size": 100})}, SETTINGS, {"a": 1}, {"b": 2}, {"c": 3}
    )
    written.save(tmp_path / "a.json")
    assert read_report(tmp_path / "a.json") == written


def test_numbers_stand_beside_the_settings_that_differ(tmp_path: Path) -> None:
    report(2.5, cfg=1.5).save(tmp_path / "var.json")
    report(1.25, cfg=3.0).save(tmp_path / "hmar.json")
    rows = [
        line.split() for line in compare(tmp_path / "var.json", tmp_path / "hmar.json").stdout.splitlines()
    ]
    assert rows == [
        ["var", "hmar"],
        ["FID[judge]-2k", "2.5", "1.25"],
        ["IS[judge]-2k", "7.5", "±", "0.25", "8.75", "±", "0.25"],
        ["Accuracy[judge]", "25.0%", "12.5%"],
        ["cfg", "1.5", "3.0"],
    ]
    found = json.loads(compare(tmp_path / "var.json", tmp_path / "hmar.json", "--json").stdout)
    assert found["settings"] == SETTINGS
    assert [row["report"] for row in found["rows"]] == ["var", "hmar"]
    assert [row["subject"] for row in found["rows"]] == [{"sampling.cfg": 1.5}, {"sampling.cfg": 3.0}]
    assert found["rows"][1]["metrics"]["fid"] == {"name": "FID[judge]-2k", "value": 1.25}


def test_the_best_is_the_lowest_distance_and_the_highest_score() -> None:
    from hmar_cli.evaluation.reports import best

    assert [best(metric, [1.0, 2.0]) for metric in ("fid", "sfid", "kid")] == [1.0] * 3
    assert [best(metric, [1.0, 2.0]) for metric in ("is", "precision", "recall", "accuracy")] == [2.0] * 4
    assert best("unknown", [1.0, 2.0]) is None


def test_categories_of_compbench_are_told_apart(tmp_path: Path) -> None:
    from hmar_cli.evaluation.reports import best

    for name, value in (("a", 0.25), ("b", 0.125)):
        numbers = {
            "color.clip_cosine": Measured("CLIP cosine[x]", value),
            "complex.clip_cosine": Measured("CLIP cosine[x]", value + 0.5),
            "scenes.colours": Measured("colours right", value, more={"low": 0.0, "high": 1.0}),
        }
        Report(numbers, SETTINGS, {}).save(tmp_path / f"{name}.json")
    shown = compare(tmp_path / "a.json", tmp_path / "b.json").stdout
    assert [line.split() for line in shown.splitlines()[1:]] == [
        ["color:", "CLIP", "cosine[x]", "0.25", "0.125"],
        ["complex:", "CLIP", "cosine[x]", "0.75", "0.625"],
        ["scenes:", "colours", "right", "25.0%", "12.5%"],
    ]
    assert [best(metric, [1.0, 2.0]) for metric in numbers] == [2.0] * 3


@pytest.mark.parametrize(
    ("key", "other"),
    [
        ("extractor", {"name": "judge", "fingerprint": "ab"}),
        ("extractor", {"name": "inception", "fingerprint": "aa"}),
        ("reference", {"sha256": "bc", "count": 100}),
        ("reference", None),
        ("size", [16, 16]),
        ("crop", "var"),
        ("count", 1000),
        ("protocol", {"seed": 1, "is_splits": 10}),
    ],
)
def test_other_settings_do_not_compare_and_are_named(tmp_path: Path, key: str, other: Any) -> None:
    report().save(tmp_path / "a.json")
    report(**{key: other}).save(tmp_path / "b.json")
    result = compare(tmp_path / "a.json", tmp_path / "b.json", "--metrics", "fid")
    ours, theirs = flat({key: SETTINGS[key]}), flat({key: other})
    named = next(
        name for name in {**ours, **theirs} if ours.get(name, "absent") != theirs.get(name, "absent")
    )
    values = f"{ours.get(named, 'absent')} and {theirs.get(named, 'absent')}"
    refused(result, f"a and b do not compare: {named} is {values}", "measure both with the same settings")


def test_scores_of_the_images_alone_compare_whatever_the_reference(tmp_path: Path) -> None:
    report().save(tmp_path / "a.json")
    report(reference=None).save(tmp_path / "b.json")
    both = (tmp_path / "a.json", tmp_path / "b.json")
    assert compare(*both, "--metrics", "is,accuracy").exit_code == 0
    refused(compare(*both, "--metrics", "is,fid"), "reference", "the same settings")
    report(count=1).save(tmp_path / "b.json")
    refused(compare(*both, "--metrics", "is"), "count is 2000 and 1", "the same settings")


def test_a_metric_that_one_lacks_is_named(tmp_path: Path) -> None:
    whole = report()
    part = Report({"fid": whole.metrics["fid"]}, whole.settings, whole.subject)
    whole.save(tmp_path / "whole.json")
    part.save(tmp_path / "part.json")
    for names in (("whole", "part"), ("part", "whole")):
        paths = [tmp_path / f"{name}.json" for name in names]
        refused(compare(*paths), "part has no is, accuracy", "--metrics fid")
    assert compare(tmp_path / "whole.json", tmp_path / "part.json", "--metrics", "fid").exit_code == 0
    other = Report({"kid": Measured("KID-2k", 1.0)}, whole.settings, whole.subject)
    other.save(tmp_path / "other.json")
    refused(compare(tmp_path / "part.json", tmp_path / "other.json"), "other has no fid", "share no metric")
    Report({}, SETTINGS, {}).save(tmp_path / "empty.json")
    Report({}, SETTINGS, {}).save(tmp_path / "empty2.json")
    refused(
        compare(tmp_path / "empty.json", tmp_path / "empty2.json"),
        "empty holds no metric",
        "hmar eval samples",
    )


def test_mistakes_are_one_line_and_a_hint(tmp_path: Path) -> None:
    good = tmp_path / "a.json"
    report().save(good)
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "torn.json").write_text('{"format": "hmar-eval", "ver')
    (tmp_path / "newer.json").write_text(json.dumps(report().describe() | {"version": 2}))
    (tmp_path / "hollow.json").write_text(json.dumps(report().describe() | {"metrics": {"fid": 3}}))
    refused(compare(good), "1 report to compare", "two or more")
    refused(compare(good, good), "is given twice", "once")
    refused(
        compare(good, tmp_path / "nowhere.json"), "nowhere.json: No such file or directory", "--out FILE.json"
    )
    refused(compare(good, tmp_path / "torn.json"), "torn.json: not JSON", "--out FILE.json")
    refused(compare(good, tmp_path), f"cannot read {tmp_path}: Is a directory", "--out FILE.json")
    refused(compare(good, tmp_path / "list.json"), "is no report", "--out FILE.json")
    refused(compare(good, tmp_path / "hollow.json"), "is no report", "--out FILE.json")
    refused(compare(good, tmp_path / "newer.json"), "has version 2 of the format", "update")
    (tmp_path / "sub").mkdir()
    report(1.0).save(tmp_path / "sub" / "a.json")  # of the same name: named by their paths
    assert str(tmp_path / "sub" / "a.json") in compare(good, tmp_path / "sub" / "a.json", "--json").stdout
