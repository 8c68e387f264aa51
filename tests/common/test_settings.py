"""Options say which values are possible and what a change means; what does not say so is found.

Reference: the values themselves, compared by Python.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from visionloom.common.names import LONGEST, name_fault
from visionloom.common.settings import check, option, options, without_rules


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
        (Whole(part=Part(float("nan"))), ["part.share=nan must be a finite number"]),
        (Whole(maybe=Part(0.0)), ["maybe.share=0 must be above 0 and below 1"]),
        (Whole(parts={"x": Part(kinds=["aa"])}), ["parts.x.kinds=aa is unknown (did you mean a?): use one of a, b"]),
        (Whole(parts={"x": Part(kinds=["a"] * 3)}), ["parts.x.kinds has 3 entries, at most 2 are possible"]),
        (Whole(weights={"a": 1e308, "b": -1.0}), ["weights.a=1e+308 must be at least 0 and at most 10",
            "weights.b=-1 must be at least 0 and at most 10"]),
        (Whole(weights={str(n): 1.0 for n in range(1025)}), ["weights has 1025 entries, at most 1024 are possible"]),
    ],
)  # fmt: skip
def test_values_that_are_not_possible(whole: Whole, expected: list[str]) -> None:
    assert check(whole).lines == expected


@dataclass
class Range:
    low: int = option(1, "free", least=0)
    high: int = option(2, "free", least=0)

    def problems(self, here: str) -> Iterator[str]:
        if self.low > self.high:
            yield f"{here}.low={self.low} is above {here}.high={self.high}"


@dataclass
class Ranges:
    alone: Range = field(default_factory=Range)
    named: dict[str, Range] = field(default_factory=dict)
    share: float = option(0.5, "free", below=1)

    def problems(self, here: str) -> Iterator[str]:
        if self.alone.low != 1:
            yield f"{here}.alone.low must be 1"


@dataclass
class Root:
    ranges: Ranges = field(default_factory=Ranges)
    range: Range = field(default_factory=Range)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [
        (Ranges(), []),
        (Ranges(Range(3, 2)), ["ranges.alone.low=3 is above ranges.alone.high=2", "ranges.alone.low must be 1"]),
        (Ranges(Range(3, -1)), ["ranges.alone.high=-1 must be at least 0"]),
        (Ranges(Range(3, 2), share=1), ["ranges.share=1 must be below 1", "ranges.alone.low=3 is above ranges.alone.high=2"]),
        (Ranges(named={"a": Range(), "b": Range(2, 1), "c": Range(2, 1), "d": Range(9, 1)}),
            ["ranges.named.b.low=2 is above ranges.named.b.high=1 (likewise c)",
            "ranges.named.d.low=9 is above ranges.named.d.high=1"]),
        (Ranges(named={"a/b": Range(2, 1)}), ["ranges.named.a/b: names have letters (a-z), digits, _ and -, at most 100, and do"
            " not begin with -", "ranges.named.a/b.low=2 is above ranges.named.a/b.high=1"]),
        (Ranges(named={str(n): Range(-1) for n in range(1025)}), ["ranges.named has 1025 entries, at most 1024 are possible"]),
    ],
)  # fmt: skip
def test_sections_check_themselves_where_their_values_are_possible(
    ranges: Ranges, expected: list[str]
) -> None:
    """The walk adds the path, and says once what entries of a mapping have in common."""
    assert check(Root(ranges)).lines == expected
    beside = check(Root(ranges, Range(5, 4)))
    assert (
        beside.lines == [*beside.bounds, *beside.sections]
        and beside.sections[-1] == "range.low=5 is above range.high=4"
    )


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
    "name",
    [
        "",
        ".",
        "..",
        "a/b",
        "../x",
        "/x",
        "-rf",
        "a.b",
        "a b",
        "数据",
        "a\n",
        "a\0",
        "\x1b[0m",
        "A" * 101,
        None,
        3,
    ],
)
def test_names_that_may_not(name: object) -> None:
    assert name_fault(name) is not None
