"""Check several ranks: each kind of collective against arithmetic, and steps in parallel layouts against one process."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.launch.check_parts.results import CheckResult, attempt
from visionloom.launch.check_parts.training import (
    LIMITS,
    STEPS,
    TinyTraining,
    reference_on_cpu,
    tiny_run,
)
from visionloom.parallel import topology as topologies
from visionloom.parallel.topology import Topology

ROWS: Final = 1024
"""Numbers that a rank sends to each other one."""


class Collectives:
    """One collective of each kind, on whole numbers that fp32 adds up exactly."""

    def __init__(self, topology: Topology) -> None:
        self.rank, self.size = topology.rank, topology.world_size
        self.device = topology.device
        self.total = self.size * (self.size + 1) // 2

    def difference(self, result: Tensor, *expected: int) -> float:
        """Return the largest difference from numbers of which each stands ROWS times."""
        right = torch.tensor(expected, dtype=torch.float32).repeat_interleave(ROWS)
        return float((result.cpu() - right).abs().max())

    def own(self, copies: int = 1) -> Tensor:
        """Return this rank's number, counted from one, ROWS times for each copy."""
        return torch.full((copies * ROWS,), self.rank + 1.0, device=self.device)

    def all_reduce(self) -> float:
        """Add up over all ranks."""
        values = self.own()
        dist.all_reduce(values)
        return self.difference(values, self.total)

    def broadcast(self) -> float:
        """Send from the last rank to all."""
        values = self.own()
        dist.broadcast(values, src=self.size - 1)
        return self.difference(values, self.size)

    def all_gather(self) -> float:
        """Gather from all ranks on all."""
        gathered = self.own(self.size)
        dist.all_gather_into_tensor(gathered, self.own())
        return self.difference(gathered, *range(1, self.size + 1))

    def reduce_scatter(self) -> float:
        """Add up over all ranks, each of which gets a part."""
        part = self.own()
        dist.reduce_scatter_tensor(part, self.own(self.size))
        return self.difference(part, self.total)

    def all_to_all(self) -> float:
        """Exchange a part with every rank."""
        received = self.own(self.size)
        dist.all_to_all_single(received, self.own(self.size))
        return self.difference(received, *range(1, self.size + 1))

    def messages(self) -> float:
        """Send to the next rank and receive from the one before, as pipeline stages do."""
        received = self.own()
        before, after = (self.rank - 1) % self.size, (self.rank + 1) % self.size
        operations = [
            dist.P2POp(dist.isend, self.own(), after),
            dist.P2POp(dist.irecv, received, before),
        ]
        for request in dist.batch_isend_irecv(operations):
            request.wait()
        return self.difference(received, before + 1)

    def check(self) -> Iterator[CheckResult]:
        """Yield the result of each."""
        kinds: list[Callable[[], float]] = [
            self.all_reduce,
            self.broadcast,
            self.all_gather,
            self.reduce_scatter,
            self.all_to_all,
            self.messages,
        ]
        for kind in kinds:
            yield attempt(f"{kind.__name__} over {self.size} ranks", 0.0, kind)


def check_ranks(topology: Topology) -> Iterator[CheckResult]:
    """Yield the checks of this rank together with the others; all ranks call it."""
    yield from Collectives(topology).check()

    curve: list[Any] = [reference_on_cpu().curve if topology.is_main else None]
    dist.broadcast_object_list(curve, src=0)
    size = topology.world_size
    layouts = [f"data={size}"]
    # The tiny model's two key heads are what tensor ranks can share.
    layouts += [f"tensor=2 data={size // 2}"] if size % 2 == 0 else []
    for layout in layouts:
        name = f"{STEPS} steps in fp32 over {layout} and in one process"
        tensor = 2 if "tensor" in layout else 1
        measure = functools.partial(curve_difference, tensor, curve[0], topology)
        yield attempt(name, LIMITS["fp32"][0], measure)


def curve_difference(tensor: int, expected: tuple[float, ...], topology: Topology) -> float:
    """Return the largest relative difference between the losses of a layout and those of one process."""
    words = [f"parallel.tensor={tensor}"]
    config = tiny_run("fp32", topology.device.type, topology.world_size, *words)
    layout = topologies.change(topology, config.parallel, config.run.seed)
    losses = TinyTraining.build(config, layout).steps(STEPS)
    pairs = zip(losses, expected, strict=True)
    return max(abs(loss / one - 1) for loss, one in pairs)


def gather_results(results: list[CheckResult], topology: Topology) -> list[CheckResult]:
    """Return each check with the worst result of all ranks, which is named; all ranks call it."""
    gathered: list[Any] = [None] * topology.world_size
    dist.all_gather_object(gathered, results)
    worst: dict[str, CheckResult] = {}
    for rank, own in enumerate(gathered):
        for result in own:
            before = worst.get(result.name)
            if before is None or (before.passed and not result.passed):
                named = f"{result.name}, rank {rank}" if topology.world_size > 1 else result.name
                worst[result.name] = result if result.passed else replace(result, name=named)
    return list(worst.values())
