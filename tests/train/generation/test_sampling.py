"""Draws from logits. References: transformers' logits processors, numpy's unsigned numbers, and the probabilities themselves."""

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from visionloom.data.plan.mixture import mix
from visionloom.train.generation.sampling import (
    Sampling,
    answer_key,
    choose_tokens,
    drawn_scores,
    token_key,
    waiting_times,
)


def logits(rows: int, vocabulary: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, vocabulary, generator=generator) * 3


def sampling(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Sampling:
    return Sampling(4, (0,), temperature, top_k, top_p)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 5, 1.0), (1.3, 0, 0.8), (0.6, 7, 0.9), (1.0, 90, 1e-9)],
)
def test_what_may_be_drawn_is_what_transformers_leaves(
    temperature: float, top_k: int, top_p: float
) -> None:
    raw = logits(20)
    raw[3, :10] = raw[3].max()  # equals are kept or left out together
    expected = TemperatureLogitsWarper(temperature)(None, raw)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    torch.testing.assert_close(
        drawn_scores(raw, sampling(temperature, top_k, top_p)), expected, rtol=0, atol=0
    )


def test_tokens_come_as_often_as_they_are_probable() -> None:
    raw, draws = logits(1, 12) / 2, 20_000
    keys = torch.tensor([token_key(answer_key(0, "a", n), 0) for n in range(draws)])
    chosen = choose_tokens(raw.expand(draws, -1), keys, sampling(0.8, 0, 0.95))
    expected = drawn_scores(raw, sampling(0.8, 0, 0.95)).softmax(1)[0].double()
    shares = torch.bincount(chosen[0].long(), minlength=12) / draws
    # Five standard deviations of a share.
    deviation = (expected * (1 - expected) / draws).sqrt()
    assert ((shares - expected).abs() <= 5 * deviation).all()
    assert (expected == 0).any() and (expected > 0.01).sum() > 3
    likely = raw[0].log_softmax(0)[chosen[0].long()].double()
    torch.testing.assert_close(chosen[1], likely, rtol=0, atol=1e-5)
    torch.testing.assert_close(chosen[2], expected.log()[chosen[0].long()], rtol=0, atol=1e-5)


def test_waiting_times_are_those_of_unsigned_numbers() -> None:
    keys = torch.tensor([token_key(answer_key(7, "b", n), n) for n in range(40)])
    assert (keys < 0).any() and (keys > 0).any()
    for key, times in zip(keys.numpy().view(np.uint64), waiting_times(keys, 1000), strict=True):
        bits = mix(np.arange(1000, dtype=np.uint64), key) & np.uint64(2**63 - 1)
        expected = -np.log1p(-(bits.astype(np.float64) / 2**63))
        # A long time is made of the difference of 1 and an fp32 number.
        np.testing.assert_allclose(times, expected, rtol=1e-3)


def test_the_most_likely_token_has_probability_one_of_being_drawn() -> None:
    raw = logits(6)
    chosen = choose_tokens(raw, torch.zeros(6, dtype=torch.int64), sampling(0))
    assert chosen[0].tolist() == raw.argmax(1).tolist()
    likely = raw.log_softmax(1).max(1).values.double()
    torch.testing.assert_close(chosen[1], likely, rtol=0, atol=1e-5)
    assert not chosen[2].any()


def test_draws_differ_by_seed_sample_answer_and_place() -> None:
    keys = {
        token_key(answer_key(seed, sample, answer), place)
        for seed in (0, 1)
        for sample in ("a", "b")
        for answer in (0, 1)
        for place in (0, 1)
    }
    assert len(keys) == 16
