"""Messages of ranks through torch's store: nobody waits for a rank that does not answer longer than it says. Imports no torch.

Collectives cannot serve here: one of a rank that stands still would hold all others.
"""

import socket
import time
from dataclasses import dataclass
from typing import Any, Final

PREFIX: Final = "visionloom/preflight"
PAUSE_SECONDS: Final = 0.05
"""Between two looks: short beside what is measured, long enough for a thousand ranks on one store."""


@dataclass(frozen=True)
class Board:
    """Where the ranks of a world leave texts for each other."""

    store: Any
    """Of the world."""
    rank: int
    ranks: int

    def begin(self, part: str) -> None:
        """Say what this rank is at from now on."""
        # With its host: a rank that is silent cannot be asked.
        place = f"on {socket.gethostname()}, at {part}"
        self.store.set(f"{PREFIX}/at/{self.rank}", place)

    def place(self, rank: int) -> str:
        """Return what a rank was at when it last said so."""
        key = f"{PREFIX}/at/{rank}"
        if not self.store.check([key]):
            return "before it began"
        return str(self.store.get(key).decode())

    def answer(self, stage: str, text: str) -> None:
        """Leave this rank's answer of a stage."""
        self.store.set(f"{PREFIX}/{stage}/{self.rank}", text)

    def answers(self, stage: str, seconds: float) -> dict[int, str]:
        """Return the answers by rank as soon as all have come, and after `seconds` those that have."""
        keys = {rank: f"{PREFIX}/{stage}/{rank}" for rank in range(self.ranks)}
        # All at once as long as all come: a question for each of a thousand ranks takes a second.
        if not self._wait([*keys.values()], seconds):
            keys = {rank: key for rank, key in keys.items() if self.store.check([key])}
        return {rank: self.store.get(key).decode() for rank, key in keys.items()}

    def decide(self, stage: str, text: str) -> None:
        """Leave what rank 0 has to say at the end of a stage."""
        self.store.set(f"{PREFIX}/{stage}/decision", text)

    def decision(self, stage: str, seconds: float) -> str | None:
        """Return what rank 0 says at the end of a stage; None if it says nothing for `seconds`."""
        key = f"{PREFIX}/{stage}/decision"
        if not self._wait([key], seconds):
            return None
        return str(self.store.get(key).decode())

    def _wait(self, keys: list[str], seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self.store.check(keys):
            if time.monotonic() > until:
                return False
            time.sleep(PAUSE_SECONDS)
        return True
