"""Tables and progress on the screen: rich, with the words of data shown as they are.

rich would take `[/x]` in a folder's name for markup and `:smile:` for a picture, and hand control characters on to the terminal.
"""

from typing import Any

from rich.console import Console
from rich.text import Text

from visionloom.common.text import encodable, printable


class PlainConsole(Console):
    """A console on which every string is data: no markup, no emoji codes, nothing that a terminal obeys."""

    def __init__(self, **options: Any) -> None:
        """Take the options of rich's Console, but for its own readings of strings."""
        plain = {"markup": False, "emoji": False, "highlight": False}
        super().__init__(**(options | plain))

    def render_str(self, text: str, **options: Any) -> Text:
        """Return any string as rich shows it: a line, a table's cell, or its title."""
        # rich writes through the stream's encoding, and fails where that lacks a character.
        shown = encodable(printable(text), self.encoding)
        return super().render_str(shown, **(options | {"markup": False, "emoji": False}))
