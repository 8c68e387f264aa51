"""A remote folder of shards: retries, a second request where the first is slow, and a cache on disk."""

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Final

from visionloom.data.config import StoreConfig
from visionloom.data.shards.range_cache import RangeCache
from visionloom.data.shards.store import StoreError
from visionloom.data.shards.transports import SLOWEST, Transient, Transport

FIRST_WAIT: Final = 0.25
"""Seconds before the first retry; each further one waits twice as long, times a random factor of 0.5 to 1."""
LONGEST_WAIT: Final = 30.0
_DOUBLINGS: Final = 16
"""Times that the wait doubles: far past LONGEST_WAIT, and no number that a float cannot hold."""


class RemoteStore:
    """Attempts made reliable: retries with growing, random waits; a second request if the first is slow; a cache."""

    remote = True

    def __init__(
        self, transport: Transport, where: str, config: StoreConfig, cache: RangeCache | None = None
    ) -> None:
        self.transport, self.where, self.config = transport, where, config
        self.cache = cache

    def read(self, file: str, offset: int, length: int, fresh: bool = False) -> bytes:
        """See Store; raises StoreError naming the file if it is missing or after the last retry."""
        name = f"{self.where}/{file} {offset}+{length}"
        cached = None if fresh else self._cached(name, length)
        if cached is not None:
            return cached

        def attempt() -> bytes:
            return self.transport.range(file, offset, length)

        try:
            data = self._retry(file, attempt, length)
        except FileNotFoundError:
            shard = f"{self.where}/{file}"
            fix = "restore it or index what is left"
            raise StoreError(f"shard {shard} is missing: {fix}") from None
        return self._kept(name, data)

    def whole(self, file: str, fresh: bool = True) -> bytes:
        """See Store."""
        name = f"{self.where}/{file}"
        cached = None if fresh else self._cached(name)
        if cached is not None:
            return cached
        data = self._retry(file, lambda: self.transport.whole(file), 0)
        return self._kept(name, data)

    def _cached(self, name: str, length: int | None = None) -> bytes | None:
        return None if self.cache is None else self.cache.get(name, length)

    def _kept(self, name: str, data: bytes) -> bytes:
        if self.cache is not None:
            self.cache.put(name, data)
        return data

    def will_read(self, file: str, offset: int, length: int) -> None:
        """Do nothing: `AheadReader` reads early."""

    def _retry(self, file: str, attempt: Callable[[], bytes], length: int) -> bytes:
        """Return the bytes of the first attempt that succeeds, of 1 + data.store.retries."""
        started, last = time.monotonic(), Transient("")
        limit = self.config.timeout_seconds + length / SLOWEST
        attempts = self.config.retries + 1
        for number in range(attempts):
            if number:
                # Not before the first attempt.
                time.sleep(wait_before(number, last.seconds))
            try:
                return self._hedge(attempt, limit)
            except Transient as error:
                last = error

        tried = f"{attempts} attempts in {time.monotonic() - started:.0f} s, the last: {last}"
        raise StoreError(
            f"{self.where}/{file} cannot be read: {tried}:"
            " check the store, or raise data.store.retries or data.store.timeout_seconds"
        )

    def _hedge(self, attempt: Callable[[], bytes], limit: float) -> bytes:
        """Return the first result of one attempt, or of two if it takes longer than data.store.hedge_seconds.

        Raises Transient after `limit` seconds, or once every attempt has failed.
        """
        end = time.monotonic() + limit
        running = {_in_thread(attempt)}
        hedge = self.config.hedge_seconds
        if 0 < hedge < limit and not wait(running, hedge).done:
            running.add(_in_thread(attempt))

        problem: Transient | None = None
        while running:
            done, running = wait(running, max(0.0, end - time.monotonic()), FIRST_COMPLETED)
            # Both hang: their threads end with the process.
            if not done:
                raise Transient(f"no answer within {limit:.3g} s")
            for future in done:
                # One failed attempt does not spoil the other, which may still come.
                try:
                    return future.result()
                except Transient as error:
                    problem = error
        assert problem is not None
        raise problem


def wait_before(retry: int, asked: float = 0.0) -> float:
    """Return the seconds before the retry-th retry (from 1).

    That is what the server asks for, at least our own growing wait, and at most LONGEST_WAIT.
    """
    doublings = min(retry - 1, _DOUBLINGS)
    # Random, so that a thousand readers that failed together do not come back together.
    own = FIRST_WAIT * 2**doublings * random.uniform(0.5, 1.0)
    return min(LONGEST_WAIT, max(own, asked))


def _in_thread(call: Callable[[], bytes]) -> "Future[bytes]":
    """Run in a thread of its own, which nobody waits for at the end: a hanging request must not hang the process."""
    future: Future[bytes] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            # Handed over to whoever asks for the result.
            future.set_exception(error)

    threading.Thread(target=run, name="visionloom-store", daemon=True).start()
    return future
