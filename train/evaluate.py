"""Held-out loss by source, and answers by greedy generation compared with the right ones."""

import functools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from visionloom.common.atomic import replacing
from visionloom.data.encode.encode import EncodedSample, extend, prompt_of
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.stream.batch import PackedBatch, pack_prompts
from visionloom.data.stream.held_out import EvaluationSet
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.view import RankShare
from visionloom.parallel.config import ParallelConfig
from visionloom.parallel.topology import Topology
from visionloom.train.config import RunConfig
from visionloom.train.progress import Screen
from visionloom.train.report.gallery import question_text
from visionloom.train.report.history import NO_TASKS, RESULTS
from visionloom.train.step import LossSums, encoder_of, forward_losses, run_schedule

THINK_END = "</think>"
BATCHES = 8
"""Held-out packs in host memory at once."""


@dataclass(frozen=True)
class Prediction:
    """One generated answer."""

    sample: EncodedSample
    text: str
    """What was generated, without its end token."""
    question: str
    """The prompt as a person reads it; see `question_text`."""

    @property
    def correct(self) -> bool:
        """Whether the answer equals the reference word for word; thoughts before it are not compared."""
        return final_answer(self.text) == final_answer(self.sample.answer or "")


def final_answer(text: str) -> str:
    """What follows the thoughts, without surrounding white space."""
    return text.rpartition(THINK_END)[2].strip()


def held_out_losses(
    config: RunConfig, topology: Topology, chunks: list[Qwen3VL], samples: int, screen: Screen
) -> dict[str, float]:
    """Loss of at most `samples` samples of each validation dataset, weighted as in the last phase.

    A dataset without a supervised token has no loss and is left out, which is said.
    """
    length = held_out_length(config, topology.config)
    kind = list(config.phases.values())[-1].loss
    losses: dict[str, float] = {}
    with evaluating(chunks):
        for name in config.data.validation:
            sums = LossSums([name], topology.device)
            held_out = EvaluationSet(config.data, name, samples)
            packs = held_out.batches(length, 1, kind, topology.data_rank, topology.data_size, *encoder_of(topology))
            while batches := list(islice(packs, BATCHES)):
                forward = functools.partial(forward_losses, sums=sums)
                run_schedule(forward, chunks, _whole_rounds(batches, topology), topology, forward_only=True)
            sums.reduce(topology)
            measured = sums.means()[1]
            if not measured:
                screen.say(
                    f"warning: data.validation.{name} ({config.data.validation[name].path}): none of the {len(held_out)} samples"
                    " looked at has a supervised token, so it has no loss: give its answers a loss above 0, or leave it out"
                )
            losses |= measured
    return losses


def held_out_length(config: RunConfig, layout: ParallelConfig) -> int:
    """Tokens of a pack that holds what any phase can train on, in a layout that may be another phase's."""
    longest = max(phase.sequence_length for phase in config.phases.values())
    return longest + -longest % layout.pack_token_multiple


@contextmanager
def evaluating(chunks: list[Qwen3VL]) -> Iterator[None]:
    """The model without gradients and training-only work."""
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        yield
    for chunk in chunks:
        chunk.train()


def _whole_rounds(batches: list[PackedBatch], topology: Topology) -> list[PackedBatch]:
    """The batches, and copies without weight until interleaved stages can share them evenly."""
    missing = -len(batches) % topology.config.pipeline if topology.config.chunks > 1 else 0
    return batches + [replace(batches[0], loss_weights=torch.zeros_like(batches[0].loss_weights))] * missing


def predictions(config: RunConfig, topology: Topology, chunks: list[Qwen3VL], name: str) -> Iterator[Prediction]:
    """Greedy answers to this rank's share of a validation dataset's samples that have a task."""
    held_out = EvaluationSet(config.data, name, config.evaluation.samples)
    questions = held_out.questions(topology.data_rank, topology.data_size)
    writer = Writer(chunks, topology, held_out.tokenizer, config.evaluation.max_new_tokens)
    for chunk in _chunks((q for q in questions if q.task), config.evaluation.pack_tokens):
        for sample, text in zip(chunk, writer.answers(chunk), strict=True):
            yield Prediction(sample, text, question_text(sample, held_out.tokenizer))


