"""Steps built ahead of the one that trains, by a thread or by processes."""

import os
import queue
import threading
import time
from collections.abc import Generator
from contextlib import closing
from typing import Final

from torch.utils.data import DataLoader, get_worker_info

from visionloom.common.errors import MachineError
from visionloom.common.processes import end_with_parent, fork_server
from visionloom.common.ranks import cores_of_rank
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.train_stream import PackStream
from visionloom.data.stream.waiting import StepReader, WaitWatch
from visionloom.parallel.share import Share

PREFETCH: Final = 2
"""Steps built ahead by the background thread or by each worker."""
_CORES_KEPT: Final = 2
"""Cores of a rank for the training process itself: its own thread and the one of autograd."""
_MOST_CHOSEN: Final = 4
"""Workers chosen by themselves at most. A GPU at 8K takes some 330 frames or 150 pictures a second: 3.4 or 0.6 cores
(estimated), and each worker holds PREFETCH steps in memory."""
_UNTIL_REAPED: Final = 0.5
"""Seconds after which the system no longer lists a process that ended."""


def chosen_workers(workers: int | None) -> int:
    """Return the decoding processes of this rank: `workers`, or for None those that its share of the machine's cores allows.

    0, which decodes in a thread, where the training process needs all of them.
    """
    if workers is not None:
        return workers
    return min(_MOST_CHOSEN, max(0, cores_of_rank() - _CORES_KEPT))


def iterate(
    stream: PackStream, steps: range, share: Share, micro_batch: int, workers: int
) -> Generator[list[PackedBatch]]:
    """Yield a rank's micro-batches of each of the steps, built ahead by one thread or by `workers` processes.

    What is read does not depend on `workers`. Errors of building a step are raised where the step would have come.
    """
    ahead = _StepsAhead(stream, steps, share, micro_batch)
    watch = WaitWatch(ahead.readers)
    source = ahead.by_processes(workers, watch) if workers else ahead.by_thread(watch)
    with watch, closing(source):
        for built in source:
            if isinstance(built, Exception):
                raise built
            yield built


class _StepsAhead:
    """The steps of one rank as a map-style dataset; a failing step is its exception."""

    def __init__(self, stream: PackStream, steps: range, share: Share, micro_batch: int) -> None:
        self.stream, self.steps = stream, steps
        self.share, self.micro_batch = share, micro_batch
        self.boards = _Boards(0)
        self.place = "its beginning"
        """What this process reads, if it does."""

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> list[PackedBatch] | Exception:
        step = self.steps[index]
        self.place = f"step {step}"

        # a worker may die inside a library, so what it is at is noted before
        def note(sample: str) -> None:
            self.place = f"step {step}, {sample}"
            self.boards.write(self.place)

        self.stream.watch(note)
        try:
            return self.stream.micro_batches(step, self.share, self.micro_batch)
        except Exception as error:  # handed over, and raised by the reading side with its type kept
            info = get_worker_info()
            reader = f"in data worker {info.id}" if info else "while reading ahead,"
            error.add_note(f"{reader} at {self.place}")
            return error

    def fill(
        self,
        built: queue.Queue[list[PackedBatch] | Exception],
        stopped: threading.Event,
    ) -> None:
        """Build the steps into a queue, until it is stopped."""
        for index in range(len(self)):
            item = self[index]
            # a full queue that nobody reads any more must not hold the thread
            while not stopped.is_set():
                try:
                    built.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stopped.is_set():
                return

    def by_thread(self, watch: WaitWatch) -> Generator[list[PackedBatch] | Exception]:
        """Yield the steps, built by one thread."""
        built: queue.Queue[list[PackedBatch] | Exception] = queue.Queue(PREFETCH)
        stopped = threading.Event()
        # a daemon: a run that ends with an error must not wait for it
        thread = threading.Thread(
            target=self.fill, args=(built, stopped), name="visionloom-data", daemon=True
        )
        thread.start()
        try:
            for _ in range(len(self)):
                yield watch.take(built.get)
        finally:
            stopped.set()
            thread.join()

    def readers(self) -> list[StepReader]:
        """Return who reads, and at what."""
        return self.boards.readers() or [StepReader("the reading thread", os.getpid(), self.place)]

    def by_processes(
        self, workers: int, watch: WaitWatch
    ) -> Generator[list[PackedBatch] | Exception]:
        """Yield the steps, built by processes."""
        # before the workers are sent the stream
        self.boards = _Boards(workers)
        loader: DataLoader[list[PackedBatch] | Exception] = DataLoader(
            self,  # type: ignore[arg-type]  # any object with __len__ and __getitem__ serves
            batch_size=None,
            shuffle=False,
            num_workers=workers,
            prefetch_factor=PREFETCH,
            collate_fn=_unchanged,
            multiprocessing_context=fork_server(__name__),
            worker_init_fn=_start_worker,
        )
        steps = iter(loader)
        try:
            for _ in range(len(self)):
                yield watch.take(lambda: next(steps))
        # torch's own word for a lost worker, or a pipe that nobody holds any more
        except (RuntimeError, OSError, EOFError) as error:
            if (death := self.death(error)) is None:
                raise
            raise death from None

    def death(self, error: Exception) -> MachineError | None:
        """Return what a lost worker was at; None if none is lost."""
        # a process that just ended may still be listed
        time.sleep(_UNTIL_REAPED)
        dead = self.boards.dead()
        if not dead and "exited unexpectedly" in str(error):
            dead = "a data worker died before its first sample"
        if not dead:
            return None
        return MachineError(
            f"{dead}: killed from outside, most likely for want of memory (see dmesg): give it fewer data.workers or smaller"
            " data.store.bytes_in_flight, or leave that shard out; the same command goes on from the last checkpoint"
        )


class _Boards:
    """What each worker is at, in memory that all processes share: it outlives a worker that is killed."""

    SIZE: Final = 400
    """Bytes of a worker's line."""

    def __init__(self, workers: int) -> None:
        self.lines = [fork_server(__name__).RawArray("c", self.SIZE) for _ in range(workers)]

    def write(self, line: str) -> None:
        """Note what this worker is at; do nothing in a process that is none."""
        if (info := get_worker_info()) is not None:
            text = f"{os.getpid()} {line}".encode()
            # the last byte ends the string
            self.lines[info.id].value = text[: self.SIZE - 1]

    def dead(self) -> str:
        """Return the first worker that is gone, and what it was at; empty if all are there."""
        for reader in self.readers():
            if not self._is_alive(reader.process):
                return f"{reader.name} (process {reader.process}) died at {reader.place}"
        return ""

    def readers(self) -> list[StepReader]:
        """Return the workers that have begun a step, and what each is at."""
        readers = []
        for worker, line in enumerate(self.lines):
            process, _, place = line.value.decode(errors="replace").partition(" ")
            if process:
                readers.append(StepReader(f"data worker {worker}", int(process), place))
        return readers

    @staticmethod
    def _is_alive(process: int) -> bool:
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
        return True


def _unchanged(built: list[PackedBatch] | Exception) -> list[PackedBatch] | Exception:
    """Keep a step as it is: the loader pickles its collate function, so it cannot be a lambda."""
    return built


def _start_worker(_: int) -> None:
    """End this worker with its parent.

    Torch's own watch is over the process that forked the worker, which lives on as long as a worker does.
    """
    end_with_parent()
