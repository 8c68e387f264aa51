"""One pool of ranks for each process of the test run: megatron-core is imported once a process, not once a test.

A test runs `pool.run(world_size, function, *arguments)`: the function is called on `world_size` processes that share a gloo
world, and the results come back in the order of the ranks. It must be importable (defined at the top of a test module).
Ranks are forked from one process that has imported what they need, so that a pool that begins anew costs no import.
"""

import faulthandler
import gc
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

TIMEOUT_SECONDS = 300
SECONDS_AFTER_FAILURE = 10
MOST_THREADS = 200
"""Threads of a rank above which new processes take over. Each gloo group has two that wake a hundred times a second; Megatron-core
keeps a mixture's model alive, and with it its groups: after some hundred worlds the machine did little else."""

SERVER = forkserver.ForkServer()
"""The process that ranks are forked from: not the one that the code under test has, whose workers begin without its imports."""
SERVER.set_forkserver_preload(["visionloom.tests.rank_imports"])


def torchrun_environment(rank: int, ranks: int) -> dict[str, str]:
    """The variables that torchrun gives to a rank of one machine."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    named = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none"}
    return {name: str(value) for name, value in numbers.items()} | named


class RankFailed(AssertionError):
    """A rank raised; the message is its traceback."""


class RankPool:
    """Processes that wait for work; more are started when a test needs a larger world."""

    def __init__(self, own_environment: bool = False) -> None:
        """With an `own_environment`, ranks are interpreters that begin with this process's variables of that time."""
        self.context: Any = multiprocessing.get_context(
            "spawn" if own_environment else "forkserver"
        )
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        # One folder for all worlds: a rank that lets go of a FileStore while its folder is removed waits five minutes for it.
        self.stores = tempfile.TemporaryDirectory()
        self.worlds = 0

    def run(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(*arguments)` on every rank of a new world; RankFailed with the first traceback if one raises."""
        while len(self.connections) < world_size:
            self._start_one()
        self.worlds += 1
        store = str(Path(self.stores.name) / str(self.worlds))
        for rank in range(world_size):
            self.connections[rank].send((rank, world_size, store, function, arguments))
        answers = self._answers(world_size)
        failures = [text for ok, text in answers if not ok]
        if failures:
            self.close()
            raise RankFailed("\n".join(failures))
        if (
            max(len(os.listdir(f"/proc/{process.pid}/task")) for process in self.processes)
            > MOST_THREADS
        ):
            self.close()
        return [result for _, result in answers]

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.connections, self.processes = [], []

    def _start_one(self) -> None:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=serve, args=(theirs,), daemon=False)
        with patch.object(forkserver, "connect_to_new_process", SERVER.connect_to_new_process):
            process.start()
        self.connections.append(ours)
        self.processes.append(process)

    def _answers(self, world_size: int) -> list[tuple[bool, Any]]:
        """Return whether each rank succeeded, and its result or traceback; after a failure others are not waited for long."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(answers) < world_size:
            waiting = {
                self.connections[rank]: rank for rank in range(world_size) if rank not in answers
            }
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            for connection in ready:
                rank = waiting[connection]
                answers[rank] = received(connection, rank, self.processes[rank])
            if not ready:
                for rank in waiting.values():
                    answers[rank] = False, f"rank {rank} did not answer in time"
            # The others of a collective wait for a rank that raised for as long as gloo's time limit.
            if not all(succeeded for succeeded, _ in answers.values()):
                deadline = min(deadline, time.monotonic() + SECONDS_AFTER_FAILURE)
        return [answers[rank] for rank in range(world_size)]


def received(connection: Connection, rank: int, process: Any) -> tuple[bool, Any]:
    """Return the answer of a rank that is ready or dead; of a dead one, how its process has ended."""
    try:
        answer: tuple[bool, Any] = connection.recv()
    except (EOFError, OSError):
        process.join(SECONDS_AFTER_FAILURE)
        return False, f"rank {rank} died with exit code {process.exitcode}"  # -9: of SIGKILL
    return answer


def serve(connection: Connection) -> None:
    """Wait for work and do it, in a process of its own."""
    faulthandler.enable()  # a crash shows the stacks of all threads
    sys.path.append(
        str(Path(__file__).parents[1])
    )  # pytest names the test modules tests.x, and functions come by name
    import torch.distributed as dist

    import visionloom.tests.rank_imports  # noqa: F401
    from visionloom.parallel import stand_in

    gc.freeze()  # what is imported need not be looked through after each world
    while True:
        try:
            rank, world_size, store, function, arguments = connection.recv()
        except EOFError:
            return
        except Exception:  # the function's module cannot be imported here
            connection.send((False, f"a rank cannot read its work:\n{traceback.format_exc()}"))
            continue
        try:
            stand_in.install()  # the work before may have imagined a rank on another device
            dist.init_process_group(
                "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
            )
            # A rank that is done at once would close its connections while another still opens them.
            dist.barrier()
            connection.send((True, function(*arguments)))
        except BaseException:
            connection.send((False, f"rank {rank}:\n{traceback.format_exc()}"))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
            if core := sys.modules.get("megatron.core.parallel_state"):
                core.destroy_model_parallel()
            if status := sys.modules.get("visionloom.train.observe.status"):
                # A command has noted there when its process began: minutes before the next test's run.
                status.current = type(status.current)()
            gc.collect()  # models are full of cycles, and hold their groups
