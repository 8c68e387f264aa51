"""What a step knows of a policy's answers: their advantages, and the log-probabilities that a change is measured against.

Shapes: R supervised tokens of a micro-batch on this rank, A answers of it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from visionloom.common.errors import UserError
from visionloom.data.stream.batch import AnswerRows, PackedBatch
from visionloom.model.loss import RowLossMaker
from visionloom.model.policy.loss import PolicyLoss, PolicyRows
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.device import to_device
from visionloom.parallel.schedule import run_schedule
from visionloom.parallel.topology import Topology
from visionloom.train.distillation.teacher import Teacher
from visionloom.train.engines.engine import Engine
from visionloom.train.generation.generator import evaluating
from visionloom.train.reinforcement.config import GateConfig, ReinforcementConfig

MEASURES: Final = ("kl", "entropy", "log_probability_change", "gradient_share")
"""Of a PolicyLoss, after the objective."""


@dataclass(frozen=True)
class Agreement:
    """How far the trainer's log-probabilities of a rollout are from those that it was written with."""

    mean: float
    largest: float
    teacher: float | None = None
    """Mean of the policy's log-probabilities less those of a teacher, an estimate of the reverse divergence; None: there is none."""

    def check(self, gate: GateConfig, here: str) -> None:
        """Raise UserError if they are farther apart than a gate allows; `here`: dotted path of the gate."""
        for name, value, limit in (
            ("mean", self.mean, gate.mean),
            ("largest", self.largest, gate.largest),
        ):
            # No number is above any limit.
            if not value <= limit:
                raise UserError(
                    f"the trainer's log-probabilities of answers and those that they were written with differ by {value:.3g} nats"
                    f" ({name}; {here}.{name} allows {limit:g}): the weights, the pictures or the text of both are not the same;"
                    f" look at samples of the rollout, and raise {here}.{name} only if rounding explains it"
                )


