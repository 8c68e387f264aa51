"""Rewards of a user's own, for tests: a model that knows nothing can earn them."""

from visionloom.train.rewards.rewards import Judged


def short(judged: Judged) -> float:
    """Reward few characters, as a model that knows nothing may write or not."""
    return 1.0 / (1 + len(judged.text))
