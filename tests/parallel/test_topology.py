"""Who shares what on several ranks, and the device of a run.

Reference: Megatron-core's order of axes, in which neighbouring ranks share tensors.
"""

import os
from typing import Any
from unittest.mock import patch

import pytest
import torch

from visionloom.common.errors import UserError
from visionloom.parallel import topology as topologies
from visionloom.parallel.config import ParallelConfig
from visionloom.tests.ranks import RankPool


def seen(tensor: int) -> dict[str, Any]:
    """The layout as this rank sees it; runs on every rank of the pool."""
    topology = topologies.start(ParallelConfig(tensor=tensor), torch.device("cpu"))
    total = topology.sum_over_data(torch.tensor([float(topology.rank)]))
    return {
        "tensor": topology.tensor_rank,
        "data": topology.data_rank,
        "copies": topology.data_size,
        "main": topology.is_main,
        "leader": topology.is_data_leader,
        "sum": float(total),
        "gathered": topology.gather_over_data(f"rank {topology.rank}"),
    }


@pytest.mark.long  # four ranks
def test_tensor_and_data_axes(pool: RankPool) -> None:
    found = pool.run(4, seen, 2)
    assert [(rank["tensor"], rank["data"]) for rank in found] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [rank["main"] for rank in found] == [True, False, False, False]
    assert [rank["leader"] for rank in found] == [True, False, True, False]
    assert [(rank["copies"], rank["sum"]) for rank in found] == [
        (2, 2.0),
        (2, 4.0),
        (2, 2.0),
        (2, 4.0),
    ]
    assert [rank["gathered"] for rank in found[:2]] == [["rank 0", "rank 2"], ["rank 1", "rank 3"]]


def refused(tensor: int) -> str:
    with pytest.raises(UserError) as caught:
        topologies.start(ParallelConfig(tensor=tensor), torch.device("cpu"))
    return str(caught.value)


def test_an_impossible_layout_is_refused_on_every_rank(pool: RankPool) -> None:
    assert pool.run(2, refused, 4) == [ParallelConfig(tensor=4).all_problems(2)[0]] * 2


def test_the_device_follows_what_is_there() -> None:
    assert topologies.choose_device("cpu") == torch.device("cpu")
    with patch("torch.cuda.is_available", return_value=False):
        assert topologies.choose_device("auto") == torch.device("cpu")
        with pytest.raises(UserError, match=r"run\.device=cuda, but no GPU is visible"):
            topologies.choose_device("cuda")


def test_each_rank_of_a_machine_gets_a_gpu_of_its_own() -> None:
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.device_count", return_value=2),
    ):
        with patch.dict(os.environ, LOCAL_RANK="1"):
            assert topologies.choose_device("auto") == torch.device("cuda", 1)
        with (
            patch.dict(os.environ, LOCAL_RANK="2"),
            pytest.raises(UserError, match=r"2 GPUs are visible.*rank 2"),
        ):
            topologies.choose_device("auto")


def test_threads_are_shared_by_the_ranks_of_a_machine() -> None:
    with (
        patch("torch.set_num_threads") as threads,
        patch("os.sched_getaffinity", return_value=set(range(8))),
    ):
        for ranks, asked in (("4", 0), ("16", 0), ("4", 3)):
            with patch.dict(os.environ, LOCAL_WORLD_SIZE=ranks):
                topologies.set_threads(asked)
    assert [call.args for call in threads.call_args_list] == [(2,), (1,), (3,)]
