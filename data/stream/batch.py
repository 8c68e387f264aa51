"""PackedBatch, what the model gets: samples end to end in packs of one length, with labels, weights and boundaries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import get_worker_info

from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.patches import Unit, row_width, widen
from visionloom.data.plan.deal import DealtUnits, deal_units
from visionloom.data.plan.open import StreamOptions
from visionloom.data.stream.answers import TrainedAnswer
from visionloom.data.stream.teacher_store import StoredRows
from visionloom.parallel.share import ALONE, Share

EXPONENTS: Final = {"token": 0.0, "sqrt": 0.5, "sample": 1.0}
"""alpha of the loss sum_s n_s^-alpha sum_t l / sum_s n_s^(1 - alpha), n_s the supervised tokens of sample s.

`sqrt` is named by the Qwen3-VL report (arXiv 2511.21631), the formula is InternVL2.5's square averaging.
"""
IGNORED: Final = -100
"""The label of a token that is not predicted: what the cross entropy of torch leaves out."""
Decode = Callable[[int, Sequence[Unit], NDArray[np.uint8]], bool]
"""Fill the patch rows (uint8 [rows, width]) of some units of a sample, given by its number in the batch; return False
if they cannot be read."""


@dataclass(frozen=True, slots=True)
class TeacherRows:
    """A teacher's k most probable tokens at L tokens of a batch, all that are supervised among them."""

    tokens: Tensor
    """int64 [L], increasing: rows of the batch."""
    ids: Tensor
    """int32 [L, k]."""
    log_probabilities: Tensor
    """float16 or float32 [L, k]."""
    log_rest: Tensor
    """float32 [L]: logarithm of the mass of all other tokens."""


