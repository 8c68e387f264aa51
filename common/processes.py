"""Work on many items by several processes.

Every pool forks its workers from a server process without threads: forking this process would copy the locks of its
threads, and spawning would import torch anew for each worker. A worker ends with the process that started it.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Final

WAITING: Final = 2
"""Items submitted for each worker: none waits for work, and a lazy list of items is not read far ahead."""


def fork_server(*preload: str) -> ForkServerContext:
    """Return the way in which workers are started.

    Args:
        preload: modules that the server imports once for all workers; only the first call in a process has an effect.
    """
    context = multiprocessing.get_context("forkserver")
    if preload:
        context.set_forkserver_preload(list(preload))
    return context


def stat_fields(process: int | str) -> list[str]:
    """Return the fields of /proc/PID/stat behind the command's name, field 3 of proc(5) first; empty if the process is gone."""
    try:
        # The name before the bracket may hold spaces and brackets of its own.
        _, _, fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    except OSError:
        return []
    return fields.split()


def seconds_alive(process: int | str = "self") -> float:
    """Return for how long a process has run, this one unless said, to a hundredth of a second (proc(5), field 22)."""
    ticks = int(stat_fields(process)[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def end_with_parent() -> None:
    """End this worker when the process that started it has ended, however it ended.

    The fork server would outlive a killed parent for as long as one of its workers lives.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    # A thread, since the worker may be anywhere, and os._exit, since it must not wait for its locks.
    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="visionloom-parent", daemon=True).start()


def in_order[Item, Result](
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
) -> Iterator[Result]:
    """Yield the results in the order of the items; see `as_finished` for what is raised.

    `work`, items and results must be picklable. With one worker or one item no process is started.
    """
    if min(workers, len(items)) <= 1:
        yield from map(work, items)
        return

    with _pool(work, min(workers, len(items)), ()) as pool:
        yield from pool.map(_run, items)


def as_finished[Item, Result](
    work: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    preload: Sequence[str] = (),
) -> Iterator[tuple[Item, Result]]:
    """Yield items with their results, as they are finished.

    Args:
        work: picklable, as are items and results.
        items: read as workers become free, at most `WAITING` for each worker ahead.
        workers: processes.
        preload: see `fork_server`.

    Raises:
        ChildProcessError: if a worker was killed.
        Exception: the one that `work` raised; what has not begun is not begun.
    """
    remaining = iter(items)
    with _pool(work, workers, preload) as pool:
        pending: dict[Future[Result], Item] = {}
        while True:
            for item in islice(remaining, workers * WAITING - len(pending)):
                pending[pool.submit(_run, item)] = item
            if not pending:
                return

            # As they are finished: one slow item does not keep the others' results waiting.
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                yield pending.pop(future), future.result()


_work: Callable[[Any], Any] | None = None
"""In a worker: what it does with each item. Sent once, since it may hold a tokenizer of 11 MB."""


@contextmanager
def _pool(
    work: Callable[[Any], Any], workers: int, preload: Sequence[str]
) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(workers, fork_server(*preload), _start_worker, (work,))
    try:
        yield pool
    except BrokenProcessPool:
        raise ChildProcessError("a worker process was killed (out of memory?)") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    # Ctrl-C ends a worker without a traceback of its own.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    end_with_parent()


def _run(item: Any) -> Any:
    assert _work is not None
    return _work(item)
