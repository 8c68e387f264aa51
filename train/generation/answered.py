"""Prompts out of samples, and samples out of answers: what generation reads from shards and writes into shards."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from visionloom.data.config import MediaConfig
from visionloom.data.encode.encode import EncodedSample, encode, prompt_of
from visionloom.data.encode.patches import decode_patches
from visionloom.data.encode.tokenizer import THINK_END, THINK_START, Tokenizer
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Element, Message, Sample, SampleError, Text, Think
from visionloom.data.shards.write import SampleMembers, members_of
from visionloom.train.generation.generator import Answer


@dataclass(frozen=True)
class Prompts:
    """The samples of a dataset as prompts: their last answer, if they end with one, is what generation replaces."""

    dataset: Dataset
    tokenizer: Tokenizer
    rules: MediaConfig

    def key(self, index: int) -> str:
        """Return the key of a sample."""
        return self.dataset.location(index).key

    def read(self, index: int) -> "Prompt":
        """Read a sample; raises SampleError for one that is damaged, or no chat."""
        sample = self.dataset.sample(index)
        if sample.kind != "chat":
            raise SampleError(sample.id, "kind", "a document is no prompt")
        turns = sample.messages
        if turns and turns[-1].role == "assistant":
            turns = turns[:-1]
        # An empty answer, for the header that an answer begins after.
        waiting = replace(sample, messages=(*turns, Message("assistant", ())))
        encoded = prompt_of(encode(waiting, self.tokenizer, self.rules))
        read = partial(self.dataset.member, index)
        encoded = replace(encoded, patches=decode_patches(encoded, read, self.rules))
        reference = None
        if len(turns) < len(sample.messages):
            reference = encode(sample, self.tokenizer, self.rules).answer
        return Prompt(index, self.key(index), waiting, encoded, reference)

    def members(self, prompt: "Prompt", number: int, answer: Answer) -> SampleMembers:
        """Return the members of the sample in which an answer, the `number`-th to its prompt, is the last turn."""
        content = answer_content(answer.token_ids, self.tokenizer)
        facts = facts_of(prompt, number, answer)
        sample = prompt.answered(f"{prompt.sample.id}-{number}", content, facts)
        # Text may have other tokens than those that were drawn, which a learner on policy must know.
        facts["same_tokens"] = self._has_tokens(sample, answer)
        media = {ref: self.dataset.member(prompt.index, ref) for ref in sample.refs}
        return members_of(sample, media)

    def _has_tokens(self, sample: Sample, answer: Answer) -> bool:
        """Return whether training on the sample reads the tokens that were drawn."""
        encoded = encode(sample, self.tokenizer, self.rules)
        read = encoded.input_ids[encoded.prompt_length :]
        drawn = answer.token_ids[: -1 if answer.is_stopped else None]
        # The end of its turn and a newline follow, whatever ended it when it was drawn.
        newline = self.tokenizer.encode(["\n"])[0]
        count = len(read) - 1 - len(newline)
        return drawn == read[:count].tolist()


@dataclass(frozen=True)
class Prompt:
    """A sample that waits for an answer."""

    index: int
    """In its dataset."""
    key: str
    """In its shard."""
    sample: Sample
    """Its last turn is an empty answer."""
    encoded: EncodedSample
    """Up to where the answer begins, with patches."""
    reference: str | None
    """The answer that it had."""

    def answered(
        self, sample_id: str, content: tuple[Element, ...], facts: dict[str, Any]
    ) -> Sample:
        """Return the sample with an answer as its last turn, and facts of its generation in its meta."""
        turns = (*self.sample.messages[:-1], Message("assistant", content))
        meta = {**self.sample.meta, "generation": facts}
        return replace(self.sample, id=sample_id, messages=turns, meta=meta)

    def without_patches(self) -> "Prompt":
        """Return it as it waits for its answers: pictures would fill the host's memory."""
        return replace(self, encoded=replace(self.encoded, patches=None))


def answer_content(token_ids: Sequence[int], tokenizer: Tokenizer) -> tuple[Element, ...]:
    """Return the content of an assistant's turn: thoughts, if it begins with some, and text.

    In the thinking format an answer that ended before its thoughts did is a thought alone.
    """
    ids = [token for token in token_ids if token not in tokenizer.stop_ids]
    start, end = tokenizer.special(THINK_START), tokenizer.special(THINK_END)
    # Where the prompt has begun the thought, all is thought until it ends.
    if not tokenizer.answer_start:
        if ids[:1] != [start] or end not in ids:
            return (Text(tokenizer.decode(ids)),)
        del ids[0]
    place = ids.index(end) if end in ids else len(ids)
    # Rendering adds these newlines again.
    thought = Think(tokenizer.decode(ids[:place]).removeprefix("\n").removesuffix("\n"))
    speech = Text(tokenizer.decode(ids[place + 1 :]).removeprefix("\n\n"))
    return (thought, speech) if end in ids else (thought,)


def facts_of(prompt: Prompt, number: int, answer: Answer) -> dict[str, Any]:
    """Return what a sample's meta keeps of how it was generated."""
    return {
        "source": prompt.key,
        "source_id": prompt.sample.id,
        "answer": number,
        "reference": prompt.reference,
        "stopped": answer.is_stopped,
        "token_ids": answer.token_ids,
        "log_probabilities": _shortest(answer.log_probabilities),
        "sampling_log_probabilities": _shortest(answer.sampling_log_probabilities),
    }


def _shortest(values: Sequence[float]) -> list[float]:
    """Return fp32 numbers with as few digits as tell them apart."""
    # As fp64 they would have twice as many, and be most of a shard of text.
    return [float(str(np.float32(value))) for value in values]
