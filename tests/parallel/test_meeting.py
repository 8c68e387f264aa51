"""Ranks of one start meet in a store that still holds what earlier starts have left. Reference: torch's own stores."""

import socket
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from visionloom.common.errors import UserError
from visionloom.common.ranks import STORE_THREAD
from visionloom.parallel import meeting
from visionloom.parallel.meeting import PREFIX, agree, meet

TIMEOUT = timedelta(seconds=20)


def meet_all(store: HashStore, ranks: int) -> list[dist.Store]:
    """What each rank of a start gets; the last one comes first."""
    found: dict[int, dist.Store] = {}
    threads = [
        threading.Thread(
            target=lambda rank=rank: found.update({rank: agree(store, rank, ranks, TIMEOUT)})
        )
        for rank in reversed(range(ranks))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_each_start_has_a_store_of_its_own(ranks: int) -> None:
    shared = HashStore()
    first, second = meet_all(shared, ranks), meet_all(shared, ranks)
    first[0].set("address", "of a dead rank")
    assert all(store.get("address") == b"of a dead rank" for store in first)
    assert not any(store.check(["address"]) for store in second)
    second[-1].set("address", "here")
    assert all(store.get("address") == b"here" for store in second)


def test_ranks_that_died_before_they_had_met() -> None:
    """Row 1 and 2 of the fault matrix in small: words of a start that never came together are answered and passed over."""
    shared = HashStore()
    for rank in (1, 2):
        shared.set(f"{PREFIX}/rank{rank}", f"word of the dead {rank}")
    stores = meet_all(shared, 3)
    stores[1].set("a", "b")
    assert [store.get("a") for store in stores] == [b"b"] * 3


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(dist.DistStoreError, match="rank 1 is missing"):
        agree(HashStore(), 0, 2, timedelta(seconds=0.1))


def test_row_38_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 38 of the fault matrix, the port: another program listens there."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        for name, value in {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "RANK": 0,
            "WORLD_SIZE": 2,
        }.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(UserError, match=f"MASTER_PORT={port} is in use"):
            meet(timedelta(seconds=5))


def test_row_38_a_program_that_is_no_store_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The port as another rank sees it. torch 2.15, given 6 s, had not come back after 600 (measured)."""
    monkeypatch.setattr(meeting, "SILENT_SECONDS", 0.5)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 1, "WORLD_SIZE": 2}
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))
        monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
        with pytest.raises(UserError, match=rf"MASTER_PORT={port} of 127\.0\.0\.1 is in use by"):
            meet(timedelta(seconds=2))
    # Without the other program it comes back.
    for thread in threading.enumerate():
        if thread.name == STORE_THREAD:
            thread.join(60)
            assert not thread.is_alive()


def test_a_store_that_is_nowhere_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 1,
        "RANK": 1,
        "WORLD_SIZE": 2,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=r"127\.0\.0\.1:1"):
        meet(timedelta(seconds=1))
