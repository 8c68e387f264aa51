"""Media of coming samples, read from a remote store before they are asked for: many requests at a time, few bytes."""

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from visionloom.data.shards.dataset import REQUESTS, Dataset, ReadRange
from visionloom.data.shards.sample import SampleError

FetchedMembers = dict[str, bytes | SampleError]


class ByteBudget:
    """A semaphore that counts bytes: at most `limit` are held at once. Safe in threads."""

    def __init__(self, limit: int) -> None:
        self.limit, self.used, self.peak = limit, 0, 0
        self._changed = threading.Condition()

    def try_acquire(self, count: int) -> bool:
        """Take bytes if there is room; more than `limit` at once have room when none are held."""
        with self._changed:
            if self._is_full(count):
                return False
            self._take(count)
        return True

    def acquire(self, count: int) -> None:
        """Take bytes, waiting until there is room."""
        with self._changed:
            self._changed.wait_for(lambda: not self._is_full(count))
            self._take(count)

    def force(self, count: int) -> None:
        """Take bytes although there may be no room."""
        with self._changed:
            self._take(count)

    def release(self, count: int) -> None:
        """Give bytes back."""
        with self._changed:
            self.used -= count
            self._changed.notify_all()

    def _is_full(self, count: int) -> bool:
        return self.used > 0 and self.used + count > self.limit

    def _take(self, count: int) -> None:
        self.used += count
        self.peak = max(self.peak, self.used)


@dataclass
class Wanted:
    """A read of one of the consumer's samples, by the sample's number."""

    number: int
    dataset: Dataset
    run: ReadRange


@dataclass
class _Flying:
    wanted: Wanted
    future: "Future[FetchedMembers]"
    left: int
    """Members not taken yet: with the last one the read's bytes are given back."""


class AheadReader:
    """The media of a sequence of samples, for one consumer that goes through them in order.

    Reads begin in the order of `wanted` while `budget` has room, so the bytes asked for and not yet taken stay below its
    limit (or are one read, if that alone is larger). A context: at its end everything is given back.
    """

    def __init__(
        self, wanted: Iterable[Wanted], budget: ByteBudget, threads: ThreadPoolExecutor
    ) -> None:
        self._coming, self._budget, self._threads = deque(wanted), budget, threads
        self._flying: deque[_Flying] = deque()
        self._at_hand: dict[str, tuple[_Flying, bytes | SampleError]] = {}
        self._number = -1

    def __enter__(self) -> "AheadReader":
        self._fill()
        return self

    def __exit__(self, *_: object) -> None:
        self._coming.clear()
        self._leave()
        while self._flying:
            flying = self._flying.popleft()
            flying.future.cancel()
            self._budget.release(flying.wanted.run.length)

    def media_of(
        self,
        number: int,
        dataset: Dataset,
        index: int,
    ) -> Callable[[str], bytes]:
        """Return what reads the members of the sample of this number; it raises SampleError and StoreError.

        Members of earlier samples that were not taken are given back.
        """
        self._leave()
        self._number = number
        return lambda ref: self._take(dataset, index, ref)

    def _take(self, dataset: Dataset, index: int, ref: str) -> bytes:
        while ref not in self._at_hand and self._bring():
            pass
        if ref not in self._at_hand:  # not foreseen, or taken before
            return dataset.member(index, ref)
        flying, answer = self._at_hand.pop(ref)
        flying.left -= 1
        # the bytes of a read are held until its last member is taken
        if not flying.left:
            self._budget.release(flying.wanted.run.length)
            self._fill()
        if isinstance(answer, SampleError):
            raise answer
        return answer

    def _bring(self) -> bool:
        """Wait for the next read of this sample; return False if there is none."""
        if not self._flying and self._coming and self._coming[0].number <= self._number:
            self._begin_next()
        if not self._flying or self._flying[0].wanted.number > self._number:
            return False
        flying = self._flying.popleft()
        for name, answer in flying.future.result().items():
            self._at_hand[name] = flying, answer
        # of an earlier sample: nobody takes it any more
        if flying.wanted.number < self._number:
            self._leave()
        return True

    def _begin_next(self) -> None:
        """Begin the next read, if need be when there is room for it."""
        length = self._coming[0].run.length
        if self._at_hand:  # waiting for room would be waiting for oneself
            self._budget.force(length)
        else:
            self._budget.acquire(length)
        self._begin(self._coming.popleft())

    def _leave(self) -> None:
        """Give back what is at hand."""
        # several members may have come by one read, which holds its bytes once
        reads = {id(flying): flying for flying, _ in self._at_hand.values()}
        for flying in reads.values():
            self._budget.release(flying.wanted.run.length)
        self._at_hand.clear()
        self._fill()

    def _fill(self) -> None:
        while (
            self._coming
            and len(self._flying) < REQUESTS
            and self._budget.try_acquire(self._coming[0].run.length)
        ):
            self._begin(self._coming.popleft())

    def _begin(self, wanted: Wanted) -> None:
        future = self._threads.submit(wanted.dataset.read_run, wanted.run)
        self._flying.append(_Flying(wanted, future, len(wanted.run.members)))
