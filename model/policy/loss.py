"""Loss of sampled tokens by the advantages of their answers, in blocks of rows as in model/loss.py.

The gradient of a loss by a token's log-probability, times that of the log-probability by the logits: the cross-entropy's own
gradient with another weight. So the kernels and the split of the vocabulary are those of the cross-entropy.

Shapes: R sampled tokens, r of a block, v columns of the vocabulary on this rank.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from visionloom.model.kernels.cross_entropy import to_gradient_
from visionloom.model.loss import local_targets, row_losses
from visionloom.model.policy.config import PolicyConfig


@dataclass(frozen=True)
class PolicyRows:
    """What is known of the R sampled tokens; all fp32 [R]."""

    advantages: Tensor
    """Of a token's answer."""
    old: Tensor
    """Log-probabilities by the policy that sampled them, as the trainer finds them."""
    corrections: Tensor
    """Weights that make up for what sampled them being another program: min(exp(old - sampled), policy.correction); with gspo the
    same for all tokens of an answer."""
    reference: Tensor | None = None
    """Log-probabilities by the model that the phase began with; None: there is no divergence from it."""
    sequence_ratios: Tensor | None = None
    """Logarithm of the ratio of a token's whole answer, of gspo; None: each token has its own."""


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a policy, the divergence from a reference, and how far the policy is from the one that sampled."""

    options: PolicyConfig
    rows: PolicyRows
    targets: Tensor
    """Sampled token ids in 0..V, int64 [R]."""
    token_weights: Tensor
    """fp32 [R]: 1, or one over the tokens of the answer."""
    group: Any
    """Process group that the vocabulary is split over."""
    copies: int = 0

    @property
    def scales(self) -> tuple[float, ...]:
        """Return the factors of the losses; what is measured only has none."""
        return 1.0, self.options.kl, 0.0, 0.0, 0.0

    def __call__(self, logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        """Return what is known of a block, fp32 [5, r]; see RowLoss.

        Objective, divergence from the reference (Schulman's k3), cross-entropy (whose mean estimates the entropy), absolute
        change of the log-probability since it was sampled, and share of the gradient that gate or clip has left.
        """
        targets = local_targets(self.targets[rows], logits, self.group)
        entropies, largest, total = row_losses(logits, targets, self.group)
        old, advantages = self.rows.old[rows], self.rows.advantages[rows]
        change = -entropies - old
        whole = self.rows.sequence_ratios
        ratios = (change if whole is None else whole[rows]).exp()

        corrections = self.rows.corrections[rows]
        objective, share = objective_of(ratios, advantages, self.options)
        slope = -corrections * share * ratios * advantages
        divergence = torch.zeros_like(entropies)
        if self.rows.reference is not None:
            excess = self.rows.reference[rows] + entropies
            divergence = excess.exp() - excess - 1.0
            slope = slope + self.options.kl * (1.0 - excess.exp())
        if gradient:
            # The cross-entropy falls as the log-probability rises.
            to_gradient_(logits, targets, largest, total, -slope * self.token_weights[rows])
        measured = [-corrections * objective, divergence, entropies, change.abs(), share]
        return torch.stack(measured)


def objective_of(
    ratios: Tensor, advantages: Tensor, options: PolicyConfig
) -> tuple[Tensor, Tensor]:
    """Return what is to rise, and its derivative by the ratios over the advantages, 1 where the policy has not changed.

    Args:
        ratios: of probabilities now to those when tokens were sampled, fp32 [r].
        advantages: fp32 [r].
        options: algorithm, temperatures and clips.
    """
    if options.algorithm == "sapo":
        temperatures = torch.where(
            advantages > 0, options.temperature_positive, options.temperature_negative
        )
        gates = torch.sigmoid(temperatures * (ratios - 1.0))
        return gates * 4.0 / temperatures * advantages, 4.0 * gates * (1.0 - gates)

    clipped = ratios.clamp(1.0 - options.clip_low, 1.0 + options.clip_high)
    objective = torch.minimum(ratios * advantages, clipped * advantages)
    # What is clipped is the smaller of the two only where the advantage would take the ratio further out.
    is_out = torch.where(advantages > 0, ratios > clipped, ratios < clipped)
    return objective, (~is_out).to(ratios.dtype)
