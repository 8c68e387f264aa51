"""Generate answers to many prompts at once, in the layout that the model trains in.

Prompts enter packed end to end; then every sequence grows by a token a pass, with its keys and values cached. What has ended
leaves its place to the next prompts. Token ids go in and come out, never text.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from visionloom.common import pulse
from visionloom.data.encode.encode import EncodedSample
from visionloom.data.stream.batch import PackedBatch, pack_prompts, pack_tokens
from visionloom.model.attention import Context
from visionloom.model.cache import (
    DecodingContext,
    KeptRows,
    KeyValueCache,
    LayerCache,
    PromptContext,
)
from visionloom.model.qwen3vl import Qwen3VL
from visionloom.parallel.collectives import gathered
from visionloom.parallel.device import to_device
from visionloom.parallel.schedule import run_schedule, whole_rounds
from visionloom.parallel.topology import Topology, with_whole_sequences
from visionloom.train.generation.config import Budget
from visionloom.train.generation.sampling import Sampling, answer_key, choose_tokens, token_key

PASSES: Final = 64
"""Between two questions whether any rank has work: seconds, and no share of the time."""
WAITING: Final = "waiting for other ranks"
"""Part of a rollout or an evaluation, for signs of life."""

MakeContext = Callable[[Context, Iterator[LayerCache]], PromptContext | DecodingContext]
"""Makes the attention of a pass from that of its pack and the caches of the layers."""


@dataclass(frozen=True)
class Answer:
    """One answer to a prompt."""

    token_ids: list[int]
    """The last is the one that ended it, where one did."""
    log_probabilities: list[float]
    """Of each token by the model's own distribution: minus the loss that training has for it."""
    sampling_log_probabilities: list[float]
    """Of each token by the distribution that it was drawn from: with its temperature, top_k and top_p."""
    is_stopped: bool
    """A stop token ended it, not the limit."""


@contextmanager
def evaluating(model_parts: list[Qwen3VL]) -> Iterator[None]:
    """Use the model without gradients and training-only work."""
    for part in model_parts:
        part.eval()
    with torch.no_grad():
        yield
    for part in model_parts:
        part.train()


class Generator:
    """A model that answers."""

    def __init__(
        self, model_parts: list[Qwen3VL], topology: Topology, pad_id: int, budget: Budget
    ) -> None:
        """Answer with the parts of this rank, in their layout; context ranks answer prompts of their own."""
        self.model_parts = model_parts
        self.topology = with_whole_sequences(topology)
        """The layout of generation: whose `share` the prompts of a rank are."""
        self.pad_id = pad_id
        self.budget = budget

    def generate(self, prompts: Iterable[EncodedSample], sampling: Sampling) -> list[list[Answer]]:
        """Return the answers to this data rank's prompts, in their order.

        All ranks call it as often, a data rank without prompts too: a mixture's experts are passed through together.

        Args:
            prompts: with their patches, cut where the answer begins (`prompt_of`); taken one by one, when there is room.
            sampling: of all prompts.
        """
        layouts = [part.topology for part in self.model_parts]
        with evaluating(self.model_parts):
            for part in self.model_parts:
                part.topology = self.topology
            try:
                return _Generation(self, prompts, sampling).run()
            finally:
                for part, layout in zip(self.model_parts, layouts, strict=True):
                    part.topology = layout


@dataclass(frozen=True)
class _Request:
    """Answers that are wanted to a prompt."""

    number: int
    """Of the prompt."""
    prompt: EncodedSample
    answers: range

    @property
    def length(self) -> int:
        """Return the tokens of the prompt."""
        return len(self.prompt.input_ids)


@dataclass
class _Sequence:
    """A prompt with the answer that grows after it."""

    prompt: int
    """Number of the prompt."""
    answer: int
    """Number of the answer to it."""
    key: np.uint64
    """Of the answer's draws."""
    cached: int
    """Tokens whose keys and values are cached: all but the newest."""
    position: int
    """Rotary position of the newest token: a picture takes fewer than its tokens."""
    limit: int
    """Tokens that it may have in all."""
    tokens: list[int] = field(default_factory=list)
    log_probabilities: list[float] = field(default_factory=list)
    sampling_log_probabilities: list[float] = field(default_factory=list)

    def add(self, token: float, log_probability: float, sampling_log_probability: float) -> None:
        """Add a drawn token."""
        self.tokens.append(int(token))
        self.log_probabilities.append(log_probability)
        self.sampling_log_probabilities.append(sampling_log_probability)
        self.position += 1


