"""Measure held-out loss by source, and compare greedy answers with the right ones."""

import functools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from rich.table import Table

from visionloom.common.atomic import replacing
from visionloom.common.text import one_line
from visionloom.data.config import DataConfig
from visionloom.data.encode.encode import prompt_of
from visionloom.data.stream.batch import PackedBatch
from visionloom.data.stream.held_out import EvaluationSet
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.schedule import run_schedule, whole_rounds
from visionloom.parallel.topology import Topology, with_whole_sequences
from visionloom.train.config import EvaluationConfig
from visionloom.train.generation.generator import Generator, evaluating
from visionloom.train.generation.predictions import Prediction, answer_text, question_text
from visionloom.train.generation.sampling import Sampling
from visionloom.train.observe.screen import Screen
from visionloom.train.report.history import NO_TASKS, RESULTS
from visionloom.train.report.needles import NeedleCell, grids_of, place_of
from visionloom.train.report.page import write_report
from visionloom.train.step import forward_losses
from visionloom.train.step_sums import LossSums

BATCHES: Final = 8
"""Held-out packs in host memory at once."""
NUMBERS_PRINTED: Final = 100


@dataclass(frozen=True)
class HeldOut:
    """The held-out data of a run, and how it is packed, weighted and asked."""

    data: DataConfig
    evaluation: EvaluationConfig
    sequence_length: int
    """Tokens of the longest pack that any phase trains on."""
    loss: str
    """Weighting of tokens, as in the last phase."""

    def pack_length(self, layout: ParallelConfig) -> int:
        """Return the tokens of a pack that holds any phase's samples, in a layout that may be another phase's."""
        return self.sequence_length + -self.sequence_length % layout.pack_token_multiple


def held_out_losses(
    held_out: HeldOut, model_parts: list[Qwen3VL], topology: Topology, samples: int, screen: Screen
) -> dict[str, float]:
    """Measure the loss of at most `samples` samples of each validation dataset.

    A dataset without a supervised token has no loss: it is left out, with a warning.
    """
    losses: dict[str, float] = {}
    length = held_out.pack_length(topology.config)
    with evaluating(model_parts):
        for name in held_out.data.validation:
            sums = LossSums.zeros([name], topology.device)
            dataset = EvaluationSet(held_out.data, name, samples)
            packs = dataset.batches(length, 1, held_out.loss, topology.share)
            forward = functools.partial(forward_losses, sums=sums)
            while batches := list(islice(packs, BATCHES)):
                run_schedule(
                    forward,
                    model_parts,
                    whole_rounds(batches, topology, without_weight(batches[0])),
                    topology,
                    forward_only=True,
                )
            sums.reduce(topology)
            _, measured = sums.means()
            if not measured:
                screen.say(
                    f"warning: data.validation.{name} ({held_out.data.validation[name].path}): none of the {len(dataset)} samples"
                    " looked at has a supervised token, so it has no loss: give its answers a loss above 0, or leave it out"
                )
            losses |= measured
    return losses


def without_weight(batch: PackedBatch) -> PackedBatch:
    """Return a batch that adds nothing to a loss."""
    return replace(batch, loss_weights=torch.zeros_like(batch.loss_weights))


def predictions(
    held_out: HeldOut, model_parts: list[Qwen3VL], topology: Topology, name: str, samples: int
) -> Iterator[Prediction]:
    """Yield greedy answers to this rank's share of those of at most `samples` samples of a dataset that have a task."""
    settings = held_out.evaluation
    dataset = EvaluationSet(held_out.data, name, samples)
    tokenizer = dataset.tokenizer
    generator = Generator(model_parts, topology, tokenizer.pad_id, settings.budget)
    questions = dataset.questions(generator.topology.share)
    # Without a task there is no right answer to compare with.
    asked = [question for question in questions if question.task]

    sampling = Sampling(settings.max_new_tokens, tokenizer.stop_ids, temperature=0)
    answers = generator.generate(map(prompt_of, asked), sampling)
    for sample, (answer,) in zip(asked, answers, strict=True):
        text = answer_text(answer.token_ids, tokenizer)
        question, score = question_text(sample, tokenizer), held_out.data.validation[name].score
        yield Prediction(sample, text, question, score)


