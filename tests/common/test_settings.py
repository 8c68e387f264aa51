"""Options say which values are possible and what a change means; what does not say so is found.

Reference: the values themselves, compared by Python.
"""

from dataclasses import dataclass, field

import pytest

from visionloom.common.names import LONGEST, name_fault
from visionloom.common.settings import option, option_faults, options, without_rules


@dataclass
class Part:
    share: float = option(0.5, "run", above=0, below=1)
    kinds: list[str] = option(["a"], "free", choices=("a", "b"), entries=2)


@dataclass
class Whole:
    count: int = option(1, "never", least=1, most=1000)
    part: Part = field(default_factory=Part)
    maybe: Part | None = None
    parts: dict[str, Part] = field(default_factory=dict)
    weights: dict[str, float] = option({}, "data", least=0, most=10)
    forgotten: int = 3


@pytest.mark.parametrize(
    ("whole", "expected"),
    [
        (Whole(), []),
        (Whole(1000, weights={"a": 0, "b": 10}, parts={"x": Part(0.1, ["a", "b"])}), []),
        (Whole(0), ["count=0 must be at least 1 and at most 1,000"]),
        (Whole(10**5000), ["count=a number of more than 40 digits must be at least 1 and at most 1,000"]),
        (Whole(part=Part(1.0)), ["part.share=1 must be above 0 and below 1"]),
        (Whole(part=Part(float("nan"))), ["part.share=nan must be above 0 and below 1"]),
        (Whole(maybe=Part(0.0)), ["maybe.share=0 must be above 0 and below 1"]),
        (Whole(parts={"x": Part(kinds=["aa"])}), ["parts.x.kinds=aa is unknown (did you mean a?): use one of a, b"]),
        (Whole(parts={"x": Part(kinds=["a"] * 3)}), ["parts.x.kinds has 3 entries, at most 2 are possible"]),
        (Whole(weights={"a": 1e308, "b": -1.0}), ["weights.a=1e+308 must be at least 0 and at most 10",
            "weights.b=-1 must be at least 0 and at most 10"]),
        (Whole(weights={str(n): 1.0 for n in range(1025)}), ["weights has 1025 entries, at most 1024 are possible"]),
    ],
)  # fmt: skip
def test_values_that_are_not_possible(whole: Whole, expected: list[str]) -> None:
    assert option_faults(whole) == expected


def test_what_has_no_rules_is_found() -> None:
    assert list(without_rules(Whole)) == ["forgotten"]
    assert [each.name for each in options(Whole(parts={"x": Part()}))] == [
        "count", "part.share", "part.kinds", "parts.x.share", "parts.x.kinds", "weights"
    ]  # fmt: skip
    first, second = Part(), Part()
    first.kinds.append("b")
    assert second.kinds == ["a"]


@pytest.mark.parametrize("name", ["a", "2024_01", "lora-qwen3vl-8b", "_", "A" * LONGEST])
def test_names_that_may_be_parts_of_paths(name: str) -> None:
    assert name_fault(name) is None


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "../x", "/x", "-rf", "a.b", "a b", "数据", "a\n", "a\0", "\x1b[0m", "A" * 101, None, 3]
)
def test_names_that_may_not(name: object) -> None:
    assert name_fault(name) is not None
