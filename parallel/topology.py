"""Hold the process groups of every parallel axis in one object, on NCCL or gloo.

`start` is the only place that opens a process group. Modules get their groups from `Topology.groups` by argument.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy as shallow_copy
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from visionloom.common.errors import UserError
from visionloom.common.ranks import cores_of_rank
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.meeting import meet
from visionloom.parallel.share import Share

GLOBAL: Final = re.compile("_[A-Z_]+|_global_process_group_list")
"""Names of Megatron-core's variables of its layout."""


@dataclass(frozen=True)
class Topology:
    """The layout of this run as this rank sees it."""

    config: ParallelConfig
    device: torch.device
    rank: int
    world_size: int
    groups: Any
    """Megatron-core's ProcessGroupCollection."""
    seed: int = 0
    """Seed of Megatron-core's random states."""
    timeout: timedelta = timedelta(minutes=30)
    """Longest wait in a collective."""
    pack_hosts: Any = None
    """Gloo group of the ranks that share a pack: their hosts agree on it without the device; None: no rank shares any."""
    separate_contexts: int = 1
    """Ranks of the context axis that have packs of their own; see `with_whole_sequences`."""
    megatron_globals: Mapping[str, Any] = field(default_factory=dict)
    """What Megatron-core keeps of the layout in its module, by name; see `entered`."""

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Make this layout the one that Megatron-core has: of several on the same ranks it knows one at a time.

        Models of a layout are built, loaded and run in it. The one before comes back at the end.
        """
        before = _megatron_globals()
        _set_megatron_globals(self.megatron_globals)
        try:
            yield
        finally:
            _set_megatron_globals(before)

    @property
    def tensor_rank(self) -> int:
        """Return the place of this rank among those that share a matrix."""
        return int(self.groups.tp.rank())

    @property
    def pipeline_rank(self) -> int:
        """Return the pipeline stage of this rank."""
        return int(self.groups.pp.rank())

    @property
    def context_rank(self) -> int:
        """Return the place of this rank among those that share the tokens of a sequence."""
        return int(self.groups.cp.rank())

    @property
    def context_size(self) -> int:
        """Return the number of ranks that share the tokens of a sequence."""
        return int(self.groups.cp.size())

    @property
    def encoder_rank(self) -> int | None:
        """Return the place of this rank among those that share a pack's pictures; None after the first pipeline stage."""
        return None if self.pipeline_rank else int(self.encoder_group.rank())

    @property
    def encoder_group(self) -> Any:
        """Return the ranks that share a pack's pictures: those of a stage that see different tokens of it."""
        return self.groups.tp_cp if self.config.sequence_parallel else self.groups.cp

    @property
    def is_last_stage(self) -> bool:
        """Return whether this rank computes losses."""
        return self.pipeline_rank == self.config.pipeline - 1

    @property
    def data_rank(self) -> int:
        """Return the number of the copy of the model that this rank holds a part of."""
        return int(self.groups.dp.rank())

    @property
    def data_size(self) -> int:
        """Return the number of copies of the model."""
        return int(self.groups.dp.size())

    @property
    def share(self) -> Share:
        """Return which packs and pictures of a step this rank reads."""
        encoder_rank = -1 if self.encoder_rank is None else self.encoder_rank
        ranks = self.config.encoder_ranks
        return Share(self.data_rank, self.data_size, encoder_rank, ranks, self.is_last_stage)

    @property
    def is_main(self) -> bool:
        """Return whether this rank writes logs and prints."""
        return self.rank == 0

    @property
    def is_data_leader(self) -> bool:
        """Return whether this rank gives the results of its copy of the model, when those of all are gathered."""
        return self.tensor_rank == self.context_rank == self.pipeline_rank == 0

    def reseed(self, step: int) -> None:
        """Seed the random states of a step by the seed and the step alone, so that a resumed run draws the same."""
        # A million apart: neighbouring seeds share no state before that many steps.
        seed = (self.seed * 1_000_003 + step) % 2**31
        torch.manual_seed(seed)
        _seed(seed)

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        dist.barrier()

    def on_main[T](self, work: Callable[[], T]) -> T:
        """Do work on the main rank and return its result on all; its UserError is raised on all."""
        outcome: list[Any] = [None, ()]
        if self.is_main:
            try:
                outcome[0] = work()
            except UserError as error:
                outcome[1] = error.args
        dist.broadcast_object_list(outcome)
        if outcome[1]:
            raise UserError(*outcome[1])
        result: T = outcome[0]
        return result

    def sum_over_data(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` (any shape, on this rank's device) over the copies of the model, in place."""
        dist.all_reduce(values, group=self.groups.dp)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is set on any rank; all ranks call it, and wait for the device."""
        if self.world_size == 1:
            return flag
        highest = torch.tensor(int(flag), dtype=torch.int32, device=self.device)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return bool(highest)

    def sum_over_ranks(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` (any shape, on this rank's device) over all ranks, in place."""
        dist.all_reduce(values)
        return values

    def sum_over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """Sum `values` (any shape) over the copies of the model and the ranks that share a sequence, in place."""
        dist.all_reduce(values, group=self.groups.dp_cp)
        return values

    def from_last_stage(self, values: torch.Tensor) -> torch.Tensor:
        """Replace `values` (any shape) by those of the last pipeline stage, in place."""
        if self.config.pipeline > 1:
            group = self.groups.pp
            # broadcast counts ranks over the whole world, not in the group.
            last = dist.get_global_rank(group, self.config.pipeline - 1)
            dist.broadcast(values, src=last, group=group)
        return values

    def gather_over_data(self, item: object) -> list[Any]:
        """Return the `item` of each copy of the model, in the order of the copies, on all ranks; it is pickled."""
        gathered: list[Any] = [None] * self.data_size
        dist.all_gather_object(gathered, item, group=self.groups.dp)
        return gathered


def choose_device(name: str) -> torch.device:
    """Return the device of this rank for `run.device`: `cpu`, `cuda`, or `auto` (cuda where a GPU is visible).

    Raises UserError if a GPU is asked for and none is there.
    """
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError(
            "run.device=cuda, but no GPU is visible: use run.device=cpu or check the driver"
        )
    if name == "cpu" or not available:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    visible = torch.cuda.device_count()
    # A SLURM task for each rank may see its own GPU alone; with torchrun as the one task of a node all ranks are number 0.
    if visible == 1 and os.environ.get("SLURM_LOCALID") == str(local_rank):
        return torch.device("cuda", 0)
    if local_rank >= visible:
        raise UserError(
            f"{visible} GPUs are visible, but rank {local_rank} of this machine needs its own:"
            " lower --nproc-per-node"
        )
    return torch.device("cuda", local_rank)


def set_threads(threads: int) -> None:
    """Set the CPU threads of this rank: `threads`, or for 0 the cores divided by the ranks of this machine."""
    torch.set_num_threads(threads or max(1, cores_of_rank()))


def be_deterministic() -> None:
    """Let torch use only kernels whose sums have a fixed order: the same run twice gives the same bits."""
    # cuBLAS keeps an order only with workspaces of a fixed size: 8 of 4 MiB.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False


def prepare(device: torch.device) -> None:
    """Put the stand-in for torch.cuda in place on a CPU; where Megatron-core is not imported yet, it is without its compiler."""
    if device.type == "cpu":
        from visionloom.parallel import stand_in

        stand_in.install(device)


def start(
    config: ParallelConfig, device: torch.device, seed: int = 1234, timeout_minutes: int = 30
) -> Topology:
    """Open the process groups of a layout; the world comes from torchrun's environment, or is one process without it.

    Args:
        config: degrees of the axes.
        device: of this rank; on a CPU the stand-in for torch.cuda is put in place.
        seed: of Megatron-core's random states, alike or different over the ranks as each axis needs it.
        timeout_minutes: longest wait in a collective.
    """
    prepare(device)
    if device.type != "cpu":
        torch.cuda.set_device(device)
    timeout = timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        _open_world(device, timeout)
    return _open_layout(config, device, seed, timeout)


def imagine(
    config: ParallelConfig, world_size: int, rank: int, device: torch.device | None = None
) -> Topology:
    """Return the layout as one rank of a job would see it, without the others: for tests and forecasts.

    Collectives do nothing. One process can imagine one world at a time; `stop` ends it.

    Args:
        config: degrees of the axes.
        world_size: ranks of the job.
        rank: which of them.
        device: of the rank: the CPU (None), or `meta`, where tensors take no memory; CUDA where a test's tensors are fake.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from visionloom.parallel import stand_in

    device = device or torch.device("cpu")
    stand_in.install(device)
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    return _open_layout(config, device, 0, Topology.timeout)


def change(topology: Topology, config: ParallelConfig, seed: int) -> Topology:
    """Return another layout on the same ranks, as a new phase may ask for; nothing built on the old one may be used after."""
    if config == topology.config:
        return topology
    close_layout(topology)
    return _open_layout(config, topology.device, seed, topology.timeout)


def open_beside(topology: Topology, config: ParallelConfig) -> Topology:
    """Open a second layout on the same ranks and leave the first as it is; work in the second by `entered`."""
    before = _megatron_globals()
    try:
        return _open_layout(config, topology.device, topology.seed, topology.timeout)
    finally:
        _set_megatron_globals(before)
        # Random states are one set for the process, and those of a rank of the first layout.
        _seed(topology.seed)


class OneRank:
    """A process group of this rank alone, for axes that have no collective."""

    def size(self) -> int:
        """Return 1."""
        return 1

    def rank(self) -> int:
        """Return 0."""
        return 0


def with_whole_sequences(topology: Topology) -> Topology:
    """Return a layout in which the ranks of the context axis share no sequence: each is a data rank with packs of its own.

    Generation has it: one new token cannot be cut, and context ranks have the same weights.
    """
    size = topology.context_size
    if size == 1:
        return topology
    groups = shallow_copy(topology.groups)
    groups.dp, groups.tp_cp, groups.cp = groups.dp_cp, groups.tp, OneRank()
    config = replace(topology.config, context=1)
    return replace(topology, config=config, groups=groups, pack_hosts=None, separate_contexts=size)


def close_layout(topology: Topology) -> None:
    """Close the process groups of a layout: NCCL's hold memory of the device until then."""
    opened: dict[str, Any] = {}
    # Megatron-core has all of them as globals, several of some, in an order that is the same on all ranks.
    for value in [*topology.megatron_globals.values(), topology.pack_hosts]:
        for group in value if isinstance(value, list) else [value]:
            if isinstance(group, dist.ProcessGroup) and group is not dist.group.WORLD:
                opened[group.group_name] = group
    for group in opened.values():
        dist.destroy_process_group(group)


def _open_world(device: torch.device, timeout: timedelta) -> None:
    """Open the process group of all ranks; one process without torchrun needs no port for it."""
    backend = "gloo" if device.type == "cpu" else "nccl"
    # Named, so that NCCL connects now and not at the first collective, and never guesses the device.
    bound = device if device.type == "cuda" else None
    options: dict[str, Any] = {"timeout": timeout, "device_id": bound}
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        store, rank, size = meet(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, **options)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, **options)


def _open_layout(
    config: ParallelConfig, device: torch.device, seed: int, timeout: timedelta
) -> Topology:
    """Open the groups of a layout on the open world; Megatron-core keeps them as globals too, those before are closed."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    world_size = dist.get_world_size()
    if problems := config.all_problems(world_size):
        raise UserError("; ".join(problems))
    # A phase may change the layout; Megatron-core refuses to open groups twice.
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor,
        pipeline_model_parallel_size=config.pipeline,
        # One chunk a stage is no interleaving, which Megatron-core would take it for.
        virtual_pipeline_model_parallel_size=config.chunks if config.chunks > 1 else None,
        context_parallel_size=config.context,
        expert_model_parallel_size=config.expert,
        expert_tensor_parallel_size=config.expert_tensor or 1,
        # They would be three full meshes of sockets, and nothing here uses them.
        create_gloo_process_groups=False,
        distributed_timeout_minutes=timeout / timedelta(minutes=1),
    )
    _seed(seed)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return Topology(
        config,
        device,
        dist.get_rank(),
        world_size,
        groups,
        seed,
        timeout,
        pack_hosts=_pack_hosts(config, groups, timeout),
        megatron_globals=_megatron_globals(),
    )


def _seed(seed: int) -> None:
    """Seed Megatron-core's random states, alike or different over the ranks of its layout as each axis needs it."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def _megatron_globals() -> dict[str, Any]:
    """Return the groups, ranks and sizes of Megatron-core's one layout, by their names in its module."""
    from megatron.core import parallel_state

    return {name: value for name, value in vars(parallel_state).items() if GLOBAL.fullmatch(name)}


def _set_megatron_globals(values: Mapping[str, Any]) -> None:
    """Put back what `_megatron_globals` has returned."""
    from megatron.core import parallel_state

    vars(parallel_state).update(values)


def _pack_hosts(config: ParallelConfig, groups: Any, timeout: timedelta) -> Any:
    """Open the gloo groups of the ranks with the same packs, one for each copy of the model; return this rank's."""
    if config.model_parallel_size == 1 or dist.get_backend() == "fake":
        return None
    # Every rank must open every group, in one order: so all learn who holds which copy.
    copies = [0] * dist.get_world_size()
    dist.all_gather_object(copies, groups.dp.rank())
    members: dict[int, list[int]] = {}
    for rank, copy in enumerate(copies):
        members.setdefault(copy, []).append(rank)
    group, _ = dist.new_subgroups_by_enumeration(
        list(members.values()), timeout=timeout, backend="gloo"
    )
    return group


def stop() -> None:
    """Close all process groups."""
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
