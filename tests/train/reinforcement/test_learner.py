"""What the loss of a micro-batch is told of its answers. Reference: means and clips by hand, an answer at a time."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from visionloom.data.stream.batch import AnswerRows
from visionloom.model.policy.config import PolicyConfig
from visionloom.train.reinforcement.config import ReinforcementConfig
from visionloom.train.reinforcement.learner import PolicyLearner, Scores

ANSWERS = [0, 0, 0, 2, 2]
WRITTEN = [-1.0, -2.0, -0.5, -0.25, -3.0]
POLICY = [-1.5, -1.0, -0.5, -0.75, -1.0]
ORDER = [3, 0, 4, 1, 2]
"""Of the rows of a context rank, which are not those of the pack."""
BATCH: Any = SimpleNamespace(
    answers=AnswerRows(
        tokens=torch.tensor([3, 4, 5, 9, 10]),
        answers=torch.tensor(ANSWERS),
        advantages=torch.tensor([0.5, 0.5, 0.5, -1.0, -1.0]),
        log_probabilities=torch.tensor(WRITTEN),
    ),
    sample_ids=["a", "b", "c"],
)
TOKENS = torch.tensor([9, 3, 10, 4, 5])


def means_by_hand(values: list[float]) -> list[float]:
    """Of each token's whole answer, in the order of the pack."""
    of_answer = {
        number: [value for value, own in zip(values, ANSWERS, strict=True) if own == number]
        for number in set(ANSWERS)
    }
    return [sum(of_answer[number]) / len(of_answer[number]) for number in ANSWERS]


def learner(algorithm: str) -> PolicyLearner:
    options = ReinforcementConfig(policy=PolicyConfig(algorithm=algorithm))
    topology: Any = SimpleNamespace(context_size=1, device=torch.device("cpu"))
    no_engine: Any = None
    return PolicyLearner(options, [], no_engine, topology)


def in_order(values: list[float]) -> Tensor:
    return torch.tensor([values[place] for place in ORDER])


def test_an_answer_s_mean_goes_to_all_its_tokens() -> None:
    values = in_order(POLICY)
    means = learner("gspo")._answer_means(values, BATCH, TOKENS)
    torch.testing.assert_close(means, in_order(means_by_hand(POLICY)))


@pytest.mark.parametrize("algorithm", ["sapo", "gspo"])
def test_corrections_are_of_tokens_or_of_answers(algorithm: str) -> None:
    """What the trainer finds likelier than what wrote it, bounded by 2."""
    learns = learner(algorithm)
    learns.scores.append(Scores(in_order(POLICY), None, None))
    ratios = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    learns.ratios.append(ratios)
    rows = learns.for_rows(BATCH, TOKENS).args[1]  # type: ignore[attr-defined]

    excess = [policy - written for policy, written in zip(POLICY, WRITTEN, strict=True)]
    if algorithm == "gspo":
        excess = means_by_hand(excess)
        assert rows.sequence_ratios is ratios
    expected = in_order(excess).exp().clamp(max=2.0)
    torch.testing.assert_close(rows.corrections, expected)
    torch.testing.assert_close(rows.advantages, in_order([0.5, 0.5, 0.5, -1.0, -1.0]))
    torch.testing.assert_close(rows.old, in_order(POLICY))
