"""The shape of the code: functions that fit on a screen.

Import directions are held by import-linter, docstrings by ruff (pyproject.toml).
"""

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "parallel", "model", "data", "train", "launch")
LONGEST_FUNCTION = 100
NINTH_DECILE = 45
LONGEST_FILE = 600


def functions() -> Iterator[tuple[str, int]]:
    """Each function of the package with its lines, docstring included."""
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield (
                        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}",
                        (node.end_lineno or node.lineno) - node.lineno + 1,
                    )


def test_functions_fit_on_a_screen() -> None:
    lengths = dict(functions())
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION} == {}
    assert statistics.quantiles(lengths.values(), n=10)[-1] <= NINTH_DECILE


@pytest.mark.parametrize("folder", FOLDERS)
def test_files_can_be_read_at_a_sitting(folder: str) -> None:
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for file in (ROOT / folder).rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE} == {}
