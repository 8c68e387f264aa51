"""docs/architecture.md names every file, and no file that is not there. Reference: the files of the package."""

import re

from visionloom.tests.sources import ROOT, sources


def files_on_the_map() -> set[str]:
    """The files that the tables name, each below the heading of its folder."""
    text = (ROOT / "docs" / "architecture.md").read_text().partition("## Every file")[2]
    named, folder = set(), ""
    for line in text.splitlines():
        if heading := re.match(r"### `(.+)/`", line):
            folder = heading[1]
        elif row := re.match(r"\| `(\w+\.py)` \| \S", line):
            named.add(f"{folder}/{row[1]}")
    return named


def test_the_map_names_every_file() -> None:
    files = {source.path for source in sources() if not source.path.endswith("__init__.py")}
    assert files_on_the_map() == files