class _Generation:
    """The sequences of one call of `generate`: the n-th has place n of the caches."""

    def __init__(
        self, model: Generator, prompts: Iterable[EncodedSample], sampling: Sampling
    ) -> None:
        self.model, self.sampling = model, sampling
        self.topology = model.topology
        self.answers: list[list[Answer | None]] = []
        self.requests = self._requests(prompts)
        self.coming = next(self.requests, None)
        self.sequences: list[_Sequence] = []
        self.is_filling = True
        """Prompts enter one pack after the other, until there is no room."""
        self.most = 0
        """Sequences when there was no room."""
        self.caches = {part: self._cache_of(part) for part in model.model_parts}

    def _cache_of(self, part: Qwen3VL) -> KeyValueCache:
        text = part.model_config.text
        heads = text.kv_heads // self.topology.config.tensor
        weight = next(part.language_model.decoder.parameters())
        return KeyValueCache(part.language_model.layers, heads, text.head_dim, weight)

    def _requests(self, prompts: Iterable[EncodedSample]) -> Iterator[_Request]:
        """Yield the answers that are wanted, in groups for which a cache has room."""
        count = self.sampling.answers
        for number, prompt in enumerate(prompts):
            self.answers.append([None] * count)
            longest = len(prompt.input_ids) + self.sampling.max_new_tokens
            together = max(1, self.model.budget.cache_tokens // longest)
            for first in range(0, count, together):
                yield _Request(number, prompt, range(first, min(first + together, count)))

    def run(self) -> list[list[Answer]]:
        """Generate until every answer of every rank has ended."""
        text = self.model.model_parts[0].model_config.text
        # The dispatch of experts is a collective of all data ranks that share them: each takes as many passes.
        is_together = bool(text.experts) and self.topology.groups.tp_ep.size() > 1
        # Others come together now and then: one that is done early would else wait for the slowest in silence, longer than
        # any collective may take.
        passes = 1 if is_together else PASSES
        while self._is_any_at_work():
            for _ in range(passes):
                if self._has_work or is_together:
                    self._pass()
        return [[one for one in some if one is not None] for some in self.answers]

    def _is_any_at_work(self) -> bool:
        """Return whether any rank has work, after a sign of life: waiting for others is no hang."""
        with pulse.current.at(WAITING):
            return self.topology.any_rank(self._has_work)

    @property
    def _has_work(self) -> bool:
        return bool(self.sequences) or self.coming is not None

    def _pass(self) -> None:
        """Run new prompts, or the newest tokens."""
        if joining := self._joining():
            self._enter(joining)
        else:
            self._grow()
        self._retire()

    def _joining(self) -> list[_Request]:
        """Take the requests that there is room for, once half of the places are free."""
        count = len(self.sequences)
        if not self.is_filling and count > self.most // 2:
            return []
        self.is_filling = True
        joining: list[_Request] = []
        tokens = 0
        longest = max((sequence.limit for sequence in self.sequences), default=0)
        while self.coming is not None:
            request = self.coming
            longest = max(longest, request.length + self.sampling.max_new_tokens)
            count += len(request.answers)
            tokens += request.length
            has_no_room = count * longest > self.model.budget.cache_tokens
            if (joining or self.sequences) and has_no_room:
                self.most = count - len(request.answers)
                self.is_filling = False
                break
            if joining and tokens > self.model.budget.pack_tokens:
                break
            joining.append(request)
            self.coming = next(self.requests, None)
        return joining

    def _enter(self, requests: Sequence[_Request]) -> None:
        """Run the prompts, packed, and draw the first token of each answer."""
        batch, starts = pack_prompts(
            [request.prompt for request in requests],
            self.model.pad_id,
            self.topology.config.pack_token_multiple,
            share=self.topology.share,
        )
        first = len(self.sequences)
        beginnings = []
        for request, start in zip(requests, starts.tolist(), strict=True):
            for answer in request.answers:
                beginnings.append((start, request.length))
                self.sequences.append(self._sequence(request, answer))

        # The last row of a prompt predicts the first token of each answer to it.
        begin, lengths = np.array(beginnings).T
        kept = KeptRows.build(begin, lengths, first, self.topology.device)
        ends = (begin + lengths - 1).tolist()

        def context(packed: Context, layers: Iterator[LayerCache]) -> PromptContext:
            return PromptContext(packed, layers, kept)

        self._draw(batch, context, ends, self.sequences[first:])

    def _sequence(self, request: _Request, answer: int) -> _Sequence:
        prompt = request.prompt
        return _Sequence(
            prompt=request.number,
            answer=answer,
            key=answer_key(self.sampling.seed, prompt.sample_id, answer),
            cached=request.length,
            position=int(prompt.position_ids.max()),
            limit=request.length + self.sampling.max_new_tokens,
        )

    def _grow(self) -> None:
        """Run the newest token of each sequence, and draw the next; without sequences it only takes part."""
        sequences = self.sequences
        batch = pack_tokens(
            [sequence.tokens[-1] for sequence in sequences],
            [sequence.position for sequence in sequences],
            self.model.pad_id,
            self.topology.config.pack_token_multiple,
        )
        positions = np.array([sequence.cached for sequence in sequences], np.int64)
        # Counted here and not in the pass, which interleaved stages repeat.
        for sequence in sequences:
            sequence.cached += 1

        def context(packed: Context, layers: Iterator[LayerCache]) -> DecodingContext:
            return DecodingContext.build(layers, positions, self.topology.device)

        self._draw(batch, context, [*range(len(sequences))], sequences)

    def _draw(
        self,
        batch: PackedBatch,
        context: MakeContext,
        rows: list[int],
        sequences: Sequence[_Sequence],
    ) -> None:
        """Run a pack, and give each sequence the token that is drawn after its row."""
        longest = max((sequence.cached for sequence in self.sequences), default=0)
        for cache in self.caches.values():
            cache.reserve(len(self.sequences), longest)
        keys = [token_key(sequence.key, len(sequence.tokens)) for sequence in sequences]
        forward = functools.partial(self._run_part, context=context, rows=rows, keys=keys)
        outputs = self._run(forward, batch)
        if not rows:
            return

        chosen = torch.zeros(3, len(rows), dtype=torch.float64, device=self.topology.device)
        # Stages before the last are sent them.
        chosen = self.topology.from_last_stage(outputs[0] if outputs else chosen)
        for sequence, drawn in zip(sequences, chosen.t().tolist(), strict=True):
            sequence.add(*drawn)

    def _run(self, forward: Callable[..., Any], batch: PackedBatch) -> list[Tensor]:
        """Run a pack through all stages; return what was drawn on the last, as often as it was run, nothing on others."""
        return run_schedule(
            forward,
            self.model.model_parts,
            whole_rounds([batch], self.topology),
            self.topology,
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _run_part(
        self,
        batches: Iterator[PackedBatch],
        part: Qwen3VL,
        *,
        context: MakeContext,
        rows: list[int],
        keys: list[int],
    ) -> tuple[Tensor, Any]:
        """Run one part of the model, as Megatron-core's schedule calls it; the last draws tokens."""
        inputs = part.prepare(next(batches))
        packed = inputs.packed
        packed.context = context(packed.context, iter(self.caches[part].layers))
        if not part.post_process:
            return part(inputs), None

        logits = part.logits(inputs, self._on_device(rows))
        # Without rows no rank of this copy of the model gathers.
        if rows:
            whole = gathered(logits, self.topology.groups.tp)
            logits = choose_tokens(whole, self._on_device(keys), self.sampling)
        return logits, lambda output, non_loss_data: output

    def _on_device(self, numbers: list[int]) -> Tensor:
        return to_device(torch.tensor(numbers, dtype=torch.int64), self.topology.device)

    def _retire(self) -> None:
        """Take out the answers that have ended; the last sequence moves into the free place."""
        for place in reversed(range(len(self.sequences))):
            sequence = self.sequences[place]
            is_stopped = sequence.tokens[-1] in self.sampling.stop_ids
            if not is_stopped and len(sequence.tokens) < self.sampling.max_new_tokens:
                continue
            self.answers[sequence.prompt][sequence.answer] = Answer(
                sequence.tokens,
                sequence.log_probabilities,
                sequence.sampling_log_probabilities,
                is_stopped,
            )
            last = self.sequences.pop()
            if last is not sequence:
                self.sequences[place] = last
                for cache in self.caches.values():
                    cache.move(len(self.sequences), place)
