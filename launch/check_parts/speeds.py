"""Measure what a machine's file of recipes/gpu assumes: products, copies, attention, launches, an all-reduce.

A speed is that of the median of several runs. On a CPU sizes are small, and nothing is assumed.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.forecast.machine import Machine
from visionloom.forecast.trace.operations import backward_attention, forward_attention
from visionloom.launch.check_parts.results import MeasuredSpeed
from visionloom.model.kernels.attention import BACKWARD, FORWARD, Segments
from visionloom.parallel.topology import Topology

RUNS: Final = 7
UNCOUNTED: Final = 2
PRODUCTS: Final = ((6144, 4096), (4096, 4096), (24576, 4096), (4096, 12288))
"""Widths of output and input of the linear layers of a decoder layer of 8B: queries with keys and values, output, gate with up, down."""
TOKENS: Final = {"cuda": 8192, "cpu": 64}
COPIED: Final = {"cuda": 1 << 29, "cpu": 1 << 25}
"""Bytes of the tensor that is copied."""
REDUCED: Final = {"cuda": 1 << 28, "cpu": 1 << 22}
SEGMENTS: Final = (1, 12, 30)
"""Of 8,192 tokens: one long sample, and the numbers of samples in packs of chats and of captions."""
LAUNCHES: Final = 500
PROBED: Final = 1 << 20
"""Bytes of the first all-reduce, by whose time the size of the others is chosen."""
SECONDS_OF_REDUCTION: Final = 0.25
LONGEST_REDUCTION: Final = 15.0
"""Seconds, after which a rank is taken not to answer."""


@dataclass(frozen=True)
class Speeds:
    """What is measured on one rank."""

    topology: Topology
    machine: Machine | None
    """What plans assume; None: of no such card."""

    @property
    def kind(self) -> str:
        """Return the kind of device."""
        return self.topology.device.type

    def measure(self) -> Iterator[MeasuredSpeed]:
        """Yield the speeds of this rank's device."""
        yield from self.products()
        yield from self.attention()
        yield self.copy()
        if self.kind == "cuda":
            yield from self.pinned()
            yield self.launch()

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the median time of a function, the device's work included."""
        times = []
        for _ in range(UNCOUNTED + RUNS):
            begun = time.perf_counter()
            function()
            if self.kind == "cuda":
                torch.cuda.synchronize(self.topology.device)
            times.append(time.perf_counter() - begun)
        return statistics.median(times[UNCOUNTED:])

    def random(self, *shape: int) -> Tensor:
        """Return random numbers in the dtype of training: equal ones would make a GPU faster than it is."""
        dtype = torch.bfloat16 if self.kind == "cuda" else torch.float32
        return torch.randn(shape, device=self.topology.device, dtype=dtype)

    def products(self) -> Iterator[MeasuredSpeed]:
        """Yield products of the sizes of 8B, of one of them on a CPU."""
        tokens = TOKENS[self.kind]
        for outputs, inputs in PRODUCTS if self.kind == "cuda" else PRODUCTS[1:2]:
            x, weight = self.random(tokens, inputs), self.random(outputs, inputs)
            operations = 2.0 * tokens * inputs * outputs
            value = operations / self.seconds(partial(torch.mm, x, weight.t()))
            assumed = None
            if (card := self.machine) is not None:
                taken = operations / (card.peak * card.product_share) + card.product_start
                assumed = operations / taken / 1e12
            name = f"product {tokens} x {inputs} x {outputs}"
            yield MeasuredSpeed(name, value / 1e12, "TFLOP/s", assumed, "product_share")

    def attention(self) -> Iterator[MeasuredSpeed]:
        """Yield causal attention of heads as 8B has them, by the operations that a GPU's kernels execute."""
        tokens = TOKENS[self.kind]
        heads = [self.random(tokens, number, 128) for number in (32, 8, 8)]
        for number in SEGMENTS:
            bounds = torch.linspace(0, tokens, number + 1).int()
            segments = Segments.build(bounds, self.topology.device)
            inputs = *heads, *segments.arguments, True, 128**-0.5
            results = FORWARD(*inputs)
            saved = torch.randn_like(heads[0]), *heads, *results, *inputs[len(heads) :]

            counted = forward_attention(inputs), backward_attention(saved)
            calls = (FORWARD, inputs), (BACKWARD, saved)
            for way, operations, call in zip(("forward", "backward"), counted, calls, strict=True):
                needed, executed = operations
                # The CPU's kernel has no tiles of that size.
                work = executed if self.kind == "cuda" else needed
                function, arguments = call
                taken = self.seconds(partial(function, *arguments))
                name = f"attention of {tokens} tokens in {number} segments, {way}"
                option = f"attention_{way}_share"
                assumed = None
                if self.machine is not None:
                    assumed = self.machine.peak * getattr(self.machine, option) / 1e12
                yield MeasuredSpeed(name, work / taken / 1e12, "TFLOP/s", assumed, option)

    def copy(self) -> MeasuredSpeed:
        """Return the bandwidth of the device's memory: each byte of a copy is read and written."""
        size, card = COPIED[self.kind], self.machine
        source = torch.zeros(size, dtype=torch.uint8, device=self.topology.device)
        target = torch.empty_like(source)
        speed = 2 * size / self.seconds(lambda: target.copy_(source)) / 1e9
        assumed = card.memory_gbps * card.memory_share if card else None
        return MeasuredSpeed("copy on the device", speed, "GB/s", assumed, "memory_share")

    def pinned(self) -> Iterator[MeasuredSpeed]:
        """Yield the bandwidth between pinned memory of the host and the device."""
        size, card = COPIED[self.kind] // 2, self.machine
        host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(size, dtype=torch.uint8, device=self.topology.device)
        assumed = card.host_gbps if card else None
        for name, target, source in (("host to GPU", there, host), ("GPU to host", host, there)):
            taken = self.seconds(partial(target.copy_, source))
            yield MeasuredSpeed(
                f"pinned copy, {name}", size / taken / 1e9, "GB/s", assumed, "host_gbps"
            )

    def launch(self) -> MeasuredSpeed:
        """Return the time of a small kernel among many, which is the host's for launching it."""
        one = torch.zeros(1, device=self.topology.device)

        def many() -> None:
            for _ in range(LAUNCHES):
                one.add_(1.0)

        microseconds = self.seconds(many) / LAUNCHES * 1e6
        assumed = self.machine.launch * 1e6 if self.machine else None
        return MeasuredSpeed(
            "small kernel, one after the other", microseconds, "µs", assumed, "launch"
        )

    def all_reduce(self, group: Any = None, option: str = "") -> MeasuredSpeed:
        """Return the bus bandwidth of an all-reduce over the ranks of a group, which all call.

        Args:
            group: None: all ranks.
            option: the key of the machine's file for these links; empty: by the number of ranks.

        Raises:
            TimeoutError: if it takes longer than LONGEST_REDUCTION.
        """
        size, ranks = self.reducible(group), dist.get_world_size(group)
        values = torch.zeros(size // 2, dtype=torch.bfloat16, device=self.topology.device)
        taken = self.seconds(lambda: finish(dist.all_reduce(values, group=group, async_op=True)))
        # A ring sends each byte twice, but for a share of the ranks': nccl-tests' definition.
        speed = 2e-9 * size / taken * (ranks - 1) / ranks
        option = option or self.links_of(ranks)
        name = f"all-reduce of {size >> 20} MiB over {ranks} ranks"
        return MeasuredSpeed(name, speed, "GB/s", getattr(self.machine, option, None), option)

    def links_of(self, ranks: int) -> str:
        """Return the key of the machine's file for the links of so many ranks: those of one machine have another."""
        inside = self.machine is not None and ranks <= self.machine.node_ranks
        return "inside_gbps" if inside else "between_gbps"

    def reducible(self, group: Any) -> int:
        """Return the bytes of an all-reduce that takes no longer than SECONDS_OF_REDUCTION, the same on all ranks."""
        probe = torch.zeros(PROBED // 4, device=self.topology.device)
        # The first ones open connections.
        taken = self.seconds(lambda: finish(dist.all_reduce(probe, group=group, async_op=True)))
        probe.fill_(taken)
        # Each rank has a time of its own, and a collective one size.
        finish(dist.all_reduce(probe, op=dist.ReduceOp.MAX, group=group, async_op=True))
        possible = int(PROBED * SECONDS_OF_REDUCTION / probe[0].item())
        size = 1 << possible.bit_length() - 1
        return min(REDUCED[self.kind], max(PROBED, size))


def finish(work: Any) -> None:
    """Wait for a collective that has begun; TimeoutError after LONGEST_REDUCTION."""
    until = time.monotonic() + LONGEST_REDUCTION
    while not work.is_completed():
        if time.monotonic() > until:
            raise TimeoutError(f"a collective has not ended within {LONGEST_REDUCTION:.0f} s")
        # The pause is 4 % of the fastest one: 256 MiB at 363 GB/s take 1.3 ms.
        time.sleep(5e-5)
    work.wait()
