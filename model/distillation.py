"""Compute the divergence of a student's next-token distribution from a teacher's, beside the cross-entropy.

A teacher is given by its hidden states and output matrix, or by its top-k log-probabilities and the mass of all others.
Both are compared in blocks of rows, as in loss.py. In fp32 by plain torch: for 8B a pass over logits costs some hundredths
of a step's products (estimated), so no kernel of our own.

Shapes: R supervised tokens, r of a block, H hidden size of the teacher, V vocabulary (v of it on this rank), k kept tokens.
Source: Hinton et al. 2015 (arXiv 1503.02531) for temperature, whose square keeps the scale of gradients.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from visionloom.model.distillation_config import DistillationConfig
from visionloom.model.loss import local_targets
from visionloom.parallel.collectives import gathered, maximum, summed

TINY = torch.finfo(torch.float32).tiny
"""Least mass of the tokens that are not kept: its logarithm, and a share of it, are finite."""


class RowTeacher(Protocol):
    """A teacher's distributions at the R supervised tokens."""

    def compare(self, student: "StudentBlock", forward: bool, gradient: bool) -> Tensor:
        """Return the divergence of a block of rows, fp32 [r].

        With `gradient`, `student.probabilities` is overwritten by the divergence's gradient by logits / temperature.
        """


@dataclass
class StudentBlock:
    """A student's distributions at a block of rows, at the temperature."""

    rows: slice
    """Where the block stands among the R."""
    log_probabilities: Tensor
    """fp32 [r, v]."""
    probabilities: Tensor
    """fp32 [r, v]."""
    temperature: float
    group: Any
    """Process group that the vocabulary is split over."""


@dataclass(frozen=True)
class HiddenTeacher:
    """A teacher whose logits are made block by block."""

    hidden: Tensor
    """[R, H]."""
    weight: Tensor
    """This rank's rows of its output matrix, [v, H]."""

    def compare(self, student: StudentBlock, forward: bool, gradient: bool) -> Tensor:
        """Compare over the whole vocabulary; see RowTeacher."""
        logits = (self.hidden[student.rows] @ self.weight.t()).float()
        largest = maximum(logits.amax(1), student.group)
        # In the order in which the student's are made: of equal logits the difference is 0 and not a rounding.
        scaled = logits.sub_(largest.unsqueeze(1)).div_(student.temperature)
        total = summed(scaled.exp().sum(1), student.group)
        teacher = scaled.sub_(total.log().unsqueeze(1))

        probabilities = student.probabilities
        if forward:
            excess = (teacher - student.log_probabilities).mul_(teacher.exp())
            divergence = summed(excess.sum(1), student.group)
            if gradient:
                probabilities.sub_(teacher.exp_())
            return divergence

        excess = student.log_probabilities - teacher
        divergence = summed((excess * probabilities).sum(1), student.group)
        if gradient:
            probabilities.mul_(excess.sub_(divergence.unsqueeze(1)))
        return divergence


