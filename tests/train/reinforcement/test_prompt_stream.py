"""Packs of answers with their prompts. Reference: each sample encoded and decoded alone, and laid end to end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from visionloom.data.shards.sample import SampleError
from visionloom.data.stream import reader
from visionloom.data.stream.answers import TrainedAnswer
from visionloom.data.stream.prompt_stream import AskedPrompt, PromptStream
from visionloom.parallel.share import ALONE
from visionloom.tests.train.reinforcement.runs import rl_words
from visionloom.tests.train.runs import configured
from visionloom.train.stream_options import stream_options

LENGTHS = (3, 1, 4)
"""Tokens of the answers to a prompt."""


@pytest.fixture
def stream(demo_data: Path, tmp_path: Path) -> PromptStream:
    return PromptStream(stream_options(configured(rl_words(demo_data, tmp_path, 1), 1), "rl"))


def asked(stream: PromptStream, count: int = 3) -> list[AskedPrompt]:
    return [stream.prompt(stream.place(draw)[0], 200) for draw in range(count)]


def answers_to(prompts: list[AskedPrompt]) -> list[TrainedAnswer]:
    answers = []
    for number, prompt in enumerate(prompts):
        for length in LENGTHS:
            ids = np.arange(length, dtype=np.int32) + 10 * number + 5
            values = np.full(length, -1.0, np.float32)
            answers.append(TrainedAnswer(prompt.size, ids, values, values + number))
    return answers


def batches_of(stream: PromptStream, answers: list[TrainedAnswer]) -> list[Any]:
    stream.set_rollout(0, [answers])
    return stream.micro_batches(0, ALONE, 1)


def test_pictures_of_a_prompt_are_decoded_once_a_pack(
    stream: PromptStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = asked(stream)
    decode, decoded = reader.decode_into, list[str]()

    def counted(out: Any, sample: Any, *words: Any) -> None:
        decoded.append(sample.sample_id)
        decode(out, sample, *words)

    monkeypatch.setattr(reader, "decode_into", counted)
    batches = batches_of(stream, answers_to(prompts))
    ids = [sample for batch in batches for sample in set(batch.sample_ids)]
    assert sorted(decoded) == sorted(ids) and len(decoded) < len(prompts) * len(LENGTHS)

    by_id = {prompt.encoded.sample_id: prompt.encoded for prompt in prompts}
    for batch in batches:
        patches = [by_id[each].patches for each in batch.sample_ids]
        assert np.array_equal(batch.patches.numpy(), np.concatenate(patches))


@pytest.mark.parametrize("bad", [0, 2])
def test_a_prompt_that_cannot_be_read_any_more_is_padding(
    bad: int, stream: PromptStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = asked(stream)
    gone = prompts[bad].size.place
    whole = batches_of(stream, answers_to(prompts))
    samples: Callable[..., Any] = stream._reader._samples

    def failing(places: Any) -> list[Any]:
        read = samples(places)
        error = SampleError(prompts[bad].encoded.sample_id, "", "is gone")
        return [error if place == gone else each for place, each in zip(places, read, strict=True)]

    monkeypatch.setattr(stream._reader, "_samples", failing)
    stream._reader._encoded.clear()
    damaged = batches_of(stream, answers_to(prompts))
    assert len(damaged) == len(whole)
    for ours, before in zip(damaged, whole, strict=True):
        is_here = torch.tensor(
            [each == prompts[bad].encoded.sample_id for each in before.sample_ids]
        )
        assert is_here.any() or torch.equal(ours.input_ids, before.input_ids)
        assert ours.input_ids.shape == before.input_ids.shape
        # As many tokens as were planned, without weight; all others stay.
        rows = before.answers.tokens[~is_here[before.answers.answers]]
        labels = ours.loss_weights.flatten()
        assert set(torch.nonzero(labels).flatten().tolist()) == set(rows.tolist())
        assert torch.equal(ours.answers.tokens, before.answers.tokens)
