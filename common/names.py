"""Names that become parts of paths: those of runs, phases and datasets."""

import re
from typing import Final

LONGEST: Final = 100
"""Characters of a name; file systems take 255 bytes for a file's, which has more in it."""
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


def name_fault(name: object) -> str | None:
    """Return what is wrong with a name, as the end of a line that begins with it; None if nothing is."""
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or len(name) > LONGEST:
        return (
            f"names have letters (a-z), digits, _ and -, at most {LONGEST}, and do not begin with -"
        )
    return None
