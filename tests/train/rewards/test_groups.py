"""Groups of answers. Reference: torch's mean and unbiased deviation as trl's GRPOTrainer takes them."""

import pytest
import torch

from visionloom.train.rewards.groups import GroupRules, advantages


def test_advantages_are_trls() -> None:
    rewards = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
    for own, theirs in zip(rewards.tolist(), expected.tolist(), strict=True):
        assert advantages(own) == pytest.approx(theirs, rel=1e-12)


def test_a_group_of_one_teaches_nothing() -> None:
    assert advantages([0.7]) == [0.0]


@pytest.mark.parametrize(
    ("rewards", "fault"),
    [
        ([0.0, 0.1], "all wrong"),
        ([1.0] * 16, "too easy"),
        ([1.0] * 15 + [0.0], "too easy"),
        ([1.0] * 14 + [0.0] * 2, ""),
        ([1.0, 0.0], ""),
    ],
)
def test_groups_that_are_left_out(rewards: list[float], fault: str) -> None:
    """The report drops prompts without a right answer, and those of a pass rate above 90 %."""
    assert GroupRules().fault(rewards) == fault