def _chunks(samples: Iterable[EncodedSample], tokens: int) -> Iterator[list[EncodedSample]]:
    """Samples in lists of at most `tokens` tokens, or of one that is longer."""
    chunk: list[EncodedSample] = []
    for sample in samples:
        if chunk and sum(len(s.input_ids) for s in chunk) + len(sample.input_ids) > tokens:
            yield chunk
            chunk = []
        chunk.append(sample)
    if chunk:
        yield chunk


class Writer:
    """Greedy generation for many prompts at once, packed end to end.

    The reference answer serves as a draft: one pass tells how far greedy decoding would write just that, and only where
    it leaves the draft are tokens generated one by one. The result is that of greedy decoding from the prompt.
    """

    def __init__(self, chunks: list[Qwen3VL], topology: Topology, tokenizer: Tokenizer, max_new_tokens: int) -> None:
        self.chunks, self.topology, self.tokenizer, self.limit = chunks, topology, tokenizer, max_new_tokens
        self.stop = set(tokenizer.stop_ids)

    def answers(self, samples: Sequence[EncodedSample]) -> list[str]:
        """The text that greedy decoding writes after each sample's prompt."""
        with evaluating(self.chunks):
            written = self._follow_drafts(samples)
            prompts = [prompt_of(sample) for sample in samples]
            while open_ := [i for i, tokens in enumerate(written) if not self._finished(tokens)]:
                batch = [extend(prompts[i], written[i]) for i in open_]
                following = self._next_tokens(batch, [[-1]] * len(batch))
                for i, tokens in zip(open_, following, strict=True):
                    written[i] += tokens
        return [self.tokenizer.decode([t for t in tokens if t not in self.stop]) for tokens in written]

    def _finished(self, tokens: list[int]) -> bool:
        return bool(tokens) and (tokens[-1] in self.stop or len(tokens) >= self.limit)

    def _follow_drafts(self, samples: Sequence[EncodedSample]) -> list[list[int]]:
        """The tokens of each draft that greedy decoding would write too, and the first one where it would not."""
        drafts = [self._draft(sample) for sample in samples]
        begun = [extend(prompt_of(sample), draft) for sample, draft in zip(samples, drafts, strict=True)]
        places = [list(range(s.prompt_length - 1, s.prompt_length - 1 + len(d))) for s, d in zip(samples, drafts, strict=True)]
        written = []
        for draft, chosen in zip(drafts, self._next_tokens(begun, places), strict=True):
            agreed = next((i for i, (a, b) in enumerate(zip(draft, chosen, strict=True)) if a != b), len(draft))
            written.append(chosen[: agreed + 1])
        return written

    def _draft(self, sample: EncodedSample) -> list[int]:
        """The reference answer up to its end token, at most as much as would be generated."""
        tokens: list[int] = sample.input_ids[sample.prompt_length :][: self.limit].tolist()
        end = next((i for i, token in enumerate(tokens) if token in self.stop), len(tokens) - 1)
        return tokens[: end + 1]

    def _next_tokens(self, samples: Sequence[EncodedSample], places: list[list[int]]) -> list[list[int]]:
        """The most likely token after each of the places (-1: the last) of each sample."""
        parallel, encoder = self.topology.config, encoder_of(self.topology)
        batch, starts = pack_prompts(
            samples, self.tokenizer.pad_id, parallel.pack_token_multiple, parallel.sample_token_multiple, *encoder
        )
        lengths = [len(sample.input_ids) for sample in samples]
        rows = [int(s) + p % n for s, n, own in zip(starts, lengths, places, strict=True) for p in own]
        chosen = iter(next_tokens(self.chunks, batch, np.array(rows), self.topology).tolist())
        return [[next(chosen) for _ in own] for own in places]


def next_tokens(chunks: list[Qwen3VL], batch: PackedBatch, rows: NDArray[np.int64], topology: Topology) -> Tensor:
    """The most likely token after each of the rows (int64 [R]) of a pack, int64 [R] on all ranks."""
    forward = functools.partial(_forward_tokens, rows=rows, topology=topology)
    # Interleaved stages work on as many micro-batches as there are stages: the others are copies.
    copies = [batch] * (topology.config.pipeline if topology.config.chunks > 1 else 1)
    found = run_schedule(forward, chunks, copies, topology, forward_only=True, collect_non_loss_data=True)
    ids = found[0] if found else torch.zeros(len(rows), dtype=torch.int64, device=topology.device)
    return topology.from_last_stage(ids)


