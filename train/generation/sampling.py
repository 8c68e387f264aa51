"""Draw tokens from logits: greedy, or at a temperature from the most likely ones, with their log-probabilities.

A draw is a pure function of the logits, the seed, the sample, the number of the answer and the token's place in it: neither
batch, order, layout nor rank has a part in it.
Shapes: R rows, V vocabulary.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from visionloom.data.plan.mixture import key_of, mix

_GOLDEN: Final = 0x9E3779B97F4A7C15 - 2**64
"""The constants of SplitMix64, as signed numbers: torch has no unsigned products."""
_FIRST: Final = 0xBF58476D1CE4E5B9 - 2**64
_SECOND: Final = 0x94D049BB133111EB - 2**64


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    """Tokens of an answer, at most."""
    stop_ids: tuple[int, ...]
    """Tokens that end an answer, as its last."""
    temperature: float = 1.0
    """Logits are divided by it; 0: the most likely token is taken."""
    top_k: int = 0
    """Only as many tokens as this, the most likely ones, are drawn from; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that together have this probability are drawn from, after `top_k`."""
    answers: int = 1
    """Answers to each prompt."""
    seed: int = 0


def answer_key(seed: int, sample_id: str, answer: int) -> np.uint64:
    """Return the key of an answer, from which those of its tokens are made."""
    return key_of(seed, f"answer {answer} to {sample_id}")


def token_key(answer: np.uint64, place: int) -> int:
    """Return the key of the token at a place of an answer, a signed number of 64 bits."""
    key = mix(np.array([place], np.uint64), answer)
    return int(key.view(np.int64)[0])


def choose_tokens(logits: Tensor, keys: Tensor, sampling: Sampling) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: of the whole vocabulary, [R, V].
        keys: of the tokens, int64 [R].
        sampling: temperature, top_k and top_p.

    Returns:
        fp64 [3, R]: ids; log-probabilities of the model's own distribution, at temperature 1 and over the whole vocabulary;
        and of the distribution that was drawn from, 0 where the most likely token is taken.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        ids = logits.argmax(1)
        drawn = torch.zeros_like(logits[:, 0])
    else:
        scores = drawn_scores(logits, sampling)
        # The token whose exponential waiting time ends first: a draw without sums, from any part of the vocabulary.
        ids = (scores - waiting_times(keys, logits.shape[1]).log()).argmax(1)
        drawn = _log_probabilities(scores, ids)
    # fp64 holds any id and any fp32 number exactly, so that one tensor carries all.
    return torch.stack([ids.double(), _log_probabilities(logits, ids).double(), drawn.double()])


def _log_probabilities(scores: Tensor, ids: Tensor) -> Tensor:
    """Return the log-probabilities [R] of ids [R] by scores [R, V]."""
    return scores.gather(1, ids[:, None])[:, 0] - scores.logsumexp(1)


def drawn_scores(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return scores [R, V] of the tokens that may be drawn, -inf of all others.

    Source: transformers' TemperatureLogitsWarper, TopKLogitsWarper and TopPLogitsWarper, in this order.
    """
    scores = logits / sampling.temperature
    if 0 < sampling.top_k < scores.shape[1]:
        # Equals of the last one stay too, as in transformers.
        least = scores.topk(sampling.top_k, dim=1).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if sampling.top_p < 1:
        scores = scores.masked_fill(_least_likely(scores, 1 - sampling.top_p), -torch.inf)
    return scores


def _least_likely(scores: Tensor, share: float) -> Tensor:
    """Mark the least likely tokens that together have at most a share of the probability, bool [R, V]."""
    ascending, order = scores.sort(dim=1)
    marked = ascending.softmax(1).cumsum(1) <= share
    # Rounding may take a share near 1 for all: one token must be left.
    marked[:, -1] = False
    return torch.zeros_like(marked).scatter(1, order, marked)


def waiting_times(keys: Tensor, vocabulary: int) -> Tensor:
    """Return exponential waiting times fp32 [R, V], each a function of its row's key, int64 [R], and its token's id."""
    ids = torch.arange(vocabulary, device=keys.device)
    keys = keys[:, None]
    bits = _scrambled(_scrambled(ids * _GOLDEN + keys) ^ keys)
    # 63 bits; with the last one set never 0. Short times decide, and near 0 numbers are dense.
    share = (bits & (2**63 - 1) | 1).float() * 2.0**-63
    return -torch.log1p(-share)


def _scrambled(bits: Tensor) -> Tensor:
    """Mix 64 bits as SplitMix64 does; int64, in which products wrap around as unsigned ones do."""
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Shift to the right and fill up with zeros; torch would repeat the sign."""
    return (bits >> places) & (2 ** (64 - places) - 1)
