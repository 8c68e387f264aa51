"""The files of the package as syntax trees, for tests of how the code is written."""

import ast
import functools
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("common", "parallel", "model", "data", "train", "forecast", "launch")


@dataclass(frozen=True)
class Source:
    """One file."""

    path: str
    """Relative to the repository."""
    text: str
    tree: ast.Module

    @property
    def module(self) -> str:
        """Return its dotted name; a package has that of its folder."""
        parts = Path(self.path).with_suffix("").parts
        return ".".join(("visionloom", *parts)).removesuffix(".__init__")


def parsed(path: str, text: str) -> Source:
    """Parse a file."""
    return Source(path, text, ast.parse(text))


@functools.cache
def sources() -> tuple[Source, ...]:
    """Read all files of the package once."""
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return tuple(parsed(str(file.relative_to(ROOT)), file.read_text()) for file in files)
