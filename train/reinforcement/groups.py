"""What was written to a prompt: its answers as a group, with what they are worth."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from visionloom.common.jsonfile import checked
from visionloom.data.stream.answers import PromptSize, TrainedAnswer
from visionloom.train.rewards.groups import advantages, pass_rate


@dataclass(frozen=True)
class WrittenAnswer:
    """An answer as it was drawn and judged."""

    token_ids: list[int]
    log_probabilities: list[float]
    """Of each token by the policy's own distribution."""
    sampling_log_probabilities: list[float]
    """Of each token by the distribution that it was drawn from: with temperature and top_p."""
    stopped: bool
    """It has ended by itself, not at the limit."""
    text: str
    rewards: dict[str, float]
    """By name, without their weights."""
    faults: dict[str, str]
    """What went wrong with rewards that could not judge it, by name."""
    total: float
    """Weighted sum of the rewards."""


@dataclass(frozen=True)
class Group:
    """The answers to a prompt."""

    draw: int
    """Number of the draw that brought the prompt."""
    policy_step: int
    """Optimizer steps of the run that the policy had made."""
    dataset: str
    key: str
    """Of the sample in its shard."""
    task: str
    """Of the sample; empty if it names none."""
    place: tuple[int, int, int]
    prompt_tokens: int
    patches: int
    patch_pairs: int
    question: str
    reference: str
    answers: list[WrittenAnswer]
    left_out: str
    """Why it is not trained on; empty if it is."""

    @classmethod
    def read(cls, content: Mapping[str, Any], where: str) -> "Group":
        """Return a group from its JSON; raises JsonError."""
        group: Group = checked(dict(content), cls, where)
        return group

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)

    @property
    def totals(self) -> list[float]:
        """Return the total reward of each answer."""
        return [answer.total for answer in self.answers]

    def pass_rate(self, right: float) -> float:
        """Return the share of answers whose reward is at least `right`."""
        return pass_rate(self.totals, right)

    def learnable(self) -> list[TrainedAnswer]:
        """Return the answers with their advantages, each for all its tokens."""
        size = PromptSize(self.place, self.prompt_tokens, self.patches, self.patch_pairs)
        learnable = []
        for answer, advantage in zip(self.answers, advantages(self.totals), strict=True):
            learnable.append(
                TrainedAnswer(
                    size,
                    np.array(answer.token_ids, np.int32),
                    np.array(answer.log_probabilities, np.float32),
                    np.full(len(answer.token_ids), advantage, np.float32),
                )
            )
        return learnable
