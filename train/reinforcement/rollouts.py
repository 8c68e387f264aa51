"""The alternation of a phase that learns from rewards: write a rollout, judge and score it, then train on it."""

import time
from collections import Counter
from collections.abc import Generator, Sequence
from typing import Any, Final

from visionloom.common import pulse
from visionloom.common.errors import UserError
from visionloom.common.pulse import ROLLOUT
from visionloom.data.stream.answers import TrainedAnswer
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.prompt_stream import PromptStream
from visionloom.data.stream.workers import iterate
from visionloom.train.observe import stopping
from visionloom.train.phase.trainer import PhaseTrainer
from visionloom.train.reinforcement.config import ReinforcementConfig
from visionloom.train.reinforcement.groups import Group, WrittenAnswer
from visionloom.train.reinforcement.learner import Agreement, PolicyLearner
from visionloom.train.reinforcement.writer import Rollout, RolloutWriter
from visionloom.train.step import agree_on_unreadable

PROMPTS_SHOWN: Final = 4
"""Of a rollout, to trackers."""
FAULT_CHARACTERS: Final = 60
"""Of the kind of a fault, in metrics."""
SURPLUS: Final = "surplus"
"""Why a group is left out that there is something to learn from: others are enough."""


class Rollouts:
    """Gives a phase its micro-batches."""

    def __init__(
        self, options: ReinforcementConfig, stream: PromptStream, writer: RolloutWriter
    ) -> None:
        """Alternate between writing and training."""
        self.options, self.stream, self.writer = options, stream, writer
        self.seconds = 0.0
        """Of writing and scoring the last rollout, until `take_facts`."""
        self._facts: dict[str, Any] = {}
        self._samples: list[list[str]] = []

    def batches(self, trainer: PhaseTrainer) -> Generator[list[PackedBatch]]:
        """Yield this rank's micro-batches of each step that is left; all ranks take them together.

        Raises:
            StopAsked: while a rollout is written, if any rank wishes to end the run.
            UserError: if nothing can be learned from a rollout, or the gate finds that the trainer is another model.
        """
        updates = self.options.updates
        # Of a run that goes on: pass rates of what it has trained on.
        self.writer.begin(self._number(trainer.phase_step))
        while trainer.phase_step < trainer.phase.total_steps:
            started = time.perf_counter()
            first = trainer.phase_step
            rollout = self._write(trainer, self._number(first))
            written = time.perf_counter()
            self.stream.set_rollout(first, self._by_step(rollout.taught))
            steps = self._read(trainer, range(first, first + updates))
            agreement = self._score(trainer, steps)
            self._facts = facts_of(rollout, agreement, self.options)
            self._samples = samples_of(rollout)
            self.seconds = time.perf_counter() - started
            self._facts["write_seconds"] = written - started
            self._facts["score_seconds"] = self.seconds - (written - started)
            yield from steps

    def take_facts(self) -> dict[str, Any]:
        """Return what is known of the last rollout, at its first step; nothing at others."""
        facts, self._facts, self.seconds = self._facts, {}, 0.0
        return facts

    def take_samples(self) -> list[list[str]]:
        """Return the best and the worst answer to a few prompts of the last rollout, at its first step; nothing at others."""
        samples, self._samples = self._samples, []
        return samples

    def is_between(self, phase_step: int) -> bool:
        """Return whether a rollout is done after so many steps of the phase: only then a run may go on from its weights."""
        return phase_step % self.options.updates == 0

    def close(self) -> None:
        """End the processes of rewards."""
        if self.writer.judge is not None:
            self.writer.judge.close()

    def _number(self, phase_step: int) -> int:
        return self.stream.step_of_plan(phase_step) // self.options.updates

    def _write(self, trainer: PhaseTrainer, number: int) -> Rollout:
        """Write a rollout to its end."""
        topology = trainer.topology
        with pulse.current.during(ROLLOUT), trainer.engine.whole_weights():
            rounds = self.writer.write(number, trainer.step)
            # What an earlier start has left, perhaps all.
            rollout = next(rounds)
            for _ in rounds:
                if topology.any_rank(bool(stopping.current.reason)):
                    raise stopping.StopAsked
            self.writer.finish(rollout)
        if not rollout.taught:
            # Else the next start would take it over, and end alike.
            topology.on_main(lambda: self.writer.store.put_aside(number))
            reasons = ", ".join(f"{count} {why}" for why, count in left_out(rollout).items())
            raise UserError(
                f"phases.{trainer.phase_name}: nothing can be learned from rollout {number} of {len(rollout.groups)} prompts:"
                f" {reasons}: take prompts that some answers get right, or look at its shards in {self.writer.store.folder}"
            )
        return rollout

    def _by_step(self, groups: Sequence[Group]) -> list[list[TrainedAnswer]]:
        """Deal groups to the steps of a rollout, in the order of their draws and as evenly as possible."""
        updates, count = self.options.updates, len(groups)
        steps = []
        for step in range(updates):
            mine = groups[step * count // updates : (step + 1) * count // updates]
            steps.append([answer for group in mine for answer in group.learnable()])
        return steps

    def _read(self, trainer: PhaseTrainer, steps: range) -> list[list[PackedBatch]]:
        """Read the micro-batches of all steps of a rollout: they are scored before the first is trained on."""
        share, micro_batch = trainer.topology.share, trainer.phase.micro_batch
        # By a thread: processes would have to be started for each rollout.
        read = iterate(self.stream, steps, share, micro_batch, workers=0)
        return [agree_on_unreadable(batches, trainer.topology) for batches in read]

    def _score(
        self, trainer: PhaseTrainer, steps: Sequence[Sequence[PackedBatch]]
    ) -> Agreement | None:
        """Let the trainer score the answers, and pass the gate; a phase that only distils has none."""
        if not isinstance(trainer.teacher, PolicyLearner):
            return None
        with pulse.current.during(ROLLOUT):
            agreement = trainer.teacher.score(steps)
        agreement.check(self.options.gate, f"phases.{trainer.phase_name}.rl.gate")
        return agreement


def left_out(rollout: Rollout) -> Counter[str]:
    """Count the groups that are not trained on, by the first words of why."""
    counts = Counter(group.left_out.partition(":")[0] for group in rollout.groups if group.left_out)
    if surplus := len(rollout.useful) - len(rollout.taught):
        counts[SURPLUS] = surplus
    return counts


def facts_of(
    rollout: Rollout, agreement: Agreement | None, options: ReinforcementConfig
) -> dict[str, Any]:
    """Return what metrics.jsonl tells of a rollout: means over the answers to all prompts, also those that are left out."""
    answers = [answer for group in rollout.written for answer in group.answers]
    # Samples need not name a task.
    by_task: dict[str, list[float]] = {}
    for group in rollout.written:
        by_task.setdefault(group.task or group.dataset, []).extend(group.totals)
    facts: dict[str, Any] = {
        "rollout": rollout.number,
        "prompts": len(rollout.groups),
        "groups": len(rollout.taught),
        "left_out": dict(sorted(left_out(rollout).items())),
        "reward": mean([answer.total for answer in answers]),
        "reward_by_task": {task: mean(totals) for task, totals in sorted(by_task.items())},
        "reward_by_name": {
            name: mean([answer.rewards[name] for answer in answers]) for name in options.reward
        },
        "pass_rate": mean([group.pass_rate(options.right) for group in rollout.written]),
        "answer_tokens": mean([len(answer.token_ids) for answer in answers]),
        "stopped": mean([answer.stopped for answer in answers]),
        "reward_faults": dict(fault_counts(answers)),
    }
    if agreement is not None:
        facts["log_probability_apart"] = agreement.mean
        facts["log_probability_apart_most"] = agreement.largest
        if agreement.teacher is not None:
            facts["teacher_divergence"] = agreement.teacher
    return facts


def fault_counts(answers: Sequence[WrittenAnswer]) -> Counter[str]:
    """Count what went wrong with rewards, by their names and its kind; whole messages, which may tell of an answer, are in the shards."""
    counts = Counter[str]()
    for answer in answers:
        for name, fault in answer.faults.items():
            counts[f"{name} {fault.partition(':')[0][:FAULT_CHARACTERS]}"] += 1
    return counts


def samples_of(rollout: Rollout) -> list[list[str]]:
    """Return the best and the worst answer to a few prompts, as rows of SAMPLE_COLUMNS."""
    rows = []
    for group in rollout.taught[:PROMPTS_SHOWN]:
        ranked = sorted(group.answers, key=lambda answer: answer.total)
        for answer in (ranked[-1], ranked[0]):
            rows.append([group.question, group.reference, answer.text, f"{answer.total:g}"])
    return rows


def mean(values: Sequence[float]) -> float:
    """Return the mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0