@dataclass
class Marks:
    """Right answers by task, of all ranks."""

    asked: Counter[str] = field(default_factory=Counter)
    right: Counter[str] = field(default_factory=Counter)
    asked_at: Counter[NeedleCell | None] = field(default_factory=Counter)
    right_at: Counter[NeedleCell | None] = field(default_factory=Counter)
    """Of answers about one place of a long prompt; None: all others."""

    def add(self, answers: list[Prediction], topology: Topology) -> None:
        """Count the answers of all data ranks; all ranks call it together."""
        own = []
        for answer in answers:
            own.append((answer.sample.task, place_of(answer.sample), answer.correct))
        # Ranks of the context axis have answered prompts of their own.
        for part in with_whole_sequences(topology).gather_over_data(own):
            for task, cell, correct in part:
                self.asked[task] += 1
                self.right[task] += correct
                self.asked_at[cell] += 1
                self.right_at[cell] += correct

    def by_task(self) -> dict[str, dict[str, float]]:
        """Return {task: {"accuracy": x, "n": n}}."""
        tasks = {}
        for task, count in sorted(self.asked.items()):
            tasks[task] = {"accuracy": self.right[task] / count, "n": count}
        return tasks


def task_accuracies(
    held_out: HeldOut, model_parts: list[Qwen3VL], topology: Topology, samples: int
) -> dict[str, dict[str, float]]:
    """Answer at most `samples` samples of each validation dataset; return {task: {"accuracy": x, "n": n}} on all ranks."""
    marks = Marks()
    for name in held_out.data.validation:
        answers = list(predictions(held_out, model_parts, topology, name, samples))
        marks.add(answers, topology)
    return marks.by_task()


@dataclass(frozen=True)
class Evaluation:
    """What was measured of a model, and where it is written."""

    folder: Path
    """Of the run."""
    results: dict[str, Any]
    """As of `evaluate_model`; with `command`, {name: number}, once evaluation.command has ended."""
    shown: list[Prediction]
    """Answers for the report."""

    def write(self) -> None:
        """Write eval.json and report.html; the main rank calls it."""
        with replacing(self.folder / RESULTS) as file:
            file.write((json.dumps(self.results, indent=1) + "\n").encode())
        # After eval.json, which the report reads.
        write_report(self.folder, self.shown)


def evaluate_model(
    held_out: HeldOut,
    model_parts: list[Qwen3VL],
    topology: Topology,
    folder: Path,
    step: int,
    screen: Screen,
) -> Evaluation:
    """Evaluate on data.validation: print tables and write eval.json and report.html.

    Args:
        held_out: data and settings.
        model_parts: of this rank's pipeline stage.
        topology: of the model.
        folder: of the run.
        step: optimizer steps that the model was trained for.
        screen: of this rank.

    Returns:
        with the results {"step", "loss": {source: x}, "tasks": {name: {"accuracy": x, "n": n}}, "needles": see `grids_of`}, the
        same on all ranks.
    """
    losses = held_out_losses(held_out, model_parts, topology, held_out.evaluation.samples, screen)
    datasets = held_out.data.validation
    # Rounded up, so that each dataset shows at least one.
    shown_of_each = -(-held_out.evaluation.report_samples // max(1, len(datasets)))
    marks, shown = Marks(), list[Prediction]()
    for name in datasets:
        samples = held_out.evaluation.samples
        answers = list(predictions(held_out, model_parts, topology, name, samples))
        marks.add(answers, topology)
        shown += answers[:shown_of_each]

    results = {"step": step, "loss": losses, "tasks": marks.by_task()}
    results["needles"] = grids_of(marks.asked_at, marks.right_at)
    evaluation = Evaluation(folder, results, shown)
    if topology.is_main:
        evaluation.write()
        if datasets:
            print_results(results, screen)
        else:
            screen.say(
                "nothing is held out to evaluate on: name a dataset with +data.validation.NAME.path=DIR"
            )
        screen.say(f"report: {folder / 'report.html'}")
    return evaluation


def print_results(results: dict[str, Any], screen: Screen) -> None:
    """Print the results as two tables; an empty one is left out, and a line says how to name a task."""
    tasks = Table(
        "task", "accuracy", "samples", title="held-out answers (greedy; boxes at IoU 0.5)"
    )
    for task, result in results["tasks"].items():
        tasks.add_row(task, f"{result['accuracy']:.1%}", str(result["n"]))
    losses = Table("source", "loss", title="held-out loss")
    for source, loss in results["loss"].items():
        losses.add_row(source, f"{loss:.4f}")
    tables = [table for table in (tasks, losses) if table.rows]
    screen.console.print(*tables, end="")
    if not results["tasks"]:
        screen.say(NO_TASKS)


def print_numbers(numbers: Mapping[str, float], screen: Screen) -> None:
    """Print what evaluation.command measured as a table."""
    table = Table("name", "number", title="evaluation.command")
    for name, value in islice(numbers.items(), NUMBERS_PRINTED):
        table.add_row(one_line(name), f"{value:.6g}")
    screen.console.print(table, end="")
    if (more := len(numbers) - NUMBERS_PRINTED) > 0:
        screen.say(f"{more:,} more numbers are in {RESULTS}")
