"""A run with a fault in it: started by torchrun as `-m visionloom.tests.train.faulty KIND FIRST LAST RANK WORDS...`.

KIND comes with the data of the steps FIRST to LAST (from 1, 0: for good) on RANK: what a phase passes over does no harm.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from visionloom.launch.configure import start
from visionloom.train.config import RunConfig


def fail(batches: Any) -> None:
    raise ValueError("a fault on purpose")


def poison(batches: Any) -> None:
    for batch in batches:
        # Not NaN, which is no weight above 0: such tokens are left out.
        batch.loss_weights[batch.loss_weights > 0] = float("inf")


def halt(batches: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def sleep(batches: Any, seconds: float = 1000.0) -> None:
    time.sleep(seconds)


def wait(batches: Any) -> None:
    """Until the run is asked to stop, or killed; not in a job that SLURM has started again."""
    from visionloom.train.observe import stopping

    while os.environ.get("SLURM_RESTART_COUNT", "0") == "0" and not stopping.current.reason:
        time.sleep(0.05)


KINDS: dict[str, Callable[[Any], None]] = {
    "fail": fail,
    "nan": poison,
    "halt": halt,
    "sleep": sleep,
    "wait": wait,
    "slow": partial(sleep, seconds=0.5),
}


def pretrain_with(config: RunConfig, kind: str, first: int, last: int, rank: int) -> None:
    """Train with a fault before the forward pass of some steps on a rank."""
    import torch.distributed as dist

    from visionloom.train import loop
    from visionloom.train.run import pretrain

    step_of = loop.train_step

    def step(trainer: Any, batches: Any, *arguments: Any) -> Any:
        number = trainer.stream.step_of_plan(trainer.phase_step) + 1
        if dist.get_rank() == rank and first <= number <= (last or number):
            KINDS[kind](batches)
        return step_of(trainer, batches, *arguments)

    loop.train_step = step
    try:
        pretrain(config)
    finally:
        loop.train_step = step_of


def train(config: RunConfig) -> None:
    """Be a rank under torchrun."""
    pretrain_with(config, sys.argv[1], *map(int, sys.argv[2:5]))


if __name__ == "__main__":
    start(train, sys.argv[5:])