@dataclass(frozen=True)
class TopKTeacher:
    """A teacher's most probable tokens, at the temperature; all others are one bucket, for the student too.

    So the divergence is a lower bound of that over the whole vocabulary, and with k = V it is that one.
    """

    ids: Tensor
    """int32 [R, k], different ones in a row."""
    log_probabilities: Tensor
    """fp16 or fp32 [R, k]."""
    log_rest: Tensor
    """Logarithm of the mass of all others, fp32 [R]; minus infinity where there are none."""

    @classmethod
    def joined(cls, parts: Sequence["TopKTeacher"]) -> "TopKTeacher":
        """Return the rows of several, one after the other."""
        return cls(
            torch.cat([part.ids for part in parts]),
            torch.cat([part.log_probabilities for part in parts]),
            torch.cat([part.log_rest for part in parts]),
        )

    def at(self, rows: slice | Tensor) -> "TopKTeacher":
        """Return some of the rows, by a slice or by int64 numbers."""
        return TopKTeacher(self.ids[rows], self.log_probabilities[rows], self.log_rest[rows])

    def compare(self, student: StudentBlock, forward: bool, gradient: bool) -> Tensor:
        """Compare token by token, and the rest as one; see RowTeacher."""
        kept, rest = self._of(student.rows)
        group = student.group
        columns, mine = columns_of(self.ids[student.rows], student.probabilities, group)
        # Each is on one rank: all others add zero to it.
        log_kept = summed(student.log_probabilities.gather(1, columns) * mine, group)
        others, mass = without_columns_(student.probabilities, columns, mine, group)
        divergence, of_kept, of_rest = Buckets(kept, log_kept, rest, mass).compare(forward)
        if gradient:
            # The kept are zeros by now, and all others share a factor.
            others.mul_(of_rest.unsqueeze(1))
            others.scatter_add_(1, columns, of_kept * mine)
        return divergence

    def _of(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return the log-probabilities fp32 [r, k] and that of the rest [r], summing up to 1 in spite of fp16's rounding."""
        kept, rest = self.log_probabilities[rows].float(), self.log_rest[rows]
        total = torch.logaddexp(kept.logsumexp(1), rest)
        return kept - total.unsqueeze(1), rest - total


@dataclass(frozen=True)
class Buckets:
    """Two distributions over kept tokens and a rest: logarithms fp32 [r, k] and [r], and the mass of the student's rest [r]."""

    teacher: Tensor
    student: Tensor
    rest: Tensor
    mass: Tensor

    @property
    def excess(self) -> Tensor:
        """Return the teacher's logarithm of the rest less the student's, fp32 [r]; 0 without a rest."""
        difference = self.rest - self.mass.clamp_min(TINY).log()
        return torch.where(self.rest > -math.inf, difference, 0.0)

    def compare(self, forward: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return the divergence in a direction, with its gradients; see `forward`."""
        return self.forward() if forward else self.reverse()

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return KL(teacher || student) [r], its gradient by the kept logits [r, k], and by those of the rest, over their masses [r]."""
        divergence = ((self.teacher - self.student) * self.teacher.exp()).sum(1)
        divergence = divergence + self.excess * self.rest.exp()
        of_rest = 1.0 - self.rest.exp() / self.mass.clamp_min(TINY)
        return divergence, self.student.exp() - self.teacher.exp(), of_rest

    def reverse(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the same of KL(student || teacher)."""
        difference, excess = self.student - self.teacher, self.excess
        divergence = (difference * self.student.exp()).sum(1) - excess * self.mass
        of_kept = self.student.exp() * (difference - divergence.unsqueeze(1))
        return divergence, of_kept, -excess - divergence


@dataclass(frozen=True)
class DistillationLoss:
    """The cross-entropy with given tokens, and the divergence from a teacher times the temperature's square."""

    options: DistillationConfig
    teacher: RowTeacher
    targets: Tensor
    """Token ids in 0..V, int64 [R]."""
    token_weights: Tensor
    """fp32 [R]."""
    group: Any
    """Process group that the vocabulary is split over."""
    copies: int = 13
    """Of bf16: the teacher's logits, and six of fp32."""

    @property
    def scales(self) -> tuple[float, ...]:
        """Return the factors of both losses."""
        return self.options.cross_entropy_weight, self.options.weight

    def __call__(self, logits: Tensor, rows: slice, gradient: bool) -> Tensor:
        """Return both losses of a block [2, r]; see loss.py RowLoss."""
        temperature, group = self.options.temperature, self.group
        columns, mine = columns_of(self.targets[rows].unsqueeze(1), logits, group)
        shifted = logits.float()
        largest = maximum(shifted.amax(1), group)
        shifted = shifted - largest.unsqueeze(1)
        target = (shifted.gather(1, columns) * mine).squeeze(1)
        at_temperature = (shifted / temperature).exp_()
        sums = [shifted.exp().sum(1), at_temperature.sum(1), target]
        # One collective for all three.
        sums_of_all = summed(torch.stack(sums), group)
        total, total_at_temperature, target = sums_of_all.unbind()

        log_probabilities = shifted / temperature
        log_probabilities.sub_(total_at_temperature.log().unsqueeze(1))
        probabilities = log_probabilities.exp()
        student = StudentBlock(rows, log_probabilities, probabilities, temperature, group)
        forward = self.options.direction == "forward"
        divergence = self.teacher.compare(student, forward, gradient)
        if gradient:
            # At temperature 1, whatever the divergence's is.
            cross_entropy = shifted.exp_().div_(total.unsqueeze(1))
            ones = -mine.to(cross_entropy.dtype)
            cross_entropy.scatter_add_(1, columns, ones).mul_(self.options.cross_entropy_weight)
            # The square of the temperature, once divided by it: the derivative of logits / temperature.
            scale = self.options.weight * temperature
            combined = cross_entropy.add_(probabilities, alpha=scale)
            logits.copy_(combined.mul_(self.token_weights[rows].unsqueeze(1)))
        return torch.stack([total.log() - target, divergence * temperature**2])


def top_k(hidden: Tensor, weight: Tensor, k: int, temperature: float, group: Any) -> TopKTeacher:
    """Return the most probable tokens of `hidden @ weight.T`, the same on all ranks of `group`.

    Args:
        hidden: of a block of rows, [r, H].
        weight: this rank's rows of the output matrix [v, H].
        k: tokens kept, at most V.
        temperature: logits are divided by it.
        group: process group that the vocabulary is split over.
    """
    scaled = (hidden @ weight.t()).float().div_(temperature)
    largest = maximum(scaled.amax(1), group)
    scaled.sub_(largest.unsqueeze(1))
    # Each rank's best are candidates: the best of all are among them.
    values, places = scaled.topk(min(k, scaled.shape[1]), dim=1)
    ids = places + scaled.shape[1] * group.rank()
    values, order = gathered(values, group).topk(k, dim=1)
    ids = gathered(ids, group).gather(1, order)

    probabilities = scaled.exp_()
    columns, mine = columns_of(ids, probabilities, group)
    total = summed(probabilities.sum(1), group).log()
    _, rest = without_columns_(probabilities, columns, mine, group)
    log_rest = rest.clamp_min(TINY).log() - total
    if k == scaled.shape[1] * group.size():
        # A rest of rounding errors would be a token of its own.
        log_rest = torch.full_like(log_rest, -math.inf)
    return TopKTeacher(ids.int(), values - total.unsqueeze(1), log_rest)


def columns_of(ids: Tensor, logits: Tensor, group: Any) -> tuple[Tensor, Tensor]:
    """Return token ids [r, k] as columns of this rank, any column for other ranks', and which are this rank's."""
    # Another rank's adds zero to a column, any, of this one: rows are not picked out, which would make shapes depend on data.
    local = local_targets(ids.long(), logits, group)
    mine = (local >= 0) & (local < logits.shape[1])
    return torch.where(mine, local, 0), mine


def without_columns_(
    probabilities: Tensor, columns: Tensor, mine: Tensor, group: Any
) -> tuple[Tensor, Tensor]:
    """Set the probabilities [r, v] in these columns [r, k] of this rank to 0, in place; return them and their sums over all ranks [r]."""
    # A number less itself is 0: no rounding of what is kept is left in a rest that may be 1e-6 of it.
    own = probabilities.gather(1, columns) * mine
    others = probabilities.scatter_add_(1, columns, -own)
    return others, summed(others.sum(1), group)