@dataclass(frozen=True, slots=True)
class AnswerRows:
    """What is known of the L tokens of a batch that predict tokens of answers, all that are supervised among them."""

    tokens: Tensor
    """int64 [L], increasing: rows of the batch."""
    answers: Tensor
    """int64 [L]: which of the batch's answers the predicted token belongs to, from 0."""
    advantages: Tensor
    """float32 [L]: how much better the answer is than others to its prompt."""
    log_probabilities: Tensor
    """float32 [L]: of the predicted token, by what wrote it."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """One micro-batch: T tokens in S segments, N patches in n grids, M visual tokens."""

    input_ids: Tensor
    """int64 [T]; the pad id in padding."""
    labels: Tensor
    """int64 [T]: the next token of the same sample, -100 where nothing is supervised."""
    loss_weights: Tensor
    """float32 [T]: weight of predicting the label, times n_s^-alpha; 0 where nothing is supervised."""
    position_ids: Tensor
    """int32 [3, T]: interleaved-MRoPE positions, from 0 in each sample; 0 in padding."""
    cu_seqlens: Tensor
    """int32 [S + 1]: where segments begin; what a pack does not fill is a segment of its own. The last is T. A segment ends
    with padding where data.sample_token_multiple asks for it."""
    max_seqlen: int
    """Tokens of the longest segment."""
    patches: Tensor
    """uint8 [N, 768] of images as (channel, row, column), or, with any video, [N, 1536] as (channel, frame, row, column):
    of the units that this rank encodes, in order."""
    grid_thw: Tensor
    """int32 [n, 3]: patches in time, height and width of each unit, in token order. A unit is a picture or a video; among
    several encoder ranks a video may be cut into several units, runs of its temporal patches."""
    encoder_ranks: Tensor
    """int32 [n]: which of the encoder ranks encodes each unit."""
    visual_rows: Tensor
    """int64 [M]: tokens that receive the merged features, in feature order."""
    padding_mask: Tensor
    """bool [T]: True in padding."""
    segment_datasets: Tensor
    """int32 [S]: index into dataset_names; -1 for padding."""
    dataset_names: tuple[str, ...]
    """Of all datasets of the stream."""
    sample_ids: tuple[str, ...]
    """One for each segment that is not padding."""
    supervised_tokens: int
    """Tokens with a loss."""
    real_tokens: int
    """Tokens that are not padding."""
    unreadable: Tensor
    """bool [S]: segments whose pictures this rank could not read; here they have no loss, see `without`."""
    teacher: TeacherRows | None = None
    """Of a phase with a stored teacher, on ranks that compute losses."""
    answers: AnswerRows | None = None
    """Of a phase that learns from rewards."""

    @property
    def patch_count(self) -> int:
        """Count the patches of all units, of every encoder rank."""
        return int(self.grid_thw.prod(1).sum())

    def without(self, segments: Tensor) -> "PackedBatch":
        """Return a copy in which these segments, bool [S], have no loss.

        Encoder ranks that share a batch see only their own pictures: each must leave out what any of them found unreadable.
        """
        # the lengths of segments add up to all tokens
        silent = torch.repeat_interleave(segments, self.cu_seqlens.diff())
        labels = self.labels.masked_fill(silent, IGNORED)
        weights = self.loss_weights.masked_fill(silent, 0.0)
        return replace(
            self,
            labels=labels,
            loss_weights=weights,
            supervised_tokens=int((labels != IGNORED).sum()),
        )

    def to(self, device: torch.device | str) -> "PackedBatch":
        """Return a copy on a device, without waiting for it."""
        values: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                value = value.to(device, non_blocking=True)
            values[item.name] = value
        return PackedBatch(**values)


@dataclass(frozen=True, slots=True)
class PackLayout:
    """How samples are laid into packs: the same for all batches of a stream."""

    sequence_length: int
    """Tokens of a pack."""
    loss: str
    """A name of EXPONENTS."""
    dataset_names: tuple[str, ...]
    """Of all datasets that samples may come from."""
    pad_id: int
    sample_token_multiple: int = 1
    """Each sample is filled up with padding to a multiple of this many tokens, for context parallelism."""

    @classmethod
    def of(cls, options: StreamOptions, names: tuple[str, ...], pad_id: int) -> "PackLayout":
        """Return the layout of a stream over datasets of these names."""
        multiple = options.data.sample_token_multiple
        return cls(options.sequence_length, options.loss, names, pad_id, multiple)


def pack(
    packs: Sequence[Sequence[EncodedSample]],
    layout: PackLayout,
    decode: Decode | None = None,
    share: Share = ALONE,
) -> PackedBatch:
    """Lay samples, with their patches, end to end: each inner list in one pack.

    An empty list makes a pack of padding only. The padding that fills a sample up to the layout's multiple comes after
    its tokens, so causal attention keeps it from them.

    Args:
        packs: samples that fit their pack; the `dataset` of each is among the layout's names.
        layout: of the packs.
        decode: fills in the pictures; None: the samples bring their patches.
        share: which of the pictures, dealt to its encoder ranks, are filled in. A sample whose pictures cannot be read
            keeps its place without a loss.
    """
    samples = [sample for one in packs for sample in one]
    # pictures first: a sample whose pictures cannot be read has no labels
    visual = _decode_share(samples, decode or _PatchCopier(samples), share)
    text = _TextBuffers(len(packs), layout)
    text.lay_out(packs, visual.unreadable)
    borders = np.array(text.borders, np.int32)
    visual_rows = np.concatenate([np.empty(0, np.int64), *text.visual_rows])

    return PackedBatch(
        input_ids=torch.from_numpy(text.input_ids),
        labels=torch.from_numpy(text.labels),
        loss_weights=torch.from_numpy(text.loss_weights),
        position_ids=torch.from_numpy(text.position_ids),
        cu_seqlens=torch.from_numpy(borders),
        max_seqlen=int(np.diff(borders).max()),
        patches=visual.patches,
        grid_thw=torch.from_numpy(visual.dealt.units),
        encoder_ranks=torch.from_numpy(visual.dealt.owners),
        visual_rows=torch.from_numpy(visual_rows),
        padding_mask=torch.from_numpy(text.padding_mask),
        segment_datasets=torch.tensor(text.datasets, dtype=torch.int32),
        dataset_names=layout.dataset_names,
        sample_ids=tuple(sample.sample_id for sample in samples),
        supervised_tokens=int(np.count_nonzero(text.labels != IGNORED)),
        real_tokens=int(np.count_nonzero(~text.padding_mask)),
        unreadable=torch.tensor(text.unreadable, dtype=torch.bool),
    )


def with_teacher(
    batch: PackedBatch, samples: Sequence[EncodedSample], rows: Sequence[StoredRows | None]
) -> PackedBatch:
    """Return a batch with what a teacher says of its samples; None: nothing, as of one without a supervised token."""
    # padding has a segment, and no sample
    starts = batch.cu_seqlens[:-1][batch.segment_datasets >= 0].tolist()
    tokens, said = list[NDArray[np.int64]](), list[StoredRows]()
    for start, sample, own in zip(starts, samples, rows, strict=True):
        if own is not None:
            # the token before a supervised one predicts it
            tokens.append(start - 1 + np.flatnonzero(sample.target_weights > 0))
            said.append(own)
    if not said:
        return replace(batch, teacher=_NOTHING_SAID)
    joined = StoredRows.joined(said)
    arrays = np.concatenate(tokens), joined.ids, joined.log_probabilities, joined.log_rest
    return replace(batch, teacher=TeacherRows(*map(torch.from_numpy, arrays)))


def with_answers(batch: PackedBatch, answers: Sequence[TrainedAnswer]) -> PackedBatch:
    """Return a batch with what is known of its samples, each the prompt and the tokens of one of these answers."""
    # padding has a segment, and no sample
    starts = batch.cu_seqlens[:-1][batch.segment_datasets >= 0].tolist()
    rows = [np.empty((4, 0))]
    for number, (start, answer) in enumerate(zip(starts, answers, strict=True)):
        count = len(answer.token_ids)
        # the token before one predicts it
        first = start + answer.prompt.tokens - 1
        known = [np.full(count, number), answer.advantages, answer.log_probabilities]
        rows.append(np.array([np.arange(first, first + count), *known]))
    # fp64 holds rows and fp32 numbers exactly
    tokens, numbers, advantages, log_probabilities = torch.from_numpy(np.concatenate(rows, 1))
    return replace(
        batch,
        answers=AnswerRows(
            tokens.long(), numbers.long(), advantages.float(), log_probabilities.float()
        ),
    )


_NOTHING_SAID: Final = TeacherRows(
    torch.empty(0, dtype=torch.int64),
    torch.empty(0, 1, dtype=torch.int32),
    torch.empty(0, 1),
    torch.empty(0),
)
"""Of a batch of padding."""


def pack_prompts(
    prompts: Sequence[EncodedSample],
    pad_id: int,
    pack_multiple: int = 1,
    sample_multiple: int = 1,
    share: Share = ALONE,
) -> tuple[PackedBatch, NDArray[np.int64]]:
    """Lay prompts (of `prompt_of` and `extend`) into one pack for generation.

    The pack is as long as they are together, rounded up to `pack_multiple`; each takes up a multiple of `sample_multiple`.

    Returns:
        the pack, and int64 [prompts]: the first row of each.
    """
    lengths = np.array([len(prompt.input_ids) for prompt in prompts], np.int64)
    rounded = -(-lengths // sample_multiple) * sample_multiple
    total = int(rounded.sum())
    total += -total % pack_multiple
    names = tuple(sorted({prompt.dataset for prompt in prompts}))
    layout = PackLayout(total, "token", names, pad_id, sample_multiple)
    return pack([prompts], layout, share=share), np.cumsum(rounded) - rounded


def pack_tokens(
    input_ids: Sequence[int], positions: Sequence[int], pad_id: int, pack_multiple: int = 1
) -> PackedBatch:
    """Lay one text token of each of several sequences, with its position, into one pack: a segment each.

    The pack is as long as there are tokens, at least 1, rounded up to `pack_multiple`.
    """
    count = len(input_ids)
    total = max(1, count)
    total += -total % pack_multiple
    borders = [*range(count), count]
    if total > count:
        borders.append(total)

    padding = pack([[]], PackLayout(total, "token", (), pad_id))
    padding.input_ids[:count] = torch.tensor(input_ids, dtype=torch.int64)
    padding.position_ids[:, :count] = torch.tensor(positions, dtype=torch.int32)
    padding.padding_mask[:count] = False
    segments = len(borders) - 1
    return replace(
        padding,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
        max_seqlen=max(1, total - count),
        segment_datasets=torch.full((segments,), -1, dtype=torch.int32),
        real_tokens=count,
        unreadable=torch.zeros(segments, dtype=torch.bool),
    )


# ---- tokens


class _TextBuffers:
    """The token-wise tensors of a batch while it is filled."""

    def __init__(self, packs: int, layout: PackLayout) -> None:
        length = packs * layout.sequence_length
        self.layout = layout
        self.multiple, self.alpha = layout.sample_token_multiple, EXPONENTS[layout.loss]
        self.input_ids = np.full(length, layout.pad_id, np.int64)
        self.labels = np.full(length, IGNORED, np.int64)
        self.loss_weights = np.zeros(length, np.float32)
        self.position_ids = np.zeros((3, length), np.int32)
        self.padding_mask = np.ones(length, bool)
        self.visual_rows: list[NDArray[np.int64]] = []
        self.borders = [0]
        self.datasets: list[int] = []
        self.unreadable: list[bool] = []
        self.cursor = 0

    def lay_out(
        self,
        packs: Sequence[Sequence[EncodedSample]],
        unreadable: NDArray[np.bool_],
    ) -> None:
        """Write all samples of the packs; `unreadable`: bool [samples]."""
        numbers = iter(range(len(unreadable)))
        for place, samples in enumerate(packs, start=1):
            for sample in samples:
                dataset = self.layout.dataset_names.index(sample.dataset)
                self.append(sample, dataset, bool(unreadable[next(numbers)]))
            self.close(place * self.layout.sequence_length)

    def append(self, sample: EncodedSample, dataset: int, unreadable: bool) -> None:
        """Write a sample at the cursor."""
        here = slice(self.cursor, self.cursor + len(sample.input_ids))
        # the last token predicts nothing: what follows it is another sample
        predicting = slice(here.start, here.stop - 1)
        weights = sample.target_weights[1:]
        if unreadable:
            weights = np.zeros_like(weights)

        self.input_ids[here] = sample.input_ids
        self.labels[predicting] = np.where(weights > 0, sample.input_ids[1:], IGNORED)
        # a part of a sample weighs as the whole sample does
        supervised = sample.supervised_tokens if sample.loss_tokens is None else sample.loss_tokens
        self.loss_weights[predicting] = weights * max(1, supervised) ** -self.alpha
        self.position_ids[:, here] = sample.position_ids
        self.padding_mask[here] = False
        self.visual_rows.append(sample.visual_positions + here.start)
        # its own padding belongs to the segment, so that segments begin at multiples
        filling = -len(sample.input_ids) % self.multiple
        self._end_segment(here.stop + filling, dataset, unreadable)

    def close(self, end: int) -> None:
        """Make what is left of a pack a segment of padding."""
        assert self.cursor <= end, "planned from lengths, so a pack cannot overflow"
        if self.cursor < end:
            self._end_segment(end, -1)

    def _end_segment(self, end: int, dataset: int, unreadable: bool = False) -> None:
        self.borders.append(end)
        self.datasets.append(dataset)
        self.unreadable.append(unreadable)
        self.cursor = end


# ---- pictures


@dataclass(frozen=True, slots=True)
class _DecodedUnits:
    """The units of a batch, and the patches of those that one encoder rank decodes."""

    dealt: DealtUnits
    patches: Tensor
    """uint8 [N, 768 or 1536]."""
    unreadable: NDArray[np.bool_]
    """[samples]"""


def _decode_share(samples: list[EncodedSample], decode: Decode, share: Share) -> _DecodedUnits:
    """Deal the pictures, and have this rank's written straight into the one buffer that the batch holds."""
    # every rank works out the same deal, so none has to be told
    dealt = deal_units(all_grids(samples), share.encoder_ranks)
    mine = np.flatnonzero(dealt.owners == share.encoder_rank)
    sizes = dealt.units.prod(1, dtype=np.int64)
    media = [medium for sample in samples for medium in sample.media]
    # rows of images alone are half as wide
    width = row_width([media[dealt.media[unit]] for unit in mine])
    patches = _buffer(int(sizes[mine].sum()), width)

    counts = np.array([len(sample.grids) for sample in samples], np.int64)
    first_medium = np.cumsum(counts) - counts
    sample_of_unit = np.repeat(np.arange(len(samples)), counts)[dealt.media]
    unreadable, start, rows = np.zeros(len(samples), bool), 0, patches.numpy()
    for number, group in groupby(mine.tolist(), key=sample_of_unit.item):
        units = list(group)
        here = rows[start : start + int(sizes[units].sum())]
        start += len(here)
        if not decode(number, dealt.runs_of(units, int(first_medium[number])), here):
            # the buffer is uninitialised memory
            here[:] = 0
            unreadable[number] = True
    return _DecodedUnits(dealt, patches, unreadable)


