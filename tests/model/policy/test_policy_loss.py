"""Losses and gradients of a policy. Reference: trl's GRPOTrainer, autograd over whole logits for gspo's means and the divergence.

Shapes: B answers, T tokens of the longest, H hidden size, V vocabulary.
"""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from visionloom.model.loss import linear_loss
from visionloom.model.policy.config import PolicyConfig
from visionloom.model.policy.loss import PolicyLoss, PolicyRows

B, T, H, V = 6, 7, 8, 23
LENGTHS = (7, 3, 5, 1, 6, 7)
ALONE: Any = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
"""A group of one rank."""


class Sampled:
    """Answers with what is known of them, from policies that are some way apart."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.hidden, self.weight = normal(B, T, H), normal(V, H) * 0.4
        self.targets = torch.randint(V, (B, T), generator=generator)
        self.mask = (torch.arange(T) < torch.tensor(LENGTHS).unsqueeze(1)).float()
        now = self.log_probabilities(self.hidden, self.weight)
        # From far below the clip to far above it.
        self.old = now + normal(B, T) * 0.4
        self.reference = now + normal(B, T) * 0.5
        self.corrections = (normal(B, T) * 0.3).exp().clamp(max=1.4)
        self.advantages = torch.tensor([1.3, -0.7, 0.0, 0.4, -1.8, 0.9])

    def log_probabilities(self, hidden: Tensor, weight: Tensor) -> Tensor:
        log_probabilities = (hidden @ weight.t()).log_softmax(-1)
        return log_probabilities.gather(-1, self.targets.unsqueeze(-1)).squeeze(-1)


def ours(sampled: Sampled, options: PolicyConfig) -> list[Tensor]:
    """Loss, and its gradients by hidden states and output matrix."""
    chosen = sampled.mask.bool()
    hidden = sampled.hidden.clone().requires_grad_()
    weight = sampled.weight.clone().requires_grad_()
    weights = sampled.mask / sampled.mask.sum(1, keepdim=True) / B
    if options.mean == "token":
        weights = sampled.mask / sampled.mask.sum()
    change = sampled.log_probabilities(sampled.hidden, sampled.weight) - sampled.old
    whole = (change * sampled.mask).sum(1) / sampled.mask.sum(1)
    rows = PolicyRows(
        advantages=sampled.advantages.unsqueeze(1).expand(B, T)[chosen],
        old=sampled.old[chosen],
        corrections=sampled.corrections[chosen],
        reference=sampled.reference[chosen] if options.kl else None,
        sequence_ratios=whole.unsqueeze(1).expand(B, T)[chosen]
        if options.algorithm == "gspo"
        else None,
    )
    loss = PolicyLoss(options, rows, sampled.targets[chosen], weights[chosen], ALONE)
    # Blocks of four rows.
    total, _ = linear_loss(hidden[chosen], weight, loss, block_bytes=4 * V * 4)
    total.backward()  # type: ignore[no-untyped-call]
    return [total.detach(), hidden.grad, weight.grad]  # type: ignore[list-item]


def trls(sampled: Sampled, options: PolicyConfig) -> list[Tensor]:
    """The same by trl."""
    hidden = sampled.hidden.clone().requires_grad_()
    weight = sampled.weight.clone().requires_grad_()
    kind = {"sapo": "sapo", "gspo": "grpo", "grpo": "bnpo" if options.mean == "token" else "grpo"}
    accelerator = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, sync_gradients=False
    )
    trainer: Any = SimpleNamespace(
        args=GRPOConfig(
            sapo_temperature_pos=options.temperature_positive,
            sapo_temperature_neg=options.temperature_negative,
            use_bias_correction_kl=False,
            report_to=[],
            bf16=False,
            use_cpu=True,
        ),
        model=SimpleNamespace(training=True),
        loss_type=kind[options.algorithm],
        importance_sampling_level="sequence" if options.algorithm == "gspo" else "token",
        epsilon_low=options.clip_low,
        epsilon_high=options.clip_high,
        beta=options.kl,
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        aux_loss_enabled=False,
        accelerator=accelerator,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (
        sampled.log_probabilities(hidden, weight),
        torch.zeros(B, T),
        None,
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.long),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": sampled.targets,
        "completion_mask": sampled.mask,
        "advantages": sampled.advantages,
        "old_per_token_logps": sampled.old,
        "ref_per_token_logps": sampled.reference,
        "importance_sampling_ratio": sampled.corrections,
    }
    loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    loss.backward()
    return [loss.detach(), hidden.grad, weight.grad]  # type: ignore[list-item]


@pytest.mark.parametrize("kl", [0.0, 0.3])
@pytest.mark.parametrize(
    ("algorithm", "mean"),
    [("sapo", "sequence"), ("grpo", "sequence"), ("grpo", "token"), ("gspo", "sequence")],
)
def test_losses_and_gradients_are_trls(algorithm: str, mean: str, kl: float) -> None:
    sampled = Sampled()
    if algorithm == "gspo":
        sampled.corrections = sampled.corrections[:, :1].expand(B, T)
    options = PolicyConfig(algorithm=algorithm, mean=mean, kl=kl)
    for own, other in zip(ours(sampled, options), trls(sampled, options), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("algorithm", ["sapo", "grpo", "gspo"])
def test_a_policy_that_has_not_changed_has_the_plain_gradient(algorithm: str) -> None:
    """That of REINFORCE: the gate's slope is 1 at a ratio of 1. Reference: autograd over whole logits."""
    sampled = Sampled()
    sampled.old = sampled.log_probabilities(sampled.hidden, sampled.weight)
    sampled.corrections = torch.ones(B, T)
    hidden = sampled.hidden.clone().requires_grad_()
    rises = sampled.log_probabilities(hidden, sampled.weight) * sampled.advantages.unsqueeze(1)
    means = (rises * sampled.mask).sum(1) / sampled.mask.sum(1)
    (-means.mean()).backward()  # type: ignore[no-untyped-call]
    _, own, _ = ours(sampled, PolicyConfig(algorithm=algorithm))
    torch.testing.assert_close(own, hidden.grad, rtol=1e-5, atol=1e-6)


def test_what_is_measured() -> None:
    sampled = Sampled()
    chosen = sampled.mask.bool()
    count = int(chosen.sum())
    options = PolicyConfig(algorithm="grpo")
    rows = PolicyRows(
        sampled.advantages.unsqueeze(1).expand(B, T)[chosen], sampled.old[chosen], torch.ones(count)
    )
    loss = PolicyLoss(options, rows, sampled.targets[chosen], torch.ones(count), ALONE)
    with torch.no_grad():
        _, measured = linear_loss(sampled.hidden[chosen], sampled.weight, loss)
    logits = sampled.hidden[chosen] @ sampled.weight.t()
    entropies = F.cross_entropy(logits, sampled.targets[chosen], reduction="none")
    torch.testing.assert_close(measured[2], entropies)
    change = -entropies - sampled.old[chosen]
    torch.testing.assert_close(measured[3], change.abs())
    ratio, advantage = change.exp(), rows.advantages
    clipped = ((ratio > 1.28) & (advantage > 0)) | ((ratio < 0.8) & (advantage <= 0))
    assert torch.equal(measured[4], (~clipped).float()) and 0 < clipped.sum() < count
