"""Real runs that torch's own agent starts anew in place when a rank is killed, as `torchrun --max-restarts` does.

    python -m visionloom.tests.train.restarted WORK SEED KILLS WORDS...

The agent is torchrun's (LocalElasticAgent with its shared store), but it forks the ranks, so that modules are imported once. Prints
a JSON line for each run: its folder, the kills it was dealt, whether it ended by itself, and for each kill the seconds until the
next optimizer step.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from torch.distributed.launcher.api import LaunchConfig, elastic_launch

RANKS, RESTARTS = 2, 3
KILLS_A_RUN = 2
"""Three starts in a row without a checkpoint would end it with 93, as they should."""
TURNS = itertools.cycle((["0"], ["1"], ["0", "1"]))
"""Whom each kill hits."""


def rank(work: str, words: list[str]) -> None:
    """Be one rank of an attempt: the agent has set the environment."""
    from visionloom.launch.configure import start
    from visionloom.launch.pretrain import train

    for number in (
        signal.SIGTERM,
        signal.SIGINT,
    ):  # the agent's own, which the fork has taken along
        signal.signal(number, signal.SIG_DFL)
    log = os.open(str(Path(work) / "log.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    place = Path(work) / "pids" / os.environ["RANK"]
    place.with_suffix(".tmp").write_text(str(os.getpid()))
    place.with_suffix(".tmp").replace(place)
    start(train, words)


class Killer(threading.Thread):
    """Kills a rank, or all of them, at random moments after the run has made a step since the last kill."""

    def __init__(self, work: Path, folder: Path, chance: random.Random, kills: int) -> None:
        super().__init__(daemon=True)
        self.work, self.folder, self.chance, self.left = work, folder, chance, kills
        self.killed: list[str] = []
        self.seconds: list[float] = []
        self.ended = False

    def run(self) -> None:
        while self.left and not self.ended:
            self._wait_for_a_step()
            time.sleep(self.chance.uniform(0.0, 2.0))
            if self.ended:
                return
            victims = next(TURNS)
            for victim in victims:
                self._kill(victim)
            self.killed.append("+".join(victims))
            self.left -= 1
            began = time.monotonic()
            self._wait_for_a_step()
            self.seconds.append(round(time.monotonic() - began, 2))

    def _wait_for_a_step(self) -> None:
        place = self.folder / "metrics.jsonl"
        seen = place.stat().st_mtime_ns if place.exists() else 0
        size = place.stat().st_size if place.exists() else 0
        while not self.ended:
            if place.exists() and place.stat().st_mtime_ns > seen and place.stat().st_size > size:
                return
            size = min(size, place.stat().st_size) if place.exists() else 0
            time.sleep(0.01)

    def _kill(self, victim: str) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int((self.work / "pids" / victim).read_text()), signal.SIGKILL)


def run(
    work: Path, folder: Path, words: list[str], chance: random.Random, kills: int
) -> dict[str, Any]:
    """One run under the agent, with so many kills."""
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=RANKS, run_id=folder.name, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=RESTARTS, monitor_interval=0.1, start_method="fork",
    )  # fmt: skip
    killer = Killer(work, folder, chance, kills)
    killer.start()
    try:
        elastic_launch(config, rank)(str(work), [*words, f"run.folder={folder}"])
        ended = "by itself"
    except Exception as error:
        ended = f"{type(error).__name__}: {error}"[:2000]
    killer.ended = True
    killer.join()
    return {
        "folder": str(folder),
        "killed": killer.killed,
        "seconds": killer.seconds,
        "ended": ended,
    }


def main() -> None:
    """Run and kill as the command line says; the first run is not disturbed."""
    work, seed, kills, words = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    (work / "pids").mkdir()
    import visionloom.train.run  # noqa: F401  # everything that an attempt would import
    from visionloom.parallel import stand_in

    stand_in.install()
    chance, number, done = random.Random(seed), 0, 0
    while number == 0 or done < kills:
        dealt = run(
            work,
            work / f"run-{number}",
            words,
            chance,
            min(KILLS_A_RUN, kills - done) if number else 0,
        )
        done, number = done + len(dealt["killed"]), number + 1
        print(json.dumps(dealt), flush=True)


if __name__ == "__main__":
    main()