def all_grids(samples: Sequence[EncodedSample]) -> NDArray[np.int32]:
    """Return the patches in time, height and width of all pictures and videos, int32 [g, 3]."""
    # the empty one for samples without any
    none = np.empty((0, 3), np.int32)
    return np.concatenate([none, *(sample.grids for sample in samples)])


def _buffer(rows: int, width: int) -> Tensor:
    """Return an uninitialised uint8 tensor [rows, width].

    In a worker of a loader it is in the memory that it shares with its parent, which saves a copy of the largest tensor.
    """
    patches = torch.from_numpy(np.empty((rows, width), np.uint8))
    return patches.share_memory_() if rows and get_worker_info() is not None else patches


@dataclass(frozen=True, slots=True)
class _PatchCopier:
    """Takes the patches from samples that have them already, in place of decoding."""

    samples: list[EncodedSample]

    def __call__(
        self,
        number: int,
        units: Sequence[Unit],
        out: NDArray[np.uint8],
    ) -> bool:
        """Copy the patches of these units of a sample; return True, as nothing is unreadable."""
        sample = self.samples[number]
        assert sample.patches is not None, "without decode, samples bring their patches"
        frames = sample.grids[:, 1].astype(np.int64) * sample.grids[:, 2]
        sizes = sample.grids[:, 0] * frames
        starts = np.cumsum(sizes) - sizes

        rows = []
        for medium, first, count in units:
            start = starts[medium] + first * frames[medium]
            stop = start + count * frames[medium]
            rows.append(widen(sample.patches[start:stop], out.shape[1]))
        np.concatenate(rows, out=out)
        return True
