"""Options of a phase that learns from rewards of its own answers. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from visionloom.common.settings import option
from visionloom.model.policy.config import PolicyConfig
from visionloom.train.generation.config import Budget
from visionloom.train.rewards.rewards import REWARDS, RIGHT


@dataclass
class RolloutConfig:
    """How the policy writes answers."""

    n: int = option(16, "run", least=2, most=4096)
    """Answers to each prompt, which are compared with one another."""
    batch_prompts: int = option(64, "run", least=1, most=10**6)
    """Prompts of a rollout whose answers are trained on."""
    temperature: float = option(1.0, "run", above=0.0, most=100.0)
    """Logits are divided by it when a token is drawn."""
    top_p: float = option(1.0, "run", above=0.0, most=1.0)
    """Only the most likely tokens that together have this probability are drawn from."""
    max_new_tokens: int = option(1024, "run", least=1, most=2**20)
    """Longest answer; with the prompt it must fit into a pack."""
    most_prompts: float = option(4.0, "run", least=1.0, most=1000.0)
    """Prompts that are answered for a rollout at most, in multiples of batch_prompts: groups that teach nothing are replaced."""
    part_prompts: int = option(32, "free", least=1, most=10**6)
    """Prompts that a data rank answers together: what a killed run writes again at most."""
    pack_tokens: int = option(16_384, "free", least=1, most=2**24)
    """Tokens of the prompts that enter together."""
    cache_tokens: int = option(65_536, "free", least=1, most=2**32)
    """Tokens of all answers that are generated together, with their prompts: as many have keys and values in memory."""

    @property
    def budget(self) -> Budget:
        """Return the memory of generation."""
        return Budget(self.pack_tokens, self.cache_tokens)


@dataclass
class GateConfig:
    """How far log-probabilities of the trainer may be from those that answers were written with.

    Both are of the same weights: a difference is a fault of one of them, another picture, or rounding.
    """

    mean: float = option(0.05, "free", above=0.0, most=100.0)
    """Largest mean difference of a rollout; in bf16 rounding makes some 0.01."""
    largest: float = option(5.0, "free", above=0.0, most=1000.0)
    """Largest difference of any token."""


@dataclass
class ReinforcementConfig:
    """A phase that alternates between writing answers and training on them.

    A rollout is what `updates` optimizer steps train on, an equal share of its prompts each.
    """

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """How the policy writes answers."""
    reward: dict[str, float] = option({}, "run", least=-1e6, most=1e6)
    """Weight of each reward, by its name: one of docs/reinforcement.md, or of `functions`; `right` is the one of the dataset."""
    judged_by: dict[str, str] = option({}, "run")
    """Name of the reward that `right` stands for, by dataset; `default` for those that are not named."""
    functions: dict[str, str] = option({}, "run")
    """Rewards of your own, MODULE:FUNCTION by their names; only a command line sets it."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    """How probabilities change with advantages."""
    updates: int = option(1, "never", least=1, most=10_000)
    """Optimizer steps for each rollout."""
    staleness: int = option(8, "run", least=0, most=10_000)
    """Optimizer steps that the policy may be ahead of the one that wrote an answer when it is trained on."""
    right: float = option(0.5, "run", least=-1e6, most=1e6)
    """Reward from which an answer counts as right, for pass rates."""
    most_right: float = option(0.9, "run", least=0.0, most=1.0)
    """Pass rate above which a prompt is too easy: its answers are left out, and it is not asked again."""
    gate: GateConfig = field(default_factory=GateConfig)
    """How far the trainer may be from what wrote the answers."""
    teacher_reward: float = option(0.0, "run", least=0.0, most=1e6)
    """Weight of the phase's teacher as a reward: of each token its log-probability by the teacher less that by the policy, whose
    mean is minus the reverse divergence; 0: a teacher's whole distributions are learned, and no reward."""
    reward_seconds: float = option(10.0, "run", above=0.0, most=10_000.0)
    """Longest time of a reward of your own for one answer, which then counts as 0."""

    @property
    def prompts_of_step(self) -> int:
        """Return the prompts whose answers an optimizer step trains on."""
        return self.rollout.batch_prompts // self.updates

    @property
    def most_tokens_of_step(self) -> int:
        """Return the tokens of the answers of an optimizer step, if all are as long as they may be."""
        return self.prompts_of_step * self.rollout.n * self.rollout.max_new_tokens

    def _named_rewards(self, here: str) -> Iterator[tuple[str, str]]:
        """Yield each option that names a reward, and the name."""
        for name in self.reward:
            if name != RIGHT:
                yield f"{here}.reward.{name}", name
        for dataset, name in self.judged_by.items():
            yield f"{here}.judged_by.{dataset}={name}", name

    def problems(self, here: str) -> Iterator[str]:
        """Yield a line for each fault of the rewards and of the steps of a rollout."""
        used = {*self.reward, *self.judged_by.values()}
        for name in sorted(self.functions.keys() - used):
            yield f"{here}.functions.{name} has no weight: set {here}.reward.{name}"
        for name in sorted({RIGHT} & self.functions.keys()):
            yield f"{here}.functions.{name}: that name stands for the rewards of judged_by: choose another one"
        known = REWARDS.keys() | self.functions.keys()
        for path, name in self._named_rewards(here):
            if name not in known:
                choices = ", ".join(REWARDS)
                yield (
                    f"{path}: no reward is called {name}: choose one of {choices}, or name a function of your own for it,"
                    f" {here}.functions.{name}=MODULE:FUNCTION"
                )
        if self.rollout.batch_prompts % self.updates:
            yield (
                f"{here}.rollout.batch_prompts={self.rollout.batch_prompts} cannot be dealt to {here}.updates={self.updates}"
                f" optimizer steps: make it a multiple of {self.updates}"
            )
        if self.updates - 1 > self.staleness:
            yield (
                f"{here}.updates={self.updates} trains on answers that are {self.updates - 1} optimizer steps old:"
                f" raise {here}.staleness={self.staleness}, or make fewer updates of a rollout"
            )
