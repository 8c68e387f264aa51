"""The stream of a phase that learns from rewards: prompts in the order of its mixture, and packs of the answers to them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from visionloom.data.encode.encode import EncodedSample, prompt_of
from visionloom.data.plan.best_fit import PackBudget
from visionloom.data.plan.deal import deal
from visionloom.data.plan.parts import Part
from visionloom.data.shards.sample import SampleError
from visionloom.data.stream.answers import Place, PromptSize, TrainedAnswer, pack_answers
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.train_stream import PackStream
from visionloom.parallel.share import Share


@dataclass(frozen=True)
class AskedPrompt:
    """A sample whose last turn, the reference, is to be answered anew."""

    size: PromptSize
    encoded: EncodedSample
    """Up to where the answer begins, with patches."""
    reference: str

    def without_patches(self) -> "AskedPrompt":
        """Return it without its pictures, which would fill the host's memory."""
        return replace(self, encoded=replace(self.encoded, patches=None))


class PromptStream(PackStream):
    """Prompts by the number of their draw, and micro-batches of what was written to them.

    What a step trains on is not planned: `set_rollout` gives it. `updates`: steps of a rollout.
    """

    updates = 1
    micro_batches_multiple = 1
    """Micro-batches of a step on a data rank come in multiples of this."""
    cursor = 0
    """The first draw that no rollout has had."""
    _first_step = 0
    _rollout: Sequence[Sequence[TrainedAnswer]] = ()

    def place(self, draw: int) -> tuple[Place, str]:
        """Return the place of the sample that a draw brings, and why it is no prompt; empty if it may be one."""
        drawn = self.plan.mixture.draws(draw, 1)
        number, sample = int(drawn.datasets[0]), int(drawn.samples[0])
        rows, _ = self.plan.entries[number].parts.of(np.array([sample]))
        if len(rows) != 1 or not Part.of(rows[0]).is_whole:
            return (number, sample, 0), "it cannot be read, or is longer than a pack"
        return (number, sample, 0), ""

    def key(self, place: Place) -> str:
        """Return the name of a sample in its dataset: shards may begin to count their keys anew."""
        location = self.datasets[place[0]].shards.location(place[1])
        return f"{location.shard}/{location.key}"

    def prompt(self, place: Place, most_tokens: int) -> AskedPrompt:
        """Read a prompt with its pictures.

        Raises:
            SampleError: if it cannot be read, has no reference, or is longer than `most_tokens`.
        """
        (sample,) = self._reader.read([place])
        if sample.answer is None:
            raise SampleError(sample.sample_id, "", "it ends with no answer to compare with")
        prompt = prompt_of(sample)
        if len(prompt.input_ids) > most_tokens:
            problem = f"its prompt has {len(prompt.input_ids)} tokens, at most {most_tokens} leave room for an answer"
            raise SampleError(sample.sample_id, "", problem)
        # Patches attend within their frame, so areas of frames count squared.
        areas = prompt.grids[:, 1].astype(np.int64) * prompt.grids[:, 2]
        pairs = int((prompt.grids[:, 0] * areas**2).sum())
        size = PromptSize(place, len(prompt.input_ids), prompt.patch_count, pairs)
        return AskedPrompt(size, self._reader.decoded(place, prompt), sample.answer)

    def set_rollout(self, first_step: int, answers: Sequence[Sequence[TrainedAnswer]]) -> None:
        """Train on these answers, of each step, from the phase's step `first_step` on."""
        self._first_step, self._rollout = first_step, answers

    def micro_batches(self, step: int, share: Share, micro_batch: int) -> list[PackedBatch]:
        """Read what one rank trains on in a step of the rollout that was set; as of PackStream."""
        # As many on each rank, and for interleaved stages in whole rounds.
        multiple = share.data_size * micro_batch * self.micro_batches_multiple
        answers = self._rollout[step - self._first_step]
        packs = pack_answers(answers, self.budget, self.options.cost, multiple)
        mine = deal(packs, share.data_size, micro_batch)[share.data_rank]
        batches = []
        for some in mine:
            written = [pack.answers for pack in some]
            batches.append(self._reader.batch_of_answers(written, self.layout, share, step))
        return batches

    @property
    def budget(self) -> PackBudget:
        """Return what a pack holds."""
        options, data = self.options, self.options.data
        return PackBudget(
            options.sequence_length,
            options.patch_budget,
            data.packing_window_samples,
            data.sample_token_multiple,
            data.max_samples_per_pack,
        )

    def pass_over(self, steps: Iterable[tuple[int, int]]) -> None:
        """Leave out the rollouts that these steps of the plan belong to; see PackStream."""
        size = self.updates
        super().pass_over((first // size * size, -(-end // size) * size) for first, end in steps)

    def state(self, step: int) -> dict[str, Any]:
        """Return the cursor before a step; see PackStream."""
        # the plan's own packs are not trained on
        state = super().state(self.plan.origin.step) | {"step": self.step_of_plan(step)}
        names = {entry.content: entry.name for entry in reversed(self.plan.entries)}
        counters = self.plan.mixture.counters(self.cursor)
        draws = {names[content]: count for content, count in counters.items()}
        return state | {"draws": draws, "prompts": self.cursor}

    def load_state(self, state: Mapping[str, Any]) -> list[str]:
        """Continue from the cursor of a checkpoint; see PackStream."""
        # Of a new plan the draws begin at its origin.
        changed = super().load_state(state)
        self.cursor = 0 if changed else int(state.get("prompts", 0))
        return changed
