"""The pass of a teacher over the data of a phase that stores its most probable next tokens; launch/teacher.py."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import batched, zip_longest
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.data.encode.encode import EncodedSample
from visionloom.data.plan.deal import PlannedPack, deal
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.teacher_store import StoredRows, StoreFacts
from visionloom.data.stream.teacher_write import (
    Named,
    ShardWriter,
    StoreUnit,
    StoreWriter,
    units_of,
)
from visionloom.data.stream.train_stream import PackStream
from visionloom.model.distillation import TopKTeacher, top_k
from visionloom.model.loss import BLOCK_BYTES, blocks_of
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel import topology as topologies
from visionloom.parallel.schedule import run_schedule, whole_rounds
from visionloom.parallel.topology import Topology
from visionloom.train.build import (
    build_stream,
    first_weights,
    load_whole,
    open_topology,
    phase_topology,
    run_folder,
)
from visionloom.train.config import RunConfig
from visionloom.train.distillation.options import StoreOptions
from visionloom.train.distillation.teacher import without_loss
from visionloom.train.observe.screen import Screen
from visionloom.train.step import agree_on_unreadable

BATCHES: Final = 8
"""Packs in host memory at once."""
DTYPES: Final = {"fp16": np.float16, "fp32": np.float32}
NOTHING: Final = TopKTeacher(
    torch.empty(0, 1, dtype=torch.int32), torch.empty(0, 1), torch.empty(0)
)
"""Of a batch without a supervised token on this rank."""
GivenRows = tuple[Tensor, TopKTeacher]
"""Supervised tokens of a batch that are this context rank's, int64 [R], and what the teacher says there; on the host."""


def store_teacher(config: RunConfig, options: StoreOptions) -> None:
    """Go through all samples of a phase once and write the store; what an earlier start has written stays.

    Raises:
        UserError: for anything that the user can mend.
    """
    topology = phase_topology(config, options.phase, open_topology(config))
    screen = Screen(topology.is_main, config.logging.every_steps)
    stream = build_stream(config, options.phase, run_folder(config), topology)
    writer = StoreWriter(Path(options.out), facts_of(config, options, stream))
    if topology.on_main(writer.is_complete):
        screen.say(f"{options.out} is complete already")
        topologies.stop()
        return
    topology.on_main(writer.begin)

    units: list[StoreUnit] = []
    for dataset in stream.datasets:
        units += units_of(dataset.name, len(dataset.shards))
    left = [unit for unit in units if not writer.is_done(unit)]
    topology.barrier()
    if left:
        parts = teacher_parts(config, options, topology)
        storing = StoringPass(stream, parts, topology, options)
        for number, unit in enumerate(left, start=1):
            place = f"unit {number} of {len(left)}"
            screen.say(f"{place}: {unit.name}, {len(unit.samples)} samples")
            storing.write(unit, writer)
    if topology.is_main:
        facts = writer.finish(units)
        screen.say(f"{options.out}: {len(facts.shards)} shards, {options.kept} tokens a row")
    topology.barrier()
    topologies.stop()


def facts_of(config: RunConfig, options: StoreOptions, stream: PackStream) -> StoreFacts:
    """Return what a store will say of itself."""
    contents = {dataset.name: dataset.shards.fingerprint[:16] for dataset in stream.datasets}
    weights = options.checkpoint or config.init.checkpoint or config.init.huggingface
    return StoreFacts(
        version=1,
        kept=options.kept,
        temperature=options.temperature,
        dtype=options.dtype,
        vocabulary=config.model.text.vocab_size,
        tokenizer=stream.tokenizer.fingerprint,
        # For people only: the weights may have moved when a student learns from them.
        weights=str(Path(weights).absolute()),
        datasets=contents,
    )


def teacher_parts(config: RunConfig, options: StoreOptions, topology: Topology) -> list[Qwen3VL]:
    """Build the teacher with the weights of checkpoint=, or with those that the run begins with."""
    if not options.checkpoint:
        return first_weights(config, topology)
    folder, precision = Path(options.checkpoint), config.run.precision
    return load_whole(config.model, precision, folder, "checkpoint", topology)


