"""The training stream: the plan of a phase, turned into PackedBatches step by step."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from visionloom.common.errors import UserError
from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.cursor import Origin, changes, check_state
from visionloom.data.plan.deal import PlannedPack, deal
from visionloom.data.plan.open import StreamOptions, dataset_weights, open_datasets, open_plan
from visionloom.data.plan.passed_over import joined_ranges, step_of_plan
from visionloom.data.stream.batch import PackedBatch, PackLayout
from visionloom.data.stream.in_order import pack_in_order
from visionloom.data.stream.quarantine import Quarantine
from visionloom.data.stream.reader import Reader
from visionloom.data.stream.teacher_store import TeacherStore
from visionloom.parallel.share import Share


class PackStream:
    """The training data of one phase: a pure function of its options and of the datasets' lengths.

    Args:
        options: of the phase.
        quarantine: file for unreadable samples; None: they are counted only.
        origin: where the draws begin; None: at the beginning.

    Raises:
        UserError: for missing folders, unknown names, and samples longer than a pack, by their dataset's policy.
    """

    def __init__(
        self,
        options: StreamOptions,
        quarantine: Path | None = None,
        origin: Origin | None = None,
    ) -> None:
        self.options, self._quarantine = options, quarantine
        data = options.data
        self.tokenizer = Tokenizer.of(data)
        # the order of the mixture: numbers of datasets in a plan are places in it
        names = list(dataset_weights(data, options.mixture))
        self.datasets = open_datasets(data, names, self.tokenizer)
        self.plan = open_plan(options, self.datasets, origin)
        self._reader = Reader(
            self.datasets,
            [entry.parts for entry in self.plan.entries],
            data,
            self.tokenizer,
            Quarantine(quarantine, data.max_bad_fraction),
            _open_teacher(options),
        )
        self.passed_over: list[tuple[int, int]] = []
        """Ranges of the plan's steps that no step trains."""
        self.layout = PackLayout.of(options, tuple(names), self.tokenizer.pad_id)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle what the stream is made from: a worker opens the datasets anew and maps the same tables."""
        return PackStream._restore, (
            self.options,
            self._quarantine,
            self.plan.origin,
            self.plan.known_starts,
            self.passed_over,
        )

    @classmethod
    def _restore(
        cls,
        options: StreamOptions,
        quarantine: Path | None,
        origin: Origin,
        starts: Mapping[int, int],
        passed_over: list[tuple[int, int]],
    ) -> "PackStream":
        """Open a pickled stream, with the starts of blocks that its plan had met."""
        stream = cls(options, quarantine, origin)
        for block, first_pack in starts.items():
            stream.plan.jump(block, first_pack)
        stream.passed_over = passed_over
        return stream

    @property
    def dropped(self) -> dict[str, tuple[int, int]]:
        """Return, by dataset, the samples that no pack holds, and all tokens that its over-length policy leaves out."""
        parts = {entry.name: entry.parts for entry in self.plan.entries}
        return {name: (part.dropped, part.lost_tokens) for name, part in parts.items()}

    @property
    def unsupervised(self) -> dict[str, tuple[int, int]]:
        """Return, by dataset, the samples that are drawn although nothing in them has a loss, and all of its samples."""
        entries = self.plan.entries
        return {entry.name: (entry.parts.unsupervised, entry.size) for entry in entries}

    @property
    def quarantined(self) -> int:
        """Return how many unreadable samples this process met."""
        return self._reader.quarantine.unreadable

    def watch(self, note: Callable[[str], None]) -> None:
        """Call `note` with each dataset, shard and sample before it is read."""
        self._reader.note = note

    def report_unreadable(self) -> None:
        """Write the samples that could not be counted to the quarantine; for one process of the run."""
        self._reader.report_unreadable()

    def pass_over(self, steps: Iterable[tuple[int, int]]) -> None:
        """Leave out more of the plan's steps: (first, behind the last); those that are left out already may be among them."""
        self.passed_over = joined_ranges([*self.passed_over, *steps])

    def step_of_plan(self, step: int) -> int:
        """Return the plan's step that is trained as the phase's step `step`, both from 0."""
        return step_of_plan(step, self.passed_over)

    def micro_batches(self, step: int, share: Share, micro_batch: int) -> list[PackedBatch]:
        """Read what one rank trains on in a step (from 0 in the phase): its micro-batches of `micro_batch` packs.

        The packs of a step are the same for every `share.data_size`; of their pictures only those of `share.encoder_rank`
        are decoded. After them come those that it reads for `share.teacher`: the micro-batches of all data ranks, first ones first,
        are dealt in turn to the copies of the teacher.

        Raises:
            UserError: if the packs cannot be dealt evenly.
        """
        dealt = deal(self.plan.step(self.step_of_plan(step)), share.data_size, micro_batch)
        batches = self._read(dealt[share.data_rank], share, step)
        if (teacher := share.teacher) is not None:
            # first ones first, so that of ranks whose micro-batches come costliest first no copy gets all the light ones
            in_turn = list(chain.from_iterable(zip(*dealt, strict=True)))
            theirs = in_turn[teacher.data_rank :: teacher.data_size]
            batches += self._read(theirs, teacher, step)
        return batches

    def _read(
        self, micro_batches: Sequence[Sequence[PlannedPack]], share: Share, step: int
    ) -> list[PackedBatch]:
        """Read micro-batches of a step, with the pictures of this share."""
        batches = []
        for packs in micro_batches:
            places = [pack.places for pack in packs]
            batches.append(self._reader.batch(places, self.layout, share, step))
        return batches

    def samples_of(self, packs: Sequence[PlannedPack]) -> list[list[EncodedSample]]:
        """Read the samples of packs of the plan, without their pictures."""
        return [self._reader.read(pack.places) for pack in packs]

    def packs_in_order(self, number: int, samples: range, multiple: int) -> list[PlannedPack]:
        """Pack a run of a dataset's samples, in all parts that the phase uses, each once; without those that have no loss.

        Args:
            number: of the dataset.
            samples: the run.
            multiple: packs of padding are added to make up one.
        """
        rows, _ = self.plan.entries[number].parts.of(np.arange(samples.start, samples.stop))
        return pack_in_order(rows[rows["supervised"] > 0], number, self.options, multiple)

    def batch_of(self, pack: PlannedPack, share: Share) -> PackedBatch:
        """Read one pack as a batch of its own, with the pictures of this share."""
        return self._reader.batch([pack.places], self.layout, share)

    def state(self, step: int) -> dict[str, Any]:
        """Return the cursor before a step, for the checkpoint: JSON, the same on every rank and for every layout."""
        state = self.plan.state(self.step_of_plan(step))
        return state | ({"passed_over": self.passed_over} if self.passed_over else {})

    def load_state(self, state: Mapping[str, Any]) -> list[str]:
        """Continue from the cursor of a checkpoint, so that its step is planned without those before it.

        Returns:
            what changed since, where data.on_change=new_phase allows it: from the state's step on the stream is that of a
            new plan, whose draws begin after those of the old one.

        Raises:
            UserError: naming what changed, if the stream is not the one that the checkpoint was made with.
        """
        state = check_state(state)
        self.pass_over((first, end) for first, end in state.get("passed_over", ()))
        origin = Origin.of(state)
        if origin != self.plan.origin:
            self.plan = open_plan(self.options, self.datasets, origin)
        if state["plan_hash"] == self.plan.hash:
            # so that the blocks before the step need not be planned again
            self.plan.jump(int(state["block"]), int(state["first_pack"]))
            return []

        changed = self._changes_since(state)
        after = Origin.after(state, int(state["step"]))
        self.plan = open_plan(self.options, self.datasets, after)
        return changed

    def _changes_since(self, state: Mapping[str, Any]) -> list[str]:
        """Return what changed since a state; raises UserError where data.on_change=error."""
        # the hash says that something differs, the facts say what
        changed = changes(state["plan"], self.plan.facts, self.options.phase_name)
        if self.options.data.on_change == "error":
            raise UserError(
                f"the training data is not what the checkpoint was made with: {'; '.join(changed)}: restore it, go on with"
                f" data.on_change=new_phase, or set run.name to start a new run"
            )
        return changed


def _open_teacher(options: StreamOptions) -> TeacherStore | None:
    """Open the stored teacher of a phase, if it has one."""
    if not options.teacher:
        return None
    option = f"phases.{options.phase_name}.distillation.stored"
    return TeacherStore(Path(options.teacher), option)