@dataclass(frozen=True)
class Scored:
    """Log-probabilities of the sampled tokens of a micro-batch by one model."""

    batch: PackedBatch
    tokens: Tensor
    """int64 [R], on the host: its rows that predict these tokens."""
    values: Tensor
    """fp32 [R], on the device."""


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the sampled tokens of a micro-batch, fp32 [R] on the device, before any update of the rollout."""

    policy: Tensor
    reference: Tensor | None
    teacher: Tensor | None


class PolicyLearner(Teacher):
    """Hands out what is known of a policy's answers, for the micro-batches of a rollout in order."""

    measures = MEASURES

    def __init__(
        self,
        options: ReinforcementConfig,
        parts: list[Qwen3VL],
        engine: Engine,
        topology: Topology,
        reference: Sequence[Qwen3VL] = (),
        teacher: Sequence[Qwen3VL] = (),
    ) -> None:
        """Learn.

        Args:
            options: of the phase.
            parts: of the policy on this stage.
            engine: that trains them.
            topology: the layout.
            reference: parts of the frozen model that the policy must stay near; empty: there is none.
            teacher: parts of the frozen model whose log-probabilities are a reward; empty: there is none.
        """
        self.options, self.parts = options, parts
        self.engine, self.topology = engine, topology
        self.reference, self.teacher = list(reference), list(teacher)
        self.scores: deque[Scores] = deque()
        """Of the micro-batches that training has not come to."""
        self.ratios: deque[Tensor] = deque()
        """gspo: logarithm of the ratio of each token's whole answer [R], of the micro-batches of the step in hand."""
        # They have no optimizer, but autograd would keep their activations.
        for part in self.reference + self.teacher:
            part.requires_grad_(False)

    def score(self, steps: Sequence[Sequence[PackedBatch]]) -> Agreement:
        """Score the answers of a rollout by the policy and the reference, before the first update; all ranks call it."""
        self.scores.clear()
        differences = torch.zeros(4, dtype=torch.float64)
        for batches in steps:
            scored = self._by_policy(batches)
            others: list[Sequence[Tensor | None]] = []
            for parts in (self.reference, self.teacher):
                by_parts = self.scored(parts, batches) if parts else []
                # Stages before the last score nothing.
                values: list[Tensor | None] = [each.values for each in by_parts]
                others.append(values or [None] * len(scored))
            for each, reference, teacher in zip(scored, *others, strict=True):
                self.scores.append(Scores(each.values, reference, teacher))
                written = rows_of(each.batch, each.tokens).log_probabilities
                apart = (each.values.cpu() - written).abs()
                differences[0] += float(apart.sum())
                differences[1] += len(apart)
                differences[2] = max(float(differences[2]), *apart.tolist(), 0.0)
                if teacher is not None:
                    differences[3] += float((each.values - teacher).sum())
        return self._agreement(differences.tolist())

    def _agreement(self, own: list[float]) -> Agreement:
        """Join what all ranks have found: sum, count and largest of the differences, and their sum from the teacher."""
        of_ranks: list[list[float]] = [own] * self.topology.world_size
        # Tensor ranks have scored the same tokens.
        dist.all_gather_object(of_ranks, own if not self.topology.tensor_rank else [0.0] * 4)
        sums, counts, largest, from_teacher = zip(*of_ranks, strict=True)
        count = max(1.0, sum(counts))
        teacher = sum(from_teacher) / count if self.teacher else None
        return Agreement(sum(sums) / count, max(largest), teacher)

    def _by_policy(self, batches: Sequence[PackedBatch]) -> list[Scored]:
        """Score by the policy as it is now."""
        with self.engine.whole_weights():
            return self.scored(self.parts, batches)

    def scored(self, parts: list[Qwen3VL], batches: Sequence[PackedBatch]) -> list[Scored]:
        """Return the log-probabilities of the sampled tokens of each micro-batch, on the last stage; nothing on others."""
        scored: list[Scored] = []
        no_tokens = torch.zeros([], dtype=torch.int, device=self.topology.device)

        def forward(coming: Iterator[PackedBatch], part: Qwen3VL) -> tuple[Tensor, Any]:
            batch = next(coming)
            inputs = part.prepare(batch)
            output = part(inputs)
            if part.post_process:
                output, losses = output
                scored.append(Scored(batch, inputs.loss_tokens, -losses[0]))
            return output, lambda total: (total, no_tokens, {})

        with evaluating(parts):
            run_schedule(forward, parts, batches, self.topology, forward_only=True)
        return scored

    def begin(self, batches: Sequence[PackedBatch]) -> None:
        """Of gspo: find how much the policy has changed each answer; see Teacher."""
        if self.options.policy.algorithm != "gspo":
            return
        self.ratios = deque()
        # Those of the rollout's later steps follow.
        for now, before in zip(self._by_policy(batches), self.scores, strict=False):
            change = now.values - before.policy
            self.ratios.append(self._answer_means(change, now.batch, now.tokens))

    def _answer_means(self, values: Tensor, batch: PackedBatch, tokens: Tensor) -> Tensor:
        """Return for each token [R] the mean of values [R] over all tokens of its answer, also those of other context ranks."""
        numbers = to_device(rows_of(batch, tokens).answers, values.device)
        # fp64: answers may have ten thousands of tokens.
        sums = values.new_zeros(2, len(batch.sample_ids), dtype=torch.float64)
        sums.index_add_(1, numbers, torch.stack([values, torch.ones_like(values)]).double())
        if self.topology.context_size > 1:
            dist.all_reduce(sums, group=self.topology.groups.cp)
        means = sums[0] / sums[1].clamp_min(1.0)
        return means[numbers].float()

    def for_rows(self, batch: PackedBatch, tokens: Tensor) -> RowLossMaker:
        """Return what makes the policy's losses; see Teacher."""
        scores, rows = self.scores.popleft(), rows_of(batch, tokens)
        written = to_device(rows.log_probabilities, self.topology.device)
        excess = scores.policy - written
        policy = self.options.policy
        # One weight for an answer, as it has one ratio.
        if policy.algorithm == "gspo":
            excess = self._answer_means(excess, batch, tokens)
        advantages = to_device(rows.advantages, self.topology.device)
        if scores.teacher is not None:
            advantages = advantages + self.options.teacher_reward * (scores.teacher - scores.policy)
        known = PolicyRows(
            advantages=advantages,
            old=scores.policy,
            corrections=excess.exp().clamp_max(policy.correction),
            reference=scores.reference,
            sequence_ratios=self.ratios.popleft() if policy.algorithm == "gspo" else None,
        )
        return partial(PolicyLoss, policy, known)


def rows_of(batch: PackedBatch, tokens: Tensor) -> AnswerRows:
    """Return what a batch on the host knows of some of its supervised tokens, int64 [R]."""
    known = batch.answers
    assert known is not None, "the stream of a phase with rewards attaches its rows"
    places = torch.searchsorted(known.tokens, tokens)
    return AnswerRows(
        known.tokens[places],
        known.answers[places],
        known.advantages[places],
        known.log_probabilities[places],
    )
