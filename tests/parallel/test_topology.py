"""Who shares what on several ranks, and the device of a run.

Reference: Megatron-core's order of axes, in which neighbouring ranks share tensors.
"""

import os
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

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


def test_a_task_of_slurm_may_see_its_own_gpu_alone() -> None:
    with (
        patch("torch.cuda.is_available", return_value=True),
        patch("torch.cuda.device_count", return_value=1),
    ):
        with patch.dict(os.environ, LOCAL_RANK="3", SLURM_LOCALID="3"):
            assert topologies.choose_device("auto") == torch.device("cuda", 0)
        # torchrun is the one task of this machine, and has more ranks than it has GPUs.
        with (
            patch.dict(os.environ, LOCAL_RANK="3", SLURM_LOCALID="0"),
            pytest.raises(UserError, match=r"1 GPUs are visible.*rank 3"),
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


def open_groups() -> int:
    """Process groups of this rank that are open, that of all ranks too."""
    return len(dist.distributed_c10d._world.pg_map)


def changed(layouts: list[ParallelConfig]) -> list[tuple[int, float]]:
    """Open groups, and the sum of the ranks over the copies of the model, in each layout in turn; on every rank of the pool."""
    found = []
    topology = topologies.start(layouts[0], torch.device("cpu"))
    for layout in layouts:
        topology = topologies.change(topology, layout, 0)
        total = topology.sum_over_data(torch.tensor([float(topology.rank)]))
        found.append((open_groups(), float(total)))
    return found


def test_a_change_of_layout_closes_the_groups_before(pool: RankPool) -> None:
    """NCCL's would keep their memory on the device; without closing them a third layout has three times as many."""
    tensor, data = ParallelConfig(tensor=2), ParallelConfig()
    for rank, found in enumerate(pool.run(2, changed, [tensor, data, tensor, data, tensor])):
        groups, sums = zip(*found, strict=True)
        assert groups[0] == groups[2] == groups[4] > 5
        assert groups[1] == groups[3] > 5
        assert sums == (rank, 1, rank, 1, rank)


def beside() -> None:
    """Open a second layout, work in it and close it; runs on every rank of the pool."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    first = topologies.start(ParallelConfig(tensor=2), torch.device("cpu"))
    groups, states = open_groups(), get_cuda_rng_tracker().get_states()
    second = topologies.open_beside(first, ParallelConfig(pipeline=2))
    # Neither Megatron-core nor its random states know of it yet.
    assert parallel_state.get_tensor_model_parallel_group() is first.groups.tp
    assert all(
        torch.equal(a, states[name]) for name, a in get_cuda_rng_tracker().get_states().items()
    )
    with pytest.raises(ValueError, match="inside"), second.entered():
        assert parallel_state.get_pipeline_model_parallel_group() is second.groups.pp
        assert parallel_state.get_tensor_model_parallel_world_size() == 1
        raise ValueError("inside")
    assert parallel_state.get_pipeline_model_parallel_world_size() == 1
    assert (first.tensor_rank, first.data_size) == (second.pipeline_rank, 1) == (first.rank, 1)

    topologies.close_layout(second)
    assert open_groups() == groups
    total = torch.tensor([float(first.rank)])
    dist.all_reduce(total, group=first.groups.tp)
    assert float(total) == 1.0


def test_a_second_layout_is_beside_the_first(pool: RankPool) -> None:
    pool.run(2, beside)


def timeouts(minutes: int) -> set[timedelta]:
    """The longest waits of all groups of a process that opens its world itself; runs on a rank of the pool."""
    dist.destroy_process_group()
    first = topologies.start(ParallelConfig(), torch.device("cpu"), timeout_minutes=minutes)
    assert first.timeout == timedelta(minutes=minutes)
    groups = list(dist.distributed_c10d._world.pg_map)
    assert len(groups) > 5
    return {group._get_backend(first.device).options._timeout for group in groups}


def timeouts_of_shared_packs(minutes: int) -> set[timedelta]:
    """Those of the groups of a layout whose ranks share packs, after a change to it; runs on every rank of the pool."""
    world = dist.group.WORLD
    start = topologies.start(ParallelConfig(), torch.device("cpu"), timeout_minutes=minutes)
    later = topologies.change(start, ParallelConfig(tensor=2), 0)
    assert later.pack_hosts is not None
    groups = [group for group in dist.distributed_c10d._world.pg_map if group is not world]
    return {group._get_backend(later.device).options._timeout for group in groups}


def test_every_group_waits_as_long_as_the_run_says(pool: RankPool) -> None:
    assert pool.run(1, timeouts, 7) == [{timedelta(minutes=7)}]
    assert pool.run(2, timeouts_of_shared_packs, 9) == [{timedelta(minutes=9)}] * 2


def test_nccl_is_given_its_device() -> None:
    with patch.object(dist, "init_process_group") as opened:
        for device in (torch.device("cuda", 0), torch.device("cpu")):
            topologies._open_world(device, timedelta(minutes=1))
    gpu, cpu = opened.call_args_list
    assert gpu.args == ("nccl",) and gpu.kwargs["device_id"] == torch.device("cuda", 0)
    assert cpu.args == ("gloo",) and cpu.kwargs["device_id"] is None
