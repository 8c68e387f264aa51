"""What a check of a machine has seen: results of checks, and speeds beside those that plans assume. Imports no torch."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from visionloom.common.text import one_line


@dataclass(frozen=True)
class CheckResult:
    """One comparison."""

    name: str
    error: float | None
    """The largest relative difference; None: it could not be computed."""
    limit: float
    """The largest that passes."""
    fault: str = ""
    """Why it could not be computed."""

    @property
    def passed(self) -> bool:
        """Return whether the difference is within the limit; a NaN is not."""
        return self.error is not None and self.error <= self.limit

    @property
    def line(self) -> str:
        """Return the result in one line."""
        if self.error is None:
            return f"{self.name}: {self.fault}"
        return f"{self.name}: difference {self.error:.2g}, allowed {self.limit:.2g}"


def guarded(
    name: str, check: Callable[..., Iterable[CheckResult]], *arguments: Any
) -> Iterator[CheckResult]:
    """Yield the results of a check; an error in it is a check that has failed, and not the end of all others."""
    try:
        yield from check(*arguments)
    except Exception as error:
        fault = one_line(f"{type(error).__name__}: {error}")
        yield CheckResult(name, None, 0.0, fault)


def attempt(name: str, limit: float, measure: Callable[[], float]) -> CheckResult:
    """Return the result of a comparison, of which any error is a failure."""
    (result,) = guarded(name, lambda: [CheckResult(name, measure(), limit)])
    return result


@dataclass(frozen=True)
class MeasuredSpeed:
    """One speed of this machine."""

    name: str
    value: float
    unit: str
    assumed: float | None = None
    """The value that plans assume, in the same unit; None: plans know no such card, or do not need it."""
    option: str = ""
    """The keys of the machine's file that this speed corrects."""

    @property
    def ratio(self) -> float | None:
        """Return the measured value over the assumed one."""
        return self.value / self.assumed if self.assumed else None


@dataclass
class CheckReport:
    """All that one run of the command has seen."""

    machine: dict[str, Any]
    """Facts by name, of values that JSON has."""
    gpu_file: str = ""
    """The file of recipes/gpu whose numbers stand beside the speeds; empty: none is about this card."""
    results: list[CheckResult] = field(default_factory=list)
    speeds: list[MeasuredSpeed] = field(default_factory=list)
    ranks: list[dict[str, Any]] = field(default_factory=list)
    """What each rank is and how fast, without the names of hosts."""
    not_checked: list[str] = field(default_factory=list)
    """What this machine or this call could not check, a line each."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds that each part of the check took."""

    @property
    def failures(self) -> list[CheckResult]:
        """Return the checks that did not pass."""
        return [result for result in self.results if not result.passed]

    def timed[T](self, part: str, function: Callable[[], T]) -> T:
        """Return the result of a function, whose time is kept under the name of a part."""
        begun = time.perf_counter()
        result = function()
        self.seconds[part] = round(time.perf_counter() - begun, 2)
        return result
