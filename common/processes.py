"""Work on many items by several processes."""

from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context


def in_order[Item, Result](work: Callable[[Item], Result], items: list[Item], workers: int) -> Iterator[Result]:
    """The results in the order of the items; with one worker or one item no process is started.

    `work` and the items must be picklable. Left early, what has not begun is not begun.
    """
    if min(workers, len(items)) <= 1:
        yield from map(work, items)
        return
    pool = ProcessPoolExecutor(min(workers, len(items)), get_context("spawn"))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
