"""Every wrong document is one line with file, field and what is expected. Reference for good ones: Python's json."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from visionloom.common.jsonfile import JsonError, load_json, parse_json, read_json


@dataclass(frozen=True)
class Part:
    name: str
    size: int


@dataclass(frozen=True)
class Whole:
    parts: tuple[Part, ...]
    rate: float = 0.5
    rest: dict[str, Any] = field(default_factory=dict)


GOOD = '{"parts": [{"name": "a", "size": 3}], "rate": 1, "rest": {"x": [null, 1.5, "é"]}}'


def test_a_good_document() -> None:
    assert parse_json(GOOD, Whole, "f") == Whole((Part("a", 3),), 1.0, {"x": [None, 1.5, "é"]})
    assert load_json(GOOD, "f") == json.loads(GOOD)


@pytest.mark.parametrize(
    ("document", "said"),
    [
        (
            '{"parts": [{"name": "a", "size": "3"}]}',
            r'f: parts\.0\.size should be a valid integer, got "3"',
        ),
        (
            '{"parts": [{"name": "a", "size": true}]}',
            r"parts\.0\.size should be a valid integer, got true",
        ),
        (
            '{"parts": [{"name": "a", "size": 3.0}]}',
            r"parts\.0\.size should be a valid integer, got 3\.0",
        ),
        (
            '{"parts": [{"name": null, "size": 3}]}',
            r"parts\.0\.name should be a valid string, got null",
        ),
        ('{"parts": [{"size": 3}]}', r"parts\.0\.name is missing"),
        ('{"parts": {}, "rate": 1}', "parts should be a valid"),
        ('{"parts": [], "more": 1}', "more is unknown"),
        ("[]", "the document should be"),
        ("null", "the document should be"),
        ("", "not JSON"),
        ("{", "not JSON"),
        (b"\xff\xfe\xfa", "not UTF-8|not JSON"),
        ('{"rate": NaN}', "NaN is not a number"),
        ('{"rate": 1e999}', "1e999 is too large"),
        ('{"rate": ' + "9" * 5000 + "}", "not JSON: Exceeds the limit"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_a_wrong_one(document: str | bytes, said: str) -> None:
    with pytest.raises(JsonError, match=said) as error:
        parse_json(document, Whole, "f")
    assert len(str(error.value)) < 200
    assert "\n" not in str(error.value)


def test_files(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(GOOD)
    (tmp_path / "link.json").symlink_to("/etc/hostname")
    assert read_json(tmp_path, "a.json", dict[str, Any]) == json.loads(GOOD)
    with pytest.raises(JsonError, match="link out of its folder"):
        read_json(tmp_path, "link.json", Whole)
    with pytest.raises(JsonError, match="larger than 10 bytes"):
        read_json(tmp_path, "a.json", Whole, 10)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path, "b.json", Whole)


@pytest.mark.parametrize(
    "text", ["[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101, "[" * 100_000 + "]" * 100_000]
)
def test_endless_nesting_is_refused(text: str) -> None:
    """Whoever copies or compares such a value would end in a RecursionError; a hundred levels are read."""
    with pytest.raises(JsonError, match="nested"):
        load_json(text, "x")
    assert load_json("[" * 100 + "]" * 100, "x")
