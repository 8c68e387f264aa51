"""A run with a fault in it: started by torchrun as `-m visionloom.tests.train.faulty KIND STEP RANK WORDS...`.

KIND at the run's step STEP (1, 2, ...) on RANK (`all`: each), or at each step from there on where its name ends in `+`.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from visionloom.launch.configure import start
from visionloom.train.config import RunConfig


def fail() -> None:
    raise ValueError("a fault on purpose")


KINDS: dict[str, Callable[[], object]] = {
    "fail": fail,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "halt": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "sleep": lambda: time.sleep(1000),
    "slow": lambda: time.sleep(1.0),
}


def train(config: RunConfig) -> None:
    """Train with a fault before the forward pass of a step."""
    from visionloom.train import loop
    from visionloom.train.run import pretrain

    kind, at, rank = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    step_of = loop.train_step

    def step(trainer: Any, *arguments: Any) -> Any:
        here = rank in ("all", os.environ["RANK"])
        number = trainer.step + 1
        if here and (number == at or (kind.endswith("+") and number > at)):
            KINDS[kind.removesuffix("+")]()
        return step_of(trainer, *arguments)

    loop.train_step = step
    pretrain(config)


if __name__ == "__main__":
    start(train, sys.argv[4:])
