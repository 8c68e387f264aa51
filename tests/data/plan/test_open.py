"""From options to a plan: what nothing can be learned from is refused, or counted."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from visionloom.common.errors import UserError
from visionloom.data.config import DataConfig
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.open import StreamOptions, open_datasets, open_plan
from visionloom.data.plan.parts import encode_parts
from visionloom.data.shards.sample import Message, Sample, Text
from visionloom.data.stream.train_stream import PackStream
from visionloom.tests.data.samples import Pair, essay


def chat(number: int, turns: int = 1, loss: float | None = None, words: int = 3) -> Pair:
    """Questions with an answer each; `loss` is every answer's."""
    messages = [
        Message(
            role,
            (Text(f"{role} {number} " + "word " * words),),
            loss if role == "assistant" else None,
        )
        for _ in range(turns)
        for role in ("user", "assistant")
    ]
    return Sample(f"chat:{number}", "chat", tuple(messages)), {}


def silent(pair: Pair) -> Pair:
    return replace(pair[0], weight=0.0), pair[1]


def monologue(number: int) -> Pair:
    return Sample(f"chat:{number}", "chat", (Message("user", (Text("nobody answers"),)),)), {}


def mute_document(number: int) -> Pair:
    return Sample(f"doc:{number}", "doc", content=(Text("nothing", 0.0),), weight=0.0), {}


def stream(data: DataConfig, length: int = 64) -> PackStream:
    return PackStream(StreamOptions(data, "tune", length, 2, {}, "sqrt", 1))


@pytest.mark.parametrize(
    "samples",
    [
        [chat(number, loss=0.0) for number in range(5)],
        [silent(chat(number)) for number in range(5)],
        [silent(essay(number)) for number in range(5)],
        [monologue(number) for number in range(5)],
        [mute_document(number) for number in range(5)],
        [chat(number, loss=1e-60) for number in range(5)],  # 0 in fp32, as a batch has it
    ],
)
def test_a_dataset_without_a_supervised_token_is_refused(
    config: Callable[..., DataConfig], samples: list[Pair]
) -> None:
    data = config(good=[essay(number) for number in range(5)], silent=samples)
    with pytest.raises(
        UserError,
        match=r"data\.datasets\.silent \(.*/silent\): none of its 5 samples.*supervised.*weight=0",
    ):
        stream(data)
    data.datasets["silent"].weight = 0.0
    assert stream(data).unsupervised == {"good": (0, 5)}


@pytest.mark.parametrize("policy", ["drop", "truncate_tail", "split"])
def test_a_phase_that_can_use_only_what_has_no_loss_is_refused(
    config: Callable[..., DataConfig], policy: str
) -> None:
    """The only answers come after a question that is as long as a pack, or stand in a sample longer than one."""
    question = Message("user", (Text("word " * 400),))
    late = Sample("late", "chat", (question, Message("assistant", (Text("yes"),)))), {}
    data = config(some=[late, *(chat(number, loss=0.0) for number in range(5))])
    data.datasets["some"].over_length = policy
    with pytest.raises(
        UserError, match=r"data\.datasets\.some .*phases\.tune\.sequence_length.*some\.over_length"
    ):
        stream(data)
    assert stream(data, 1024).unsupervised == {"some": (5, 6)}


def test_samples_without_a_loss_are_counted_as_they_are_encoded(
    config: Callable[..., DataConfig],
) -> None:
    """Reference: every part encoded, its weights above 0 counted."""
    samples = [
        chat(
            number, turns=1 + number % 4, loss=(0.0, 1.0, 1e-60, None)[number % 4], words=number % 9
        )
        for number in range(40)
    ]
    samples += (
        [silent(pair) for pair in samples[:7]]
        + [essay(number, 90) for number in range(3)]
        + [silent(essay(9, 90))]
    )
    samples = [
        (replace(sample, id=str(number)), media) for number, (sample, media) in enumerate(samples)
    ]
    data = config(mixed=samples)
    data.datasets["mixed"].over_length = "split"
    tokenizer = Tokenizer(data.tokenizer)
    (dataset,) = open_datasets(data, ["mixed"], tokenizer)
    plan = open_plan(StreamOptions(data, "tune", 48, 2, {"mixed": 1.0}, "sqrt", 1), [dataset])
    parts = plan.entries[0].parts
    supervised = np.zeros(len(samples), int)
    cut = 0
    for number, (sample, _) in enumerate(samples):
        rows, _ = parts.of(np.array([number]))
        cut += len(rows) > 1
        for excerpt in range(len(rows)):
            part = parts.part(number, excerpt)
            (encoded,) = encode_parts([sample], [part], tokenizer, data.media, ["mixed"])
            found = int((encoded.target_weights > 0).sum())
            assert part.supervised == found
            supervised[number] += found
    assert cut > 5
    drawn = np.bincount(parts.of(np.arange(len(samples)))[0]["sample"], minlength=len(samples)) > 0
    assert parts.unsupervised == int((drawn & (supervised == 0)).sum()) > 10
