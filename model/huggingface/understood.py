"""Compare settings that another tool has written with a table of those that are understood; others are refused by name.

A setting that is not in the table may be there if it is off: null, false or empty. Nothing here imports torch.
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
    """The names that are understood in one object of settings: three disjoint sets."""

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

    def refusals(
        self,
        given: Mapping[str, Any],
        where: str = "",
    ) -> list[str]:
        """Return a clause for each name of `given` that is not understood; `where` goes before each name."""
        clauses = []
        for name, value in given.items():
            if name in self.only:
                problem = self._problem(value, self.only[name])
            elif name in self.read | self.without_effect or is_one_of(value, OFF):
                problem = None
            else:
                problem = "which is not understood"
            if problem:
                clauses.append(f"{where}{name} is {shown(value)}, {problem}")
        return clauses

    def _problem(
        self,
        value: Any,
        allowed: tuple[Any, ...] | Check,
    ) -> str | None:
        """Return what is wrong with the value of a name in `only`; None if it is allowed."""
        if callable(allowed):
            return None if allowed(value) else "which is not understood"
        # A switch that nobody has set is off.
        is_unset = value is None and allowed[0] is False
        if is_unset or is_one_of(value, allowed):
            return None
        return f"only {shown(allowed[0])} is understood"


def is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Return whether a value of JSON equals an allowed one; 1 and 0 are no booleans."""
    kind = isinstance(value, bool)
    return any(value == each and kind == isinstance(each, bool) for each in allowed)


def shown(value: Any) -> str:
    """Return a value in at most `LONGEST` characters of one line."""
    try:
        text = one_line(repr(value))
    except (RecursionError, ValueError):
        # Too deep, or a whole number of more digits than Python writes (4,300).
        return f"{type(value).__name__} of no usual size"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
