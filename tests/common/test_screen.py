"""Tables on the screen show names of data as they are. Reference: rich's own console, which obeys them."""

import io

import pytest
from rich.console import Console
from rich.errors import MarkupError
from rich.table import Table

from visionloom.common.screen import PlainConsole

NAMES = ("[/x]", "[bold]b", ":smile:", "\x1b[2J", "a\nb")


def table() -> Table:
    made = Table("na[/x]me", title="[/title]")
    for name in NAMES:
        made.add_row(name)
    return made


def test_names_are_shown_as_they_are() -> None:
    stream = io.StringIO()
    PlainConsole(file=stream, width=60).print(table(), "[/line] :smile: \x1b[31m")
    shown = stream.getvalue()
    assert all(
        part in shown
        for part in (
            "[/x]",
            "[bold]b",
            ":smile:",
            "\\x1b[2J",
            "na[/x]me",
            "[/title]",
            "[/line] :smile: \\x1b[31m",
        )
    )
    assert "\x1b" not in shown
    with pytest.raises(MarkupError):
        Console(file=io.StringIO()).print(table())


def test_a_stream_that_lacks_letters() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    PlainConsole(file=stream, width=60).print("é", Table("µs", title="日本"))
    stream.seek(0)
    assert "\\xe9" in (shown := stream.read()) and "\\xb5s" in shown and "\\u65e5" in shown
