"""Answers that a policy has written to prompts of a stream, on their way into packs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from visionloom.data.plan.best_fit import PackBudget, pack_samples
from visionloom.data.plan.deal import CostModel, PlannedPack
from visionloom.data.plan.plan_blocks import work_of

Place = tuple[int, int, int]
"""Number of the dataset, index of the sample, number of its part."""


@dataclass(frozen=True, slots=True)
class PromptSize:
    """Where a prompt is, and what it takes up in a pack."""

    place: Place
    tokens: int
    patches: int
    patch_pairs: int
    """Sum of the squared patch counts of its pictures and frames."""


@dataclass(frozen=True, slots=True)
class TrainedAnswer:
    """An answer of n tokens, and what it is to be learned from."""

    prompt: PromptSize
    token_ids: NDArray[np.int32]
    """[n]"""
    log_probabilities: NDArray[np.float32]
    """[n], by the policy that wrote it."""
    advantages: NDArray[np.float32]
    """[n]: how much better it is than other answers to its prompt."""

    @property
    def tokens(self) -> int:
        """Return the tokens of prompt and answer."""
        return self.prompt.tokens + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class AnswerPack(PlannedPack):
    """A pack of answers with their prompts."""

    answers: tuple[TrainedAnswer, ...] = ()


def pack_answers(
    answers: Sequence[TrainedAnswer], budget: PackBudget, cost: CostModel, multiple: int
) -> list[AnswerPack]:
    """Pack answers, and add packs of padding: as many as make up a multiple, and at least one multiple."""
    tokens = [answer.tokens for answer in answers]
    patches = [answer.prompt.patches for answer in answers]
    packs = []
    for numbers in pack_samples(tokens, patches, budget):
        packs.append(_pack_of([answers[number] for number in numbers], cost))
    # Ranks without answers must take part in the collectives of the others.
    lacking = -len(packs) % multiple if packs else multiple
    return packs + [AnswerPack((), 0.0)] * lacking


def _pack_of(answers: list[TrainedAnswer], cost: CostModel) -> AnswerPack:
    prompts = [answer.prompt for answer in answers]
    # Attention sees prompt and answer as one sequence.
    work = work_of(
        np.array([answer.tokens for answer in answers], np.int32),
        np.array([prompt.patches for prompt in prompts], np.int32),
        np.array([prompt.patch_pairs for prompt in prompts], np.int64),
    ).sum(0)
    places = tuple(prompt.place for prompt in prompts)
    return AnswerPack(places, float(cost.of(work)), tuple(answers))