@dataclass
class StoringPass:
    """A teacher on its way through the data."""

    stream: PackStream
    parts: list[Qwen3VL]
    topology: Topology
    options: StoreOptions
    said: list[GivenRows] = field(default_factory=list)
    """Of the batches of a run of the schedule, on ranks of the last stage."""

    def write(self, unit: StoreUnit, writer: StoreWriter) -> None:
        """Write a unit: each copy of the teacher a shard of it."""
        topology, names = self.topology, [dataset.name for dataset in self.stream.datasets]
        number = names.index(unit.dataset)
        packs = self.stream.packs_in_order(number, unit.samples, topology.data_size)
        mine = deal(packs, topology.data_size, 1)[topology.data_rank] if packs else []
        ready = self._rows_of([pack for (pack,) in mine])
        if topology.is_data_leader:
            with writer.shard(unit, topology.data_rank) as shard:
                for pack, batch, rows in ready:
                    self._put(pack, batch, rows, shard)
        else:
            # The others take part in its collectives.
            for _ in ready:
                pass
        # Every copy's shard is there before the unit is marked.
        topology.barrier()
        if topology.is_main:
            writer.mark_done(unit, topology.data_size)
        topology.barrier()

    def _rows_of(
        self, packs: Sequence[PlannedPack]
    ) -> Iterator[tuple[PlannedPack, PackedBatch, GivenRows]]:
        """Yield each pack with its batch and what the teacher says in it."""
        for some in batched(packs, BATCHES):
            read = [self.stream.batch_of(pack, self.topology.share) for pack in some]
            batches = agree_on_unreadable(read, self.topology)
            self._run(batches)
            # Of stages before the last nothing is said.
            for pack, batch, own in zip_longest(some, batches, self.said):
                yield pack, batch, self._gathered(own)

    def _run(self, batches: list[PackedBatch]) -> None:
        """Let the teacher speak about some batches, on ranks of the last stage."""
        self.said.clear()
        rounds = whole_rounds(batches, self.topology)
        with torch.no_grad():
            run_schedule(self._forward, self.parts, rounds, self.topology, forward_only=True)
        # Copies that fill up a round come last, and nobody asks for them.
        del self.said[len(batches) :]

    def _forward(self, batches: Iterator[PackedBatch], part: Qwen3VL) -> tuple[Tensor, Any]:
        """Run a part of the teacher over the next batch, as Megatron-core's schedule calls it."""
        inputs = part.prepare(next(batches))
        states = part.supervised_states(inputs)
        if not part.post_process:
            return states, None
        self.said.append((inputs.loss_tokens, self._most_probable(part, states)))
        return without_loss(states)

    def _most_probable(self, part: Qwen3VL, states: Tensor) -> TopKTeacher:
        """Return the most probable tokens after the hidden states [R, H], on the host."""
        options, weight = self.options, part.language_model.output_matrix()
        # Logits in fp32, and as much again while they are sorted.
        blocks = blocks_of(len(states), weight.shape[0] * 12, BLOCK_BYTES)
        group = self.topology.groups.tp
        # Of no row too: a rank may have no supervised token of a batch.
        parts = [NOTHING]
        for rows in blocks:
            block = top_k(states[rows], weight, options.kept, options.temperature, group)
            kept, rest = block.log_probabilities.cpu(), block.log_rest.cpu()
            parts.append(TopKTeacher(block.ids.cpu(), kept, rest))
        return TopKTeacher.joined(parts[1:] or parts)

    def _gathered(self, own: GivenRows | None) -> GivenRows:
        """Return what all context ranks of the last stage have of a batch, by token, on all ranks that share it."""
        topology = self.topology
        if topology.pack_hosts is None:
            assert own is not None
            return own
        # The tensor ranks have the same: one of them speaks.
        given = own if topology.tensor_rank == 0 else None
        parts: list[GivenRows | None] = [None] * dist.get_world_size(topology.pack_hosts)
        dist.all_gather_object(parts, given, group=topology.pack_hosts)
        there = [part for part in parts if part is not None]
        tokens, order = torch.cat([own_tokens for own_tokens, _ in there]).sort()
        # Without those that have none: their rows have no width.
        rows = [said for own_tokens, said in there if len(own_tokens)]
        return tokens, TopKTeacher.joined(rows).at(order) if rows else NOTHING

    def _put(
        self, pack: PlannedPack, batch: PackedBatch, said: GivenRows, shard: ShardWriter
    ) -> None:
        """Write the rows of the samples of a pack."""
        (samples,) = self.stream.samples_of([pack])
        tokens, teacher = said
        ends = batch.cu_seqlens[1:][batch.segment_datasets >= 0]
        borders = [0, *torch.searchsorted(tokens, ends).tolist()]
        for place, sample, start, end in zip(
            pack.places, samples, borders[:-1], borders[1:], strict=True
        ):
            self._put_sample(place, sample, teacher.at(slice(start, end)), shard)

    def _put_sample(
        self, place: tuple[int, int, int], sample: EncodedSample, said: TopKTeacher, shard: Any
    ) -> None:
        dataset, index, part_number = place
        location = self.stream.datasets[dataset].shards.location(index)
        rows = None
        if len(said.ids):
            # Of fp16 at -1 the next number is 0.001 away, a thousandth of the probability.
            kept = said.log_probabilities.numpy().astype(DTYPES[self.options.dtype])
            rows = StoredRows(said.ids.numpy(), kept, said.log_rest.numpy())
        shard.put(Named(sample, location, part_number), rows)
