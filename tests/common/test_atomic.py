"""A file is there whole, or as it was before. Reference: what the file system holds."""

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from visionloom.common.atomic import replacing

ROOT = Path(__file__).resolve().parents[2]


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="torn"), replacing(path, durable=False) as file:
        file.write(b"new")
        raise RuntimeError("torn")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_move_happens_inside_placing(tmp_path: Path) -> None:
    path, seen = tmp_path / "a", []

    @contextmanager
    def placing() -> Iterator[None]:
        seen.append(path.exists())
        yield
        seen.append(path.exists())

    with replacing(path, placing=placing()) as file:
        file.write(b"x")
        assert seen == []
    assert seen == [False, True]


def test_files_are_put_in_place_in_one_way() -> None:
    callers = set()
    for folder in ("common", "parallel", "model", "data", "train", "launch"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in (
                    "os.replace",
                    "os.rename",
                ):
                    callers.add(str(path.relative_to(ROOT)))
    assert callers == {"common/atomic.py", "data/shards/write_parts.py", "data/demo/make.py"}
