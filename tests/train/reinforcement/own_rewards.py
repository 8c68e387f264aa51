"""Rewards of a user's own, for tests: a model that knows nothing can earn them."""

import time

from visionloom.train.rewards.rewards import Judged


def short(judged: Judged) -> float:
    """Reward few characters, as a model that knows nothing may write or not."""
    return 1.0 / (1 + len(judged.text))


def raises(judged: Judged) -> float:
    """Fail."""
    return 1 / 0


def is_no_number(judged: Judged) -> float:
    """Return what cannot be added up."""
    return float("nan")


def sleeps(judged: Judged) -> float:
    """Take too long."""
    time.sleep(60)
    return 1.0
