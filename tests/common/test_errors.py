"""Unknown names are answered with the nearest known one. Reference: difflib's own choice."""

import ast
from pathlib import Path

from visionloom.common.errors import did_you_mean, unknown

ROOT = Path(__file__).resolve().parents[2]


def test_the_nearest_name_is_suggested() -> None:
    assert did_you_mean("algin", ["align", "long"]) == " (did you mean align?)"
    assert did_you_mean("x", ["align", "long"]) == ""
    # What is shortened is meant, and not what has more letters in common.
    assert did_you_mean("a100", ["h100", "a100_80"]) == " (did you mean a100_80?)"
    assert did_you_mean("", ["align"]) == ""
    assert (
        unknown("phase", "algin", ["align", "long"])
        == "phase=algin is unknown (did you mean align?): use one of align, long"
    )


def test_a_long_or_forged_value_stays_one_short_line() -> None:
    line = unknown("phase", "a\nerror: " + "b" * 100, ["align"])
    assert "\n" not in line
    assert len(line) < 100


def test_there_is_one_suggestion() -> None:
    """`explain.suggestions` looks among dotted paths, by rules of its own."""
    importers = set()
    for folder in ("common", "parallel", "model", "data", "train", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            if any(
                isinstance(node, ast.Import) and node.names[0].name == "difflib"
                for node in ast.walk(ast.parse(path.read_text()))
            ):
                importers.add(str(path.relative_to(ROOT)))
    assert importers == {"common/errors.py", "launch/composing/explain.py"}
