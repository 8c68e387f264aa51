"""Filter a dataset into a new one, and write down what was left out and why."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from visionloom.common.atomic import replacing
from visionloom.common.errors import UserError
from visionloom.common.progress import PartProgress
from visionloom.data.encode.scores import is_right
from visionloom.data.filter.measures import last_answer, text_of
from visionloom.data.filter.rules import FilterRules
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Sample, SampleError
from visionloom.data.shards.write import Pair, write_shards

LEFT_OUT: Final = "left_out.jsonl"
GENERATION: Final = "generation"
"""Key of a sample's meta under which generation keeps the source of a prompt and the answer that it had."""


@dataclass
class Filtering:
    """A dataset on its way through the rules."""

    source: Dataset
    rules: FilterRules
    pass_rates: Mapping[str, float]
    """Of a model's answers, by the id of the sample."""
    counts: Counter[str] = field(default_factory=Counter)
    """Samples by the reason for which they are left out; empty text for those that are kept."""
    left_out: list[dict[str, str]] = field(default_factory=list)
    """Key and reason of each that is."""

    def kept(self, progress: PartProgress) -> Iterator[Pair]:
        """Yield the samples that pass all rules, with their media."""
        for index in range(len(self.source)):
            progress("filtered", index + 1, len(self.source))
            sample, reason = self._judged(index)
            self.counts[reason] += 1
            if sample is None or reason:
                key = self.source.location(index).key
                self.left_out.append({"key": key, "reason": reason})
            else:
                yield sample, {ref: self.source.member(index, ref) for ref in sample.refs}

    def _judged(self, index: int) -> tuple[Sample | None, str]:
        """Return a sample and why it is left out; no sample if it cannot be read."""
        try:
            sample = self.source.sample(index)
        except SampleError as error:
            # One damaged sample is a reason, not the end of an hour's work.
            return None, f"cannot be read ({error.problem})"
        return sample, self.rules.reason(sample, self.pass_rates.get(sample.id))


def filter_dataset(filtering: Filtering, target: Path, progress: PartProgress) -> None:
    """Write the samples that pass all rules into a new dataset, in their order, and LEFT_OUT beside it.

    Args:
        filtering: the dataset and the rules; it counts.
        target: folder of the new dataset; its name is the dataset's.
        progress: is told of each sample.

    Raises:
        UserError: if the target holds a dataset already, or nothing is kept.
    """
    try:
        write_shards(target, target.name, filtering.kept(progress))
    except UserError:
        counts = filtering.counts
        # Nothing to write is no fault of the folder's.
        if counts and not counts[""]:
            reasons = ", ".join(f"{reason} {number}" for reason, number in counts.most_common(4))
            raise UserError(f"{target}: no sample passes: {reasons}") from None
        raise
    with replacing(target / LEFT_OUT) as file:
        lines = [json.dumps(row) + "\n" for row in filtering.left_out]
        file.write("".join(lines).encode())


def pass_rates_of(rollouts: Dataset) -> dict[str, float]:
    """Return the share of right answers to each prompt, by the id of its sample.

    An answer is right by the one that the sample had, as in evaluation.

    Args:
        rollouts: a dataset that launch/generate.py wrote.

    Raises:
        UserError: for a dataset that generation did not write, or whose prompts had no answer.
    """
    answers: Counter[str] = Counter()
    passes: Counter[str] = Counter()
    for index in range(len(rollouts)):
        sample = rollouts.sample(index)
        facts = sample.meta.get(GENERATION) or {}
        # Prompts of a shard without answers, or a dataset of another kind.
        if facts.get("reference") is None:
            raise UserError(
                f"--rollouts {rollouts.path}: sample {sample.id} has no reference answer:"
                " give a dataset that launch/generate.py wrote from prompts with answers"
            )
        answers[facts["source_id"]] += 1
        if message := last_answer(sample):
            passes[facts["source_id"]] += is_right(text_of(message.content), facts["reference"])
    return {name: passes[name] / number for name, number in answers.items()}
