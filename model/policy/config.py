"""Options of a policy's loss. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass

from visionloom.common.settings import option

ALGORITHMS = ("sapo", "grpo", "gspo")
MEANS = ("sequence", "token")


@dataclass
class PolicyConfig:
    """How the probabilities of sampled tokens change with the advantages of their answers.

    With r, the ratio of a token's probability to that when it was sampled, and A, the advantage of its answer:
    `sapo` (arXiv 2511.20347) raises gate(r) A, gate(r) = sigmoid(t (r - 1)) 4 / t with a temperature t for either sign of A;
    `grpo` (arXiv 2402.03300) raises min(r A, clip(r) A), clipped between 1 - clip_low and 1 + clip_high (arXiv 2503.14476);
    `gspo` (arXiv 2507.18071) raises the same with one r for an answer, the geometric mean over its tokens.
    """

    algorithm: str = option("sapo", "run", choices=ALGORITHMS)
    """Objective: `sapo` (the report's), `grpo` or `gspo`."""
    mean: str = option("sequence", "run", choices=MEANS)
    """Of tokens: `sequence`, over those of an answer and then over answers, or `token`, over all alike."""
    temperature_positive: float = option(1.0, "run", above=0.0, most=100.0)
    """Of sapo's gate where an answer is better than others of its group."""
    temperature_negative: float = option(1.05, "run", above=0.0, most=100.0)
    """The same where it is not: higher, so that the gradient fades sooner."""
    clip_low: float = option(0.2, "run", above=0.0, most=1.0)
    """Of grpo and gspo: the share that a ratio may fall before it has no gradient; gspo wants some 3e-4."""
    clip_high: float = option(0.28, "run", above=0.0, most=10.0)
    """The share that it may rise; above clip_low it leaves room to explore. gspo wants some 4e-4."""
    kl: float = option(0.0, "run", least=0.0, most=100.0)
    """Weight of the divergence from the model that the phase began with; 0: that one is not kept."""
    correction: float = option(2.0, "run", least=1.0, most=100.0)
    """Most weight of a token that the trainer finds likelier than what wrote it did; below it the weight is the ratio of both."""

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line for each option that needs another one."""
        if self.algorithm == "gspo" and self.mean == "token":
            yield f"{here}.algorithm=gspo has one ratio for an answer: choose {here}.mean=sequence, or {here}.algorithm=grpo"
