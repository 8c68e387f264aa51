"""Answers to one prompt as a group: how much better each is than the others, and whether there is anything to learn from them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

SMALL: Final = 1e-4
"""Added to the deviation of a group's rewards, as trl does."""


@dataclass(frozen=True)
class GroupRules:
    """Which groups are trained on."""

    most_right: float = 0.9
    """Share of right answers above which a prompt is too easy (the report, section 4: 90 %)."""
    right: float = 0.5
    """Reward from which an answer is right."""

    def fault(self, rewards: Sequence[float]) -> str:
        """Return why a group is left out; empty if it is trained on."""
        share = pass_rate(rewards, self.right)
        if share == 0:
            return "all wrong"
        if share > self.most_right:
            return "too easy"
        return "all alike" if max(rewards) - min(rewards) < SMALL else ""


def pass_rate(rewards: Sequence[float], right: float) -> float:
    """Return the share of rewards from `right` on."""
    return sum(reward >= right for reward in rewards) / len(rewards)


def advantages(rewards: Sequence[float]) -> list[float]:
    """Return by how many deviations each reward of a group is above their mean; zeros for a single one.

    Source: GRPO (arXiv 2402.03300), section 4.1.2; reference implementation: trl's GRPOTrainer.
    """
    count = len(rewards)
    if count < 2:
        return [0.0] * count
    mean = math.fsum(rewards) / count
    excess = [reward - mean for reward in rewards]
    deviation = math.sqrt(math.fsum(each * each for each in excess) / (count - 1))
    return [each / (deviation + SMALL) for each in excess]
