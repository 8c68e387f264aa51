"""Greedy answers of a model to held-out questions, many at once, in any layout."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from visionloom.data.encode.encode import EncodedSample, extend, prompt_of
from visionloom.data.encode.tokenizer import (
    IMAGE,
    TURN_START,
    VIDEO,
    VISION_END,
    VISION_START,
    Tokenizer,
)
from visionloom.data.stream.batch import PackedBatch, pack_prompts
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.model.rank_share import RankShare
from visionloom.parallel.schedule import run_schedule
from visionloom.parallel.topology import Topology
from visionloom.train.scores import is_right

PICTURE: Final = "\ufffc"
"""Stands for a picture, or for the two frames of a video's temporal patch, in the text of a question."""


@dataclass(frozen=True)
class Prediction:
    """One generated answer."""

    sample: EncodedSample
    text: str
    """The generated text, without its end token."""
    question: str
    """The prompt as a person reads it; see `question_text`."""

    @property
    def correct(self) -> bool:
        """Return whether the answer is right; see `scores.is_right`."""
        return is_right(self.text, self.sample.answer or "")


def question_text(sample: EncodedSample, tokenizer: Tokenizer) -> str:
    """Return the prompt as a person reads it, with PICTURE in the place of each picture or pair of video frames."""
    roles = {tokenizer.special(token): PICTURE for token in (IMAGE, VIDEO)}
    roles |= {tokenizer.special(token): "" for token in (VISION_START, VISION_END)}
    roles[tokenizer.special(TURN_START)] = TURN_START

    turns = [""]
    prompt = sample.input_ids[: sample.prompt_length].tolist()
    for role, group in groupby(prompt, key=roles.get):
        if role == TURN_START:
            turns.append("")
        elif role is not None:
            turns[-1] += role
        else:
            turns[-1] += tokenizer.decode(list(group)).replace(PICTURE, "")

    document, *chat = turns
    speeches = []
    for turn in chat:
        role, _, text = turn.partition("\n")
        if text.strip():
            speeches.append((role.strip(), text.strip()))
    if len(speeches) == 1:
        parts = [text for _, text in speeches]
    else:
        parts = [f"{role}: {text}" for role, text in speeches]
    return "\n".join([document.strip(), *parts]).strip()


@contextmanager
def evaluating(model_parts: list[Qwen3VL]) -> Iterator[None]:
    """Use the model without gradients and training-only work."""
    for part in model_parts:
        part.eval()
    with torch.no_grad():
        yield
    for part in model_parts:
        part.train()


def in_batches(samples: Iterable[EncodedSample], tokens: int) -> Iterator[list[EncodedSample]]:
    """Yield the samples in lists of at most `tokens` tokens, or of one that is longer."""
    batch: list[EncodedSample] = []
    size = 0
    for sample in samples:
        length = len(sample.input_ids)
        if batch and size + length > tokens:
            yield batch
            batch, size = [], 0
        batch.append(sample)
        size += length
    if batch:
        yield batch


