"""YAML of a run that somebody else may have changed. Reference: PyYAML's own reading of good files."""

from pathlib import Path

import pytest
import yaml

from visionloom.common.jsonfile import JsonError
from visionloom.common.yamlfile import LARGEST, read_yaml


def test_plain_values_are_those_of_pyyaml(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None, True, "x: y"], "b": {"c": {"d": "é"}}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(value))
    assert read_yaml(tmp_path, "x.yaml") == value


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: &x [1]\nb: *x", "has aliases"),
        ("- 1", "should be a mapping"),
        ("a: 2020-01-01", "not YAML of plain values"),
        ("a: .inf", "Infinity is not a number"),
        ("a: !!python/object/apply:os.system [x]", "not YAML of plain values"),
        ("a: [" * 5000, "not YAML of plain values|nested"),
        ("a: {b: {c: 1}", "not YAML of plain values"),
        ("a: " + "9" * 5000, "not YAML of plain values"),
        ("a: " + "b" * LARGEST, "is larger than"),
    ],
    ids=lambda value: value[:12],
)
def test_what_no_run_writes_is_one_line(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(JsonError, match=told) as raised:
        read_yaml(tmp_path, "x.yaml")
    assert "\n" not in str(raised.value) and str(tmp_path / "x.yaml") in str(raised.value)
