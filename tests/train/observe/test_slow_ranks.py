"""A rank that is slow for 20 steps is named with its part. Row 15 of the fault matrix."""

from typing import Any

import pytest

from visionloom.train.observe.slow_ranks import COMPUTATION, STEPS, SlowRanks, own_seconds

EVEN = [[0.0, 1.0]] * 3


@pytest.mark.parametrize(
    ("slow", "said"),
    [
        ([0.0, 2.0], "rank 3 is slow in computation for 20 steps: 2.00 s of a step of 3.00 s, where others need 1.00 s"),
        ([2.0, 1.0], "rank 3 is slow in data for 20 steps: 2.00 s of a step of 3.00 s, where others need 0.00 s"),
        # A tenth of a step more, or a step that is long for another reason.
        ([0.0, 1.3], ""),
        ([0.5, 1.0], ""),
    ],
)  # fmt: skip
def test_it_is_told_once_in_twenty_steps(slow: list[float], said: str) -> None:
    ranks = SlowRanks()
    words = [ranks.look([*EVEN, slow], 3.0) for _ in range(2 * STEPS - 1)]
    assert words == [""] * (STEPS - 1) + [said] + [""] * (STEPS - 1)


def test_a_rank_that_is_slow_now_and_then_is_not() -> None:
    ranks = SlowRanks()
    turns: list[Any] = [[*EVEN, [0.0, 3.0]]] * 19 + [[[0.0, 3.0], *EVEN]]
    assert [ranks.look(each, 3.0) for each in turns * 3] == [""] * 60


def test_of_two_ranks_the_slow_one_is_known() -> None:
    ranks = SlowRanks()
    said = [ranks.look([[0.0, 1.0], [0.0, 2.0]], 2.1) for _ in range(STEPS)]
    assert said[-1].startswith(f"rank 1 is slow in {COMPUTATION}")


def test_waits_for_others_are_not_a_ranks_own() -> None:
    seconds = {
        "data": 0.5,
        "vision": 1.0,
        "other": 2.0,
        "gradient reduction": 9.0,
        "optimizer": 9.0,
    }
    assert own_seconds(seconds) == [0.5, 3.0]
