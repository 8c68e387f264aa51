"""Settings that another tool has written, held against a table of what is understood; anything else is refused by name.

A setting that is not in the table may still be there if it is off: null, false or empty. Nothing here imports torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from visionloom.common.text import one_line

OFF: Final[tuple[Any, ...]] = (None, False, "", [], {})
"""Values with which a setting that nobody here knows does nothing."""
LONGEST: Final = 80
"""Characters of a value that an error shows."""
Check = Callable[[Any], bool]


@dataclass(frozen=True)
class UnderstoodFields:
    """What is understood of one object of settings: three disjoint sets of names."""

    read: frozenset[str]
    """Names whose values the caller takes over or compares."""
    without_effect: frozenset[str]
    """Names whose values change no number that the model computes."""
    only: Mapping[str, tuple[Any, ...] | Check]
    """Names that may have these values only, the usual one first, or only values that pass a check."""

    @property
    def names(self) -> frozenset[str]:
        """All names that were looked at."""
        return self.read | self.without_effect | self.only.keys()

    def refusals(self, given: Mapping[str, Any], where: str = "") -> list[str]:
        """What of `given` is not understood, one clause a name; `where` goes before each name."""
        found = []
        for name, value in given.items():
            if name in self.only:
                allowed = self.only[name]
                if value is None and not callable(allowed) and allowed[0] is False:
                    continue  # a switch that nobody has set is off
                if callable(allowed):
                    found += (
                        []
                        if allowed(value)
                        else [f"{where}{name} is {shown(value)}, which is not understood"]
                    )
                elif not is_one_of(value, allowed):
                    found.append(
                        f"{where}{name} is {shown(value)}, only {shown(allowed[0])} is understood"
                    )
            elif name not in self.read | self.without_effect and not is_one_of(value, OFF):
                found.append(f"{where}{name} is {shown(value)}, which is not understood")
        return found


def is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether a value of JSON equals an allowed one; 1 and 0 are no booleans."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def shown(value: Any) -> str:
    """A value in a few words."""
    try:
        text = one_line(repr(value))
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return f"{type(value).__name__} of no usual size"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