class GreedyDecoder:
    """Greedy generation for many prompts at once, packed end to end.

    The reference answer serves as a draft: one pass shows how far greedy decoding would write just that, and only from where
    it leaves the draft are tokens generated one by one. The result is that of greedy decoding from the prompt.
    """

    def __init__(
        self,
        model_parts: list[Qwen3VL],
        topology: Topology,
        tokenizer: Tokenizer,
        max_new_tokens: int,
    ) -> None:
        """Decode with the parts of this rank, at most `max_new_tokens` tokens an answer."""
        self.model_parts = model_parts
        self.topology = topology
        self.tokenizer = tokenizer
        self.limit = max_new_tokens
        self.stop = set(tokenizer.stop_ids)

    def answers(self, samples: Sequence[EncodedSample]) -> list[str]:
        """Return the text that greedy decoding writes after each sample's prompt."""
        with evaluating(self.model_parts):
            written = self._follow_drafts(samples)
            prompts = [prompt_of(sample) for sample in samples]
            # Without a cache of keys: few tokens are left once the drafts were followed.
            while unfinished := self._unfinished(written):
                batch = [extend(prompts[place], written[place]) for place in unfinished]
                following = self._next_tokens(batch, [[-1]] * len(batch))
                for place, tokens in zip(unfinished, following, strict=True):
                    written[place] += tokens
        return [self._text(tokens) for tokens in written]

    def _text(self, tokens: list[int]) -> str:
        """Return the text of an answer, without the token that ended it."""
        kept = [token for token in tokens if token not in self.stop]
        return self.tokenizer.decode(kept)

    def _unfinished(self, written: list[list[int]]) -> list[int]:
        """Return the places of answers that have neither ended nor reached the limit."""
        places = []
        for place, tokens in enumerate(written):
            has_ended = bool(tokens) and tokens[-1] in self.stop
            if not has_ended and (not tokens or len(tokens) < self.limit):
                places.append(place)
        return places

    def _follow_drafts(self, samples: Sequence[EncodedSample]) -> list[list[int]]:
        """Return the tokens of each draft that greedy decoding would write too, and the first one where it would not."""
        drafts = [self._draft(sample) for sample in samples]
        begun, places = [], []
        for sample, draft in zip(samples, drafts, strict=True):
            begun.append(extend(prompt_of(sample), draft))
            first = sample.prompt_length - 1  # the token after this one is the draft's first
            places.append(list(range(first, first + len(draft))))

        written = []
        for draft, chosen in zip(drafts, self._next_tokens(begun, places), strict=True):
            # One more than they share: the first token that greedy decoding writes differently.
            written.append(chosen[: shared_length(draft, chosen) + 1])
        return written

    def _draft(self, sample: EncodedSample) -> list[int]:
        """Return the reference answer up to its end token, at most as much as would be generated."""
        tokens: list[int] = sample.input_ids[sample.prompt_length :][: self.limit].tolist()
        for place, token in enumerate(tokens):
            if token in self.stop:
                return tokens[: place + 1]
        return tokens

    def _next_tokens(
        self,
        samples: Sequence[EncodedSample],
        places: list[list[int]],
    ) -> list[list[int]]:
        """Return the most likely token after each of the places (-1: the last) of each sample."""
        parallel = self.topology.config
        batch, starts = pack_prompts(
            samples,
            self.tokenizer.pad_id,
            parallel.pack_token_multiple,
            parallel.sample_token_multiple,
            self.topology.share,
        )
        rows = []
        for sample, start, own in zip(samples, starts.tolist(), places, strict=True):
            rows += [start + place % len(sample.input_ids) for place in own]
        chosen = iter(next_tokens(self.model_parts, batch, np.array(rows), self.topology).tolist())
        return [[next(chosen) for _ in own] for own in places]


def shared_length(draft: list[int], chosen: list[int]) -> int:
    """Count the tokens that a draft and the chosen ones, at least as many, begin with alike."""
    length = 0
    while length < len(draft) and draft[length] == chosen[length]:
        length += 1
    return length


def next_tokens(
    model_parts: list[Qwen3VL],
    batch: PackedBatch,
    rows: NDArray[np.int64],
    topology: Topology,
) -> Tensor:
    """Return the most likely token after each of the rows (int64 [R]) of a pack, int64 [R] on all ranks."""
    forward = functools.partial(_forward_tokens, rows=rows, topology=topology)
    # Interleaved stages work on as many micro-batches as there are stages: the others are copies.
    copies = [batch] * (topology.config.pipeline if topology.config.chunks > 1 else 1)
    outputs = run_schedule(
        forward, model_parts, copies, topology, forward_only=True, collect_non_loss_data=True
    )
    if outputs:
        ids = outputs[0]
    else:  # not the last stage: it is sent them
        ids = torch.zeros(len(rows), dtype=torch.int64, device=topology.device)
    return topology.from_last_stage(ids)


def _forward_tokens(
    batches: Iterator[PackedBatch], part: Qwen3VL, *, rows: NDArray[np.int64], topology: Topology
) -> tuple[Tensor, Any]:
    """Run one part of the model for `next_tokens`, as Megatron-core's schedule calls it."""
    batch = next(batches)
    inputs = part.prepare(batch)
    if not part.post_process:
        return part(inputs), None
    # Of the pack's rows each context rank holds some: it answers for its own, and the others add zeros.
    tokens = RankShare.of(batch, topology).tokens
    places = np.minimum(np.searchsorted(tokens, rows), len(tokens) - 1)
    mine = torch.from_numpy(np.flatnonzero(tokens[places] == rows)).to(topology.device)
    ids = torch.zeros(len(rows), dtype=torch.int64, device=topology.device)
    logits = part.logits(inputs, torch.from_numpy(places).to(topology.device)[mine])
    ids[mine] = most_likely(logits, topology)
    dist.all_reduce(ids, group=topology.groups.cp)
    return ids, lambda output, non_loss_data: output


def most_likely(logits: Tensor, topology: Topology) -> Tensor:
    """Return the ids int64 [R] of the largest logits [R, V / tensor] over all vocabulary parts."""
    value, index = logits.float().max(dim=1)
    group = topology.groups.tp
    # fp64 holds any id and any fp32 logit exactly, so that one gather carries both.
    index_in_all = index + group.rank() * logits.shape[1]
    own = torch.stack([value.double(), index_in_all.double()])
    parts = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(parts, own, group=group)
    values, ids = torch.stack(parts).unbind(1)
    return ids.gather(0, values.argmax(0, keepdim=True))[0].long()
