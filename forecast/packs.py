"""The packs of an imagined step: of the phase's own plan where its shards and length tables are there, else of a mixture.

A micro-batch is chosen among those of the first steps, dealt as a run deals them: one of mean work for times, the fullest for memory. Its
samples are laid out, and its pictures dealt to encoder ranks, by the stream's own `pack`; only nothing is decoded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionloom.data.config import DataConfig
from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.patches import Unit
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.dataset_with_lengths import cache_folder
from visionloom.data.plan.deal import PlannedPack, deal, deal_units
from visionloom.data.plan.lengths import kept_lengths
from visionloom.data.plan.open import StreamOptions, dataset_weights
from visionloom.data.plan.plan import Plan
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.open_store import is_url
from visionloom.data.stream.batch import (
    PackedBatch,
    PackLayout,
    TeacherRows,
    all_grids,
    pack,
)
from visionloom.data.stream.teacher_store import read_facts
from visionloom.data.stream.train_stream import PackStream
from visionloom.forecast.mixture_stream import MixtureStream
from visionloom.model.distillation_config import DistillationConfig
from visionloom.parallel.share import Share
from visionloom.train.config import RunConfig
from visionloom.train.distillation.options import KEPT
from visionloom.train.step_sums import StepCounts
from visionloom.train.stream_options import stream_options

PACKS: Final = 512
"""Packs, of whole steps, among which one is chosen: about a block of a plan, which takes some 30 ms to make."""


class PackChoice(StrEnum):
    """Which micro-batch of the first steps stands for all."""

    MEAN = "mean"
    """That whose work is nearest the mean: for the time of a step."""
    PATCHES = "one with most patches"
    """For the memory of the first stage."""
    SUPERVISED = "one with most supervised tokens"
    """For the memory of the last stage, which holds their logits."""


class PackSource(Protocol):
    """A plan, and the samples of its packs."""

    plan: Plan
    layout: PackLayout

    def samples_of(self, packs: Sequence[PlannedPack]) -> list[list[EncodedSample]]:
        """Return the samples of packs of the plan, without their pictures."""


@dataclass(frozen=True)
class ImaginedPacks:
    """The packs of one micro-batch, before pictures are dealt to encoder ranks."""

    packs: list[list[EncodedSample]]
    layout: PackLayout
    assumed: str
    """Where they come from and what they hold, in words."""

    @classmethod
    def of(
        cls, packs: list[list[EncodedSample]], layout: PackLayout, origin: str
    ) -> "ImaginedPacks":
        """Return them with what they hold added to the words about their origin."""
        counts = cls(packs, layout, origin).counts
        held = (
            f"{counts.tokens:,} real tokens in {counts.packs} x {layout.sequence_length:,},"
            f" {counts.visual_tokens / max(1, counts.tokens):.0%} visual,"
            f" {counts.supervised_tokens:,} supervised, {counts.samples} samples"
        )
        return cls(packs, layout, f"{origin}: {held}")

    def batch(self, share: Share) -> PackedBatch:
        """Return them as a rank of this share reads them; patches are uninitialised memory of the right shape."""
        return pack(self.packs, self.layout, self._decode_nothing, share)

    @staticmethod
    def _decode_nothing(number: int, units: Sequence[Unit], out: NDArray[np.uint8]) -> bool:
        """Leave the patches as they are; return True, as nothing is unreadable."""
        return True

    @property
    def counts(self) -> StepCounts:
        """Return how much a micro-batch trains on, as a step counts it."""
        # No encoder rank has the number -1, so that no buffer for pictures is made.
        unseen = self.batch(Share(encoder_rank=-1))
        return StepCounts.of([unseen], len(self.packs))

    def encoder_patches(self, ranks: int) -> list[int]:
        """Return the patches that each of a number of encoder ranks gets."""
        samples = [sample for one in self.packs for sample in one]
        dealt = deal_units(all_grids(samples), ranks)
        patches = dealt.units.prod(1, dtype=np.int64)
        counts: list[int] = np.bincount(dealt.owners, patches, ranks).astype(int).tolist()
        return counts


class MicroBatches:
    """The micro-batches of the first steps of a plan, of all data-parallel ranks."""

    def __init__(self, plan: Plan, steps: int, ranks: int, micro_batch: int) -> None:
        self._plan = plan
        self.all: list[list[PlannedPack]] = []
        for step in range(steps):
            for mine in deal(plan.step(step), ranks, micro_batch):
                self.all += mine

        self._counted = np.array([self._counts(packs) for packs in self.all])
        self._costs = plan.cost.by_count(self._counted[:, :4])

    def choose(self, choice: PackChoice) -> list[PlannedPack]:
        """Return one of them; the mean one is nearest the mean in each count that a cost is made of."""
        # Of equal cost are packs of text and packs of pictures: only all four counts together make a usual one.
        distances = np.abs(self._costs - self._costs.mean(0)).sum(1)
        scores = {
            PackChoice.MEAN: -distances,
            PackChoice.PATCHES: self._counted[:, 2],
            PackChoice.SUPERVISED: self._counted[:, 4],
        }
        return self.all[int(scores[choice].argmax())]

    @property
    def worst(self) -> float:
        """Return the work of the costliest one over the mean."""
        # In units of work: the four counts are weighed already.
        costs = self._costs.sum(1)
        return float(costs.max() / costs.mean())

    def _counts(self, packs: list[PlannedPack]) -> NDArray[np.int64]:
        """Count a micro-batch: int64 [5] tokens, token pairs, patches, patch pairs, supervised tokens."""
        counts = np.zeros(5, np.int64)
        for one in packs:
            for number, sample, part_number in one.places:
                part = self._plan.entries[number].parts.part(sample, part_number)
                pairs = part.tokens**2
                counts += (part.tokens, pairs, part.patches, part.patch_pairs, part.supervised)
        return counts


def packs_for(
    config: RunConfig, phase: str, world_size: int, choices: Sequence[PackChoice]
) -> dict[PackChoice, ImaginedPacks]:
    """Choose the micro-batches that stand for all those of a phase.

    Raises:
        UserError: for what its datasets would be refused for, and for packs too short for any sample of a mixture.
    """
    settings = config.phases[phase]
    layout = settings.parallel or config.parallel
    # The store of a teacher need not be there: only the shapes of its rows count.
    source, name = open_source(replace(stream_options(config, phase), teacher=""))
    steps = min(settings.total_steps, max(1, PACKS // settings.global_batch))
    ranks = layout.data_parallel_size(world_size)
    micro_batches = MicroBatches(source.plan, steps, ranks, settings.micro_batch)

    number, worst = len(micro_batches.all), micro_batches.worst
    chosen = {}
    for choice in choices:
        samples = source.samples_of(micro_batches.choose(choice))
        origin = (
            f"the {choice} of the first {number:,} micro-batches of {name},"
            f" the costliest of which has {worst:.2f} times the mean work"
        )
        chosen[choice] = ImaginedPacks.of(samples, source.layout, origin)
    return chosen


def open_source(options: StreamOptions) -> tuple[PackSource, str]:
    """Return the stream of a phase, of a mixture where its own lengths are not there, and its name."""
    if lacking := missing_lengths(options):
        return MixtureStream(options), f"a stated mixture ({lacking})"
    return PackStream(options), "the phase's own plan"


def missing_lengths(options: StreamOptions) -> str:
    """Return what a plan from the phase's own data lacks, in words; empty if its lengths are all there.

    Nothing is counted or fetched for a forecast: that may take hours.
    """
    data = options.data
    if not data.datasets:
        return "data.datasets is empty"
    if not Path(data.tokenizer).is_dir():
        return f"no folder data.tokenizer={data.tokenizer}"
    tokenizer = Tokenizer.of(data)
    for name in dataset_weights(data, options.mixture):
        if lacking := dataset_lacks(data, name, tokenizer):
            return lacking
    return ""


def dataset_lacks(data: DataConfig, name: str, tokenizer: Tokenizer) -> str:
    """Return what one dataset lacks, in words."""
    path = data.datasets[name].path
    option = f"data.datasets.{name}.path={path}"
    if is_url(path):
        return f"{option} is remote"
    if not Path(path).is_dir():
        return f"no folder {option}"
    dataset = Dataset.open(path, name, "data.datasets", data.store)
    if kept_lengths(dataset, tokenizer, data.media, cache_folder(data, path)) is None:
        return f"{option} has no lengths yet: run data.py lengths"
    return ""


def with_stored_teacher(batch: PackedBatch, options: DistillationConfig) -> PackedBatch:
    """Return a batch with the rows of a stored teacher, as many tokens in each as its store keeps; they have no content."""
    store = Path(options.stored)
    kept = read_facts(store, "distillation.stored").kept if store.is_dir() else KEPT
    tokens = (batch.loss_weights > 0).nonzero()[:, 0]
    count = len(tokens)
    ids, log_probabilities = torch.zeros(count, kept, dtype=torch.int32), torch.zeros(count, kept)
    teacher = TeacherRows(tokens, ids, log_probabilities.half(), torch.zeros(count))
    return replace(batch, teacher=teacher)


def with_content(batch: PackedBatch, vocabulary: int, seed: int) -> PackedBatch:
    """Return a batch with random tokens, labels and pixels, to be run on a device: equal tokens would be one row of the embedding."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(like: Tensor) -> Tensor:
        return torch.randint(0, vocabulary, like.shape, generator=draw)

    labels = torch.where(batch.loss_weights > 0, tokens(batch.labels), batch.labels)
    patches = torch.randint(0, 256, batch.patches.shape, generator=draw, dtype=torch.uint8)
    return replace(batch, input_ids=tokens(batch.input_ids), labels=labels, patches=patches)
