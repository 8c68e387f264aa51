"""What a preflight says, on recorded text. References: NCCL's own lines in public issues, and NVIDIA's version file.

Nothing here has run on a GPU.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from visionloom.launch import environment
from visionloom.launch.check_parts.results import MeasuredSpeed
from visionloom.launch.guarding.causes import cause_of
from visionloom.launch.preflight import before_run
from visionloom.launch.preflight.board import Board
from visionloom.launch.preflight.facts import RankFacts, driver_version, kernels_of
from visionloom.launch.preflight.links import nodes_of, rails_of
from visionloom.launch.preflight.table import rank_table, slow_speeds, warnings
from visionloom.launch.preflight.transports import transport_hints, transports_of
from visionloom.train.observe.limits import WatchConfig

H20_TWO_NODES = """
H20-GPU-06:4015539:4015652 [0] NCCL INFO Channel 07/0 : 0[0] -> 2[0] [receive] via NET/IB/3/GDRDMA
H20-GPU-06:4015540:4015653 [1] NCCL INFO Channel 01/0 : 3[1] -> 1[1] [send] via NET/IB/2/GDRDMA
H20-GPU-06:4015540:4015653 [1] NCCL INFO Channel 00/0 : 3[1] -> 2[0] via P2P/CUMEM
"""
"""NVIDIA/nccl, issue 1189."""
SOCKETS = """
ubuntu:9621:9692 [7] NCCL INFO Channel 14/0 : 15[7] -> 0[0] [send] via NET/Socket/0
ubuntu:39964:40050 [6] NCCL INFO Channel 09 : 6[6] -> 7[7] via SHM/direct/direct
"""
"""NVIDIA/nccl-tests, issue 166."""
OTHERS = """
h100clust-worker-1:497888:498098 [0] NCCL INFO Channel 07/0 : 0[0] -> 8[0] [send] via NET/IBext_v8/7/GDRDMA
sh9-machine-20250813085604-64df4c99dc-m27xf:3884994:3885029 [7] NCCL INFO Channel 00/0 : 7[7] -> 6[6] via P2P/direct pointer
my_machine_name:22489:22489 [7] NCCL INFO Channel 15 : 7[c3000] -> 3[47000] via P2P/IPC/read
my_machine_name:22489:22489 [7] NCCL INFO Connected all rings
hostname-test:987:1347 [7] NCCL INFO NCCL_IB_GID_INDEX set by environment to 3.
"""
"""NVIDIA/nccl, issues 1453, 1817, 820 and 1814."""


@pytest.mark.parametrize(
    ("log", "kinds", "hints"),
    [
        (H20_TWO_NODES, ["NET/IB/GDRDMA", "P2P/CUMEM"], []),
        (SOCKETS, ["NET/Socket", "SHM/direct/direct"], ["TCP (NET/Socket)", "its memory (SHM)"]),
        (OTHERS, ["NET/IBext_v8/GDRDMA", "P2P/IPC/read", "P2P/direct pointer"], []),
        (OTHERS.replace("/GDRDMA", ""), None, ["without GDRDMA"]),
        ("", [], []),
    ],
)
def test_ways_of_nccl(log: str, kinds: list[str] | None, hints: list[str]) -> None:
    transports = transports_of(log)
    assert kinds is None or transports == kinds
    said = [*transport_hints(transports)]
    assert len(said) == len(hints)
    assert all(hint in line for hint, line in zip(hints, said, strict=True))


def test_nccl_writes_where_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL's documentation: %p in NCCL_DEBUG_FILE is the process, %h the host. What the user has exported stays."""
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_FILE"):
        # Set first, so that it is taken away again at the end.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    environment.log_transports(None)
    assert environment.log_of_nccl() is None
    environment.log_transports(tmp_path)
    log = environment.log_of_nccl()
    assert log == tmp_path / f"nccl-{os.getpid()}" and os.environ["NCCL_DEBUG"] == "INFO"
    log.write_text(
        "h:1:2 [0] NCCL INFO x\nh:1:2 [0] NCCL WARN Call to connect failed\nh:1:2 [0] NCCL INFO y\n"
    )
    error = RuntimeError("NCCL error: unhandled system error")
    assert cause_of(error, tmp_path).endswith("; NCCL's last warning: Call to connect failed")

    # A script of a cluster wants no more than warnings, which the file has too.
    monkeypatch.delenv("NCCL_DEBUG_FILE")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    environment.log_transports(tmp_path)
    assert environment.log_of_nccl() == log and os.environ["NCCL_DEBUG"] == "INFO"
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    monkeypatch.setenv("NCCL_DEBUG_FILE", "/logs/%h.log")
    environment.log_transports(tmp_path)
    assert environment.log_of_nccl() == Path(f"/logs/{os.uname().nodename}.log")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023",
            "535.129.03",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build",
            "550.54.15",
        ),
        ("", ""),
    ],
)
def test_the_driver_is_read_from_its_module(text: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "version").write_text(text)
    assert driver_version(tmp_path / "version") == version
    assert driver_version(tmp_path / "none") == ""


