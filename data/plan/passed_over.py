"""Steps of a plan that a phase passes over: their data was met, and made every gradient unusable."""

from collections.abc import Iterable, Sequence

Ranges = Sequence[tuple[int, int]]
"""First steps, and those behind the last, in ascending order and apart."""


def joined_ranges(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same steps as ranges that are in order and do not touch."""
    joined: list[tuple[int, int]] = []
    for first, end in sorted(ranges):
        if joined and first <= joined[-1][1]:
            first, last = joined.pop()
            end = max(last, end)
        joined.append((first, end))
    return joined


def step_of_plan(step: int, passed_over: Ranges) -> int:
    """Return the step of the plan that a phase trains as its step `step`, both from 0."""
    for first, end in passed_over:
        if step >= first:
            step += end - first
    return step
