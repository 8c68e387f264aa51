"""Real runs that can be killed and started again in a tenth of a second: the modules are imported once, the ranks are forked.

    python -m visionloom.tests.train.forked WORK SEED KILLS WORDS...

Starts the run that WORDS name on two ranks, kills one or both with SIGKILL at a random moment, and starts the same command
again, until KILLS kills are done and a run has ended by itself. Prints a JSON line for each attempt. WORK is a folder; each run
that ended is followed by a new one, `WORK/run-N`.
"""

import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

RANKS, GAVE_UP = 2, 93
EXTRA_SECONDS = 0.4
"""Kills are spread over as long as an undisturbed attempt lasts, and a little: some come while the last checkpoint is written."""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def fork_ranks(words: list[str]) -> list[int]:
    """Start the ranks of an attempt; returns their process ids."""
    port, ids = free_port(), []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            run_rank(rank, port, words)
        ids.append(child)
    return ids


def run_rank(rank: int, port: int, words: list[str]) -> None:
    """Be one rank of the run and end with its exit code."""
    from visionloom.launch.configure import start
    from visionloom.launch.pretrain import train

    world = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": RANKS,
        "LOCAL_WORLD_SIZE": RANKS,
        "MASTER_ADDR": "127.0.0.1",
    }
    # The last one says that a launcher set the others. Each attempt is a job of its own.
    world |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": f"forked-{port}"}
    os.environ |= {name: str(value) for name, value in world.items()}
    log = os.open(os.environ["FORKED_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        start(train, words)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def wait(ids: list[int], seconds: float) -> list[int | None]:
    """Exit codes after at most so many seconds; None for a rank that still runs."""
    codes: list[int | None] = [None] * len(ids)
    until = time.monotonic() + seconds
    while None in codes and time.monotonic() < until:
        for index, child in enumerate(ids):
            if codes[index] is None:
                done, status = os.waitpid(child, os.WNOHANG)
                codes[index] = os.waitstatus_to_exitcode(status) if done else None
        time.sleep(0.005)
    return codes


def end(ids: list[int], codes: list[int | None]) -> None:
    for child, code in zip(ids, codes, strict=True):
        if code is None:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def attempt(words: list[str], chance: random.Random, longest: float | None) -> dict[str, Any]:
    """One attempt: killed after a random time if `longest` says how long one lasts, else let run."""
    started = time.monotonic()
    ids = fork_ranks(words)
    if longest is None:
        codes = wait(ids, 120.0)
    else:
        codes = wait(ids, chance.uniform(0.05, longest + EXTRA_SECONDS))
        victims = chance.choice(([0], [1], [0, 1]))
        for victim in victims:
            if codes[victim] is None:
                os.kill(ids[victim], signal.SIGKILL)
        if None in codes and len(victims) == 1:  # what torchrun does when a rank has failed
            time.sleep(chance.uniform(0.0, 0.1))
    killed = None in codes and GAVE_UP not in codes
    end(ids, codes)
    return {"killed": killed, "codes": codes, "seconds": time.monotonic() - started}


def main() -> None:
    """Run, kill and start again as the command line says."""
    work, seed, kills, words = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    os.environ["FORKED_LOG"] = str(work / "log.txt")
    import visionloom.train.run  # noqa: F401  # everything that an attempt would import
    from visionloom.parallel import stand_in

    stand_in.install()
    chance, done, number = random.Random(seed), 0, 0
    folder = work / "reference"
    first = attempt([*words, f"run.folder={folder}"], chance, None)
    print(json.dumps({"folder": str(folder), **first}), flush=True)
    while done < kills:
        folder, number = work / f"run-{number}", number + 1
        finished = False
        while not finished:
            last = done >= kills
            told = attempt(
                [*words, f"run.folder={folder}"], chance, None if last else float(first["seconds"])
            )
            done += bool(told["killed"])
            finished = not told["killed"] and GAVE_UP not in told["codes"]
            print(json.dumps({"folder": str(folder), **told}), flush=True)


if __name__ == "__main__":
    main()