def test_kernels_are_named_by_dtype_and_device() -> None:
    cuda = torch.device("cuda", 0)
    assert kernels_of(cuda, torch.bfloat16)["attention"] == "torch, FlashAttention"
    assert kernels_of(cuda, torch.float32)["attention"] == "torch, memory-efficient (fp32)"
    assert kernels_of(cuda, torch.bfloat16)["norms"].startswith("Triton 3")
    assert kernels_of(torch.device("cpu"), torch.float32)["norms"] == "plain torch"


def test_machines_and_rails() -> None:
    nodes = nodes_of(["a", "a", "b", "b", "b"])
    assert nodes == [[0, 1], [2, 3, 4]]
    # Rank 4 has no partner.
    assert rails_of(nodes) == [[0, 2], [1, 3]]


def ranks_of(count: int) -> list[RankFacts]:
    """Cards at the product's speed that a plan assumes of an H100, two in a machine."""
    ranks = []
    for rank in range(count):
        speeds = [
            MeasuredSpeed("product", 700.0, "TFLOP/s", 760.0, "product_share"),
            MeasuredSpeed("write", 900.0, "MB/s"),
        ]
        place = rank, f"node-{rank // 2}", "NVIDIA H100 80GB HBM3", 79.1
        ranks.append(RankFacts(*place, "550.54.15", "torch 2", {"norms": "Triton 3"}, speeds))
    return ranks


def test_slow_ranks_and_what_differs() -> None:
    ranks = ranks_of(20)
    assert slow_speeds(ranks) == {} and [*warnings(ranks)] == []
    ranks[17].speeds[0] = MeasuredSpeed("product", 310.0, "TFLOP/s", 760.0)
    # Disks differ by more than cards.
    ranks[3].speeds[1] = MeasuredSpeed("write", 600.0, "MB/s")
    ranks[5].speeds[1] = MeasuredSpeed("write", 30.0, "MB/s")
    ranks[6].driver = "535.129.03"
    assert slow_speeds(ranks) == {17: ["product"], 5: ["write"]}
    assert [*warnings(ranks)] == [
        "rank 17 on node-8 is slow: product 310 TFLOP/s, where others have 700",
        "rank 5 on node-2 is slow: write 30 MB/s, where others have 900",
        "rank 6 on node-3 has another driver: 535.129.03, where others have 550.54.15",
    ]
    table = rank_table(ranks)
    assert table.row_count == 16
    columns = {str(column.header): [*column.cells] for column in table.columns}
    assert "17" in columns["rank"] and "19" not in columns["rank"]
    assert (
        "310 (0.41) <" in columns["product\nTFLOP/s"]
        and "700 (0.92)" in columns["product\nTFLOP/s"]
    )
    assert "550.54.15" in str(table.title) and "of 20" in str(table.title)


def test_row_38_a_clock_that_is_off_is_told_in_seconds() -> None:
    ranks = ranks_of(6)
    for facts in ranks[4:]:
        facts.clock_seconds = -41.25
    (line,) = warnings(ranks)
    assert line.startswith(
        "the clock of node-2 is 41.2 s behind that of the other machines: torchrun"
    )


def test_the_run_keeps_the_table(tmp_path: Path) -> None:
    before_run.write(ranks_of(2), tmp_path / "preflight.json")
    first, second = json.loads((tmp_path / "preflight.json").read_text())
    assert second["rank"] == 1 and first["speeds"][0]["ratio"] == pytest.approx(700 / 760)


class Dead:
    """A store in which nobody has left anything."""

    def check(self, keys: Any) -> bool:
        return False


def test_nobody_waits_for_a_rank_that_says_nothing() -> None:
    board = Board(Dead(), 1, 2)
    assert board.answers("own", 0.0) == {} and board.decision("own", 0.0) is None
    assert board.place(0) == "before it began"


@pytest.mark.parametrize(
    ("option", "machines", "measured"),
    [("auto", 1, False), ("auto", 2, True), ("always", 1, True), ("never", 64, False)],
)
def test_when_ranks_are_measured(option: str, machines: int, measured: bool) -> None:
    assert WatchConfig(preflight=option).measures_ranks(machines) is measured
