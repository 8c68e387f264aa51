"""Give the ranks of one start a fresh store to meet in, though torchrun keeps its store when it starts the ranks anew.

torchrun's agent shares one store over all attempts (`--max-restarts`). gloo leaves its addresses there, and the ranks of the next
attempt would call those of the dead ones. The agents' counts of restarts differ between machines, so no number tells the attempts
apart; the ranks agree on a word of their own instead.
"""

import os
import socket
import threading
import time
import uuid
from concurrent import futures
from datetime import timedelta
from typing import Final

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from visionloom.common.errors import UserError
from visionloom.common.ranks import STORE_THREAD
from visionloom.common.text import first_line

PAUSE_SECONDS: Final = 0.01
"""Between two looks of rank 0 at the ranks that have come."""
SILENT_SECONDS: Final = 60.0
"""After which what listens at MASTER_PORT is taken for another program: torch's store answers at once."""
SILENT: Final = (
    "MASTER_PORT={port} of {address} is in use by another program, which takes connections and has said nothing for {seconds:.0f} s:"
    " give this run a port of its own"
)
PREFIX: Final = "visionloom"


def meet(timeout: timedelta) -> tuple[Store, int, int]:
    """Return the store of this start, this rank and the number of ranks, by torchrun's environment.

    Raises:
        UserError: if the store cannot be reached or opened in time, naming its address.
    """
    port = os.environ.get("MASTER_PORT")
    place = f"{os.environ.get('MASTER_ADDR')}:{port}"
    try:
        store, rank, size = open_store(timeout)
        store.set_timeout(timeout)
        return agree(store, rank, size, timeout), rank, size
    except dist.DistNetworkError as error:
        text = str(error)
        # The two servers that torch has for the store word it differently.
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise UserError(
                f"MASTER_PORT={port} is in use by another program: give this run a port of its own"
                " (torchrun --standalone chooses one)"
            ) from error
        raise UserError(
            f"the ranks cannot meet at {place}: {first_line(error)}: check MASTER_ADDR and MASTER_PORT"
        ) from error
    except dist.DistStoreError as error:
        ranks = os.environ.get("WORLD_SIZE")
        seconds = f"{timeout.total_seconds():.0f} s"
        raise UserError(
            f"not all of the {ranks} ranks came to {place} within {seconds}: {first_line(error)}:"
            " see whether all machines have started"
        ) from error


def open_store(timeout: timedelta) -> tuple[Store, int, int]:
    """Return torch's store, this rank and the number of ranks; raises as torch does, and UserError for another program's port.

    torch has no time limit for a program that takes its connection and says nothing, so a thread waits for it.
    """
    outcome = futures.Future[tuple[Store, int, int]]()
    # Not an executor's, which the end of the process would wait for.
    threading.Thread(target=fill, args=(outcome, timeout), name=STORE_THREAD, daemon=True).start()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    while not outcome.done():
        futures.wait([outcome], SILENT_SECONDS)
        # A store that is not there yet refuses the connection; a real one has answered long ago.
        if not (outcome.done() or has_store()) and listens(address, int(port)):
            raise UserError(SILENT.format(port=port, address=address, seconds=SILENT_SECONDS))
    return outcome.result()


def fill(outcome: futures.Future[tuple[Store, int, int]], timeout: timedelta) -> None:
    """Open torch's store, which may never come to an end."""
    try:
        outcome.set_result(next(rendezvous("env://", timeout=timeout)))
    # Raised where it is waited for.
    except BaseException as error:
        outcome.set_exception(error)


def has_store() -> bool:
    """Return whether the store is in this process, which then waits in it for the other ranks."""
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return os.environ.get("RANK") == "0" and not of_agent


def listens(address: str, port: int) -> bool:
    """Return whether a program takes connections there."""
    try:
        with socket.create_connection((address, port), timeout=5):
            return True
    except OSError:
        return False


def agree(store: Store, rank: int, size: int, timeout: timedelta) -> Store:
    """Return the part of a store that only the ranks of this start use.

    Each rank leaves a word that nobody else has. Rank 0 answers each with the prefix that it has chosen, until all have taken it:
    words of dead ranks are answered too, and their places are read again.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"{PREFIX}/rank{rank}", own)
        # Waits for rank 0, at most the store's timeout.
        prefix = store.get(f"{PREFIX}/answer/{own}").decode()
        store.set(f"{PREFIX}/taken/{prefix}/{rank}", "")
    else:
        prefix = own
        Gathering(store, prefix, size).run(timeout)
    return PrefixStore(prefix, store)


class Gathering:
    """Rank 0's part of the agreement: it hands its prefix to all other ranks."""

    def __init__(self, store: Store, prefix: str, size: int) -> None:
        """Begin with all other ranks missing."""
        self.store = store
        self.prefix = prefix
        self.missing = set(range(1, size))
        self.answered: dict[int, bytes] = {}
        """The last word of each rank that was answered."""

    def run(self, timeout: timedelta) -> None:
        """Answer the words of all ranks until each has taken the prefix; raises DistStoreError if they do not come."""
        until = time.monotonic() + timeout.total_seconds()
        while self.missing:
            for rank in sorted(self.missing):
                self.answer(rank)
            for rank in sorted(self.missing):
                if self.store.check([f"{PREFIX}/taken/{self.prefix}/{rank}"]):
                    self.missing.discard(rank)
            if self.missing and time.monotonic() > until:
                raise dist.DistStoreError(f"rank {min(self.missing)} is missing")
            time.sleep(PAUSE_SECONDS if self.missing else 0)

    def answer(self, rank: int) -> None:
        """Answer a rank's word, if there is one that was not answered yet."""
        place = f"{PREFIX}/rank{rank}"
        if not self.store.check([place]):
            return

        # Read again each time: the word there may be a dead rank's, and its successor's comes later.
        word = self.store.get(place)
        if self.answered.get(rank) != word:
            self.store.set(f"{PREFIX}/answer/{word.decode()}", self.prefix)
            self.answered[rank] = word
