"""The ranks before step 1: all measured, the slow one marked, the silent one named. Reference: what each test does to one rank."""

import re
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from visionloom.common.errors import MachineError
from visionloom.launch.check_parts import speeds
from visionloom.launch.preflight import facts as rank_facts
from visionloom.launch.preflight import links, run
from visionloom.launch.preflight.facts import RankFacts
from visionloom.launch.preflight.run import Preflight
from visionloom.launch.preflight.table import slow_speeds, warnings
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.ranks import RankPool

CPU = torch.device("cpu")


def start(folder: Path) -> Preflight:
    return Preflight(topologies.start(ParallelConfig(), CPU), folder, None)


def measured(folder: Path, fault: str) -> list[RankFacts]:
    """What the ranks are, one of which is slow, has another clock, or seems to be on a machine of its own (runs in the pool)."""
    preflight = start(folder)
    multiply, clock, on_rank_1 = torch.mm, time.time, preflight.topology.rank == 1

    def slow(*arguments: Any) -> torch.Tensor:
        time.sleep(1.0)
        return multiply(*arguments)

    patches = [
        patch.object(torch, "mm", slow if on_rank_1 and fault == "slow" else multiply),
        patch.object(time, "time", lambda: clock() + 30 * (on_rank_1 and fault == "clock")),
        patch.object(rank_facts.socket, "gethostname", lambda: f"node-{preflight.topology.rank}"),
        patch.object(speeds, "RUNS", 2),
        patch.object(speeds, "UNCOUNTED", 1),
    ]
    for each in patches[:2] + patches[3:] + (patches[2:3] if fault == "clock" else []):
        each.start()
    try:
        return preflight.run(torch.float32)
    finally:
        patch.stopall()
        topologies.stop()


def test_a_slow_rank_is_marked(pool: RankPool, tmp_path: Path) -> None:
    ranks, nothing = pool.run(2, measured, tmp_path, "slow")
    assert [facts.rank for facts in ranks] == [0, 1] and nothing == []
    names = [speed.name for speed in ranks[0].speeds]
    assert names == ["product", "copy", "write", "read", links.INSIDE]
    assert all(speed.value > 0 for facts in ranks for speed in facts.speeds)
    assert "product" in slow_speeds(ranks)[1] and "product" not in slow_speeds(ranks).get(0, [])
    assert any(
        line.startswith("rank 1 on ") and "is slow: product 0.00" in line
        for line in warnings(ranks)
    )
    assert not any("clock" in line for line in warnings(ranks))
    assert [facts.transports for facts in ranks] == [["gloo"]] * 2
    assert list(tmp_path.iterdir()) == []


def test_row_38_clocks_of_machines_that_differ(pool: RankPool, tmp_path: Path) -> None:
    """Two machines by their names, of which one is 30 s ahead. Their ranks have no all-reduce inside one."""
    ranks, _ = pool.run(2, measured, tmp_path, "clock")
    assert [speed.name for speed in ranks[0].speeds][-1] == links.BETWEEN
    said = [line for line in warnings(ranks) if "clock" in line]
    assert len(said) == 2 and said[0].startswith("the clock of node-0 is 1") and "behind" in said[0]
    assert said[1].startswith("the clock of node-1 is 1") and "15.0 s ahead of" in said[1]


def silent(folder: Path, where: str) -> str:
    """Rank 1 does not come, stands still with others waiting for it, or fails; returns what ends a rank (runs in the pool)."""
    preflight = start(folder)
    ended = folder / "ended"

    def stand_still(*_: Any) -> Any:
        until = time.monotonic() + 60
        while not ended.exists() and time.monotonic() < until:
            time.sleep(0.05)
        return iter(())

    def fail(*_: Any) -> Any:
        raise OSError("Input/output error")

    limits = [
        patch.object(run, "SECONDS", 4.0),
        patch.object(run, "MORE_SECONDS", 2.0),
        patch.object(run, "SPEAKING_SECONDS", 0.0),
        patch.object(speeds, "LONGEST_REDUCTION", 1.0),
        patch.object(speeds, "RUNS", 1),
    ]
    if preflight.topology.rank == 1:
        faults = {"links": ("measure_links", stand_still), "storage": ("measure_storage", fail)}
        if where in faults:
            limits.append(patch.object(run, *faults[where]))
        else:
            stand_still()
            return "stood still"
    for limit in limits:
        limit.start()
    try:
        preflight.run(torch.float32)
    except MachineError as error:
        return str(error)
    finally:
        patch.stopall()
        ended.touch()
        topologies.stop()
    return "done"


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("start", "rank 1 has not answered within 4 s, before it began"),
        ("links", r"rank 1 has not answered within 4 s, on \S+, at an all-reduce"),
        ("storage", r"rank 1 on \S+ failed: OSError: Input/output error"),
    ],
)
def test_a_rank_that_does_not_answer_is_named(
    where: str, said: str, pool: RankPool, tmp_path: Path
) -> None:
    ended, _ = pool.run(2, silent, tmp_path, where)
    assert re.fullmatch(f"preflight: {said}", ended), ended