def _forward_tokens(
    batches: Iterator[PackedBatch], chunk: Qwen3VL, *, rows: NDArray[np.int64], topology: Topology
) -> tuple[Tensor, Any]:
    """A chunk's part of `next_tokens`, as Megatron-core's schedule calls it."""
    batch = next(batches)
    inputs = chunk.prepare(batch)
    if not chunk.post_process:
        return chunk(inputs), None
    tokens = RankShare.of(batch, topology).tokens
    places = np.minimum(np.searchsorted(tokens, rows), len(tokens) - 1)
    mine = torch.from_numpy(np.flatnonzero(tokens[places] == rows)).to(topology.device)
    ids = torch.zeros(len(rows), dtype=torch.int64, device=topology.device)
    ids[mine] = most_likely(chunk.logits(inputs, torch.from_numpy(places).to(topology.device)[mine]), topology)
    dist.all_reduce(ids, group=topology.groups.cp)
    return ids, lambda output, non_loss_data: output


def most_likely(logits: Tensor, topology: Topology) -> Tensor:
    """Ids int64 [R] of the largest logits [R, V / tensor] over all vocabulary parts."""
    value, index = logits.float().max(dim=1)
    group = topology.groups.tp
    found = torch.stack([value.double(), (index + group.rank() * logits.shape[1]).double()])
    parts = [torch.empty_like(found) for _ in range(group.size())]
    dist.all_gather(parts, found, group=group)
    values, ids = torch.stack(parts).unbind(1)
    return ids.gather(0, values.argmax(0, keepdim=True))[0].long()


def evaluate_run(
    config: RunConfig, topology: Topology, chunks: list[Qwen3VL], folder: Path, step: int, screen: Screen
) -> dict[str, Any]:
    """Evaluate on data.validation: prints tables and writes eval.json and report.html.

    Returns:
        {"step", "loss": {source: x}, "tasks": {name: {"accuracy": x, "n": n}}}, the same on all ranks.
    """
    losses = held_out_losses(config, topology, chunks, config.evaluation.samples, screen)
    counts: dict[str, list[int]] = {}
    shown: list[Prediction] = []
    for name in config.data.validation:
        found = list(predictions(config, topology, chunks, name))
        for part in topology.gather_over_data([(p.sample.task, p.correct) for p in found]):
            for task, correct in part:
                seen = counts.setdefault(task, [0, 0])
                seen[0] += correct
                seen[1] += 1
        shown += found[: -(-config.evaluation.report_samples // len(config.data.validation))]
    tasks = {task: {"accuracy": right / n, "n": n} for task, (right, n) in sorted(counts.items())}
    results = {"step": step, "loss": losses, "tasks": tasks}
    if topology.is_main:
        from visionloom.train.report.page import write_report

        with replacing(folder / RESULTS) as file:
            file.write((json.dumps(results, indent=1) + "\n").encode())
        write_report(folder, shown)
        if config.data.validation:
            _print(results, screen)
        else:
            screen.say("nothing is held out to evaluate on: name a dataset with +data.validation.NAME.path=DIR")
        screen.say(f"report: {folder / 'report.html'}")
    return results


def _print(results: dict[str, Any], screen: Screen) -> None:
    """The results as two tables, of which an empty one is left out; without tasks a line says how to name one."""
    tasks = Table("task", "accuracy", "samples", title="held-out answers (greedy, exact match)")
    for task, result in results["tasks"].items():
        tasks.add_row(task, f"{result['accuracy']:.1%}", str(result["n"]))
    losses = Table("source", "loss", title="held-out loss")
    for source, loss in results["loss"].items():
        losses.add_row(source, f"{loss:.4f}")
    screen.console.print(*(table for table in (tasks, losses) if table.rows), end="")
    if not results["tasks"]:
        screen.say(NO_TASKS)
