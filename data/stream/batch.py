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
from visionloom.data.plan.deal import deal_units

EXPONENTS: Final = {"token": 0.0, "sqrt": 0.5, "sample": 1.0}
"""alpha of the loss sum_s n_s^-alpha sum_t l / sum_s n_s^(1 - alpha), n_s the supervised tokens of sample s.

`sqrt` is named by the Qwen3-VL report (arXiv 2511.21631), the formula is InternVL2.5's square averaging.
"""
IGNORED: Final = -100
Decode = Callable[[int, Sequence[Unit], NDArray[np.uint8]], bool]
"""Fills the rows of some pictures of a sample, given by its number in the batch; False: they cannot be read."""


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
    segment_sources: Tensor
    """int32 [S]: index into source_names; -1 for padding."""
    source_names: tuple[str, ...]
    sample_ids: tuple[str, ...]
    """One for each segment that is not padding."""
    supervised_tokens: int
    """Tokens with a loss."""
    real_tokens: int
    """Tokens that are not padding."""
    unreadable: Tensor
    """bool [S]: segments whose pictures this rank could not read; here they have no loss, see `without`."""

    @property
    def patch_count(self) -> int:
        """Patches of all units, of every encoder rank."""
        return int(self.grid_thw.prod(1).sum())

    def without(self, segments: Tensor) -> "PackedBatch":
        """A copy in which these segments, bool [S], have no loss.

        Encoder ranks that share a batch see only their own pictures: each must leave out what any of them found unreadable.
        """
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
        """A copy on a device, without waiting for it."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in values.items()
            if isinstance(value, Tensor)
        }
        return PackedBatch(**{**values, **moved})


def pack(
    packs: Sequence[Sequence[EncodedSample]],
    sequence_length: int,
    loss: str,
    source_names: Sequence[str],
    pad_id: int,
    decode: Decode | None = None,
    encoder_rank: int = 0,
    encoder_ranks: int = 1,
    segment_multiple: int = 1,
) -> PackedBatch:
    """Lay samples, with their patches, end to end: each inner list in one pack of `sequence_length` tokens.

    An empty list makes a pack of nothing but padding. Samples must fit; their `source` must be among `source_names`. The
    pictures are dealt to `encoder_ranks` ranks and those of `encoder_rank` are filled in by `decode`, or taken from the
    samples' own patches; a sample whose pictures cannot be read keeps its place without a loss. Each segment is filled up
    with padding to a multiple of `segment_multiple` tokens, for context parallelism: it comes after the sample's tokens, so
    causal attention keeps it from them.
    """
    everything = [sample for samples in packs for sample in samples]
    share = _decode_share(everything, decode or _copied(everything), encoder_rank, encoder_ranks)
    text = _TextBuffers(sequence_length * len(packs), pad_id, segment_multiple)
    names, numbers = list(source_names), iter(range(len(everything)))
    for number, samples in enumerate(packs):
        text.cursor = number * sequence_length
        for sample in samples:
            text.append(
                sample,
                EXPONENTS[loss],
                names.index(sample.source),
                bool(share.unreadable[next(numbers)]),
            )
        text.close((number + 1) * sequence_length)
    borders = np.array(text.borders, np.int32)
    return PackedBatch(
        input_ids=torch.from_numpy(text.input_ids),
        labels=torch.from_numpy(text.labels),
        loss_weights=torch.from_numpy(text.loss_weights),
        position_ids=torch.from_numpy(text.position_ids),
        cu_seqlens=torch.from_numpy(borders),
        max_seqlen=int(np.diff(borders).max()),
        patches=share.patches,
        grid_thw=torch.from_numpy(share.units),
        encoder_ranks=torch.from_numpy(share.owners),
        visual_rows=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *text.visual_rows])),
        padding_mask=torch.from_numpy(text.padding_mask),
        segment_sources=torch.tensor(text.sources, dtype=torch.int32),
        source_names=tuple(source_names),
        sample_ids=tuple(sample.sample_id for sample in everything),
        supervised_tokens=int(np.count_nonzero(text.labels != IGNORED)),
        real_tokens=int(np.count_nonzero(~text.padding_mask)),
        unreadable=torch.tensor(text.unreadable, dtype=torch.bool),
    )


def pack_prompts(
    prompts: Sequence[EncodedSample],
    pad_id: int,
    multiple: int = 1,
    segment_multiple: int = 1,
    encoder_rank: int = 0,
    encoder_ranks: int = 1,
) -> tuple[PackedBatch, NDArray[np.int64]]:
    """Prompts (of `prompt_of` and `extend`) in one pack for generation, and int64 [prompts]: the first row of each.

    The pack is as long as they are together, rounded up to a multiple; for the other arguments see `pack`.
    """
    lengths = np.array([len(prompt.input_ids) for prompt in prompts], np.int64)
    rounded = -(-lengths // segment_multiple) * segment_multiple
    total = -(-int(rounded.sum()) // multiple) * multiple
    sources = sorted({prompt.source for prompt in prompts})
    batch = pack(
        [prompts],
        total,
        "token",
        sources,
        pad_id,
        None,
        encoder_rank,
        encoder_ranks,
        segment_multiple,
    )
    return batch, np.cumsum(rounded) - rounded


class _TextBuffers:
    """The token-wise tensors of a batch while it is filled."""

    def __init__(self, length: int, pad_id: int, multiple: int) -> None:
        self.multiple = multiple
        self.input_ids = np.full(length, pad_id, np.int64)
        self.labels = np.full(length, IGNORED, np.int64)
        self.loss_weights = np.zeros(length, np.float32)
        self.position_ids = np.zeros((3, length), np.int32)
        self.padding_mask = np.ones(length, bool)
        self.visual_rows: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        self.borders, self.sources, self.unreadable = [0], list[int](), list[bool]()
        self.cursor = 0

    def append(self, sample: EncodedSample, alpha: float, source: int, unreadable: bool) -> None:
        here = slice(self.cursor, self.cursor + len(sample.input_ids))
        predicting = slice(here.start, here.stop - 1)
        weights = (
            np.zeros_like(sample.target_weights[1:]) if unreadable else sample.target_weights[1:]
        )
        self.input_ids[here] = sample.input_ids
        self.labels[predicting] = np.where(weights > 0, sample.input_ids[1:], IGNORED)
        whole = sample.supervised_tokens if sample.loss_tokens is None else sample.loss_tokens
        self.loss_weights[predicting] = weights * max(1, whole) ** -alpha
        self.position_ids[:, here] = sample.position_ids
        self.padding_mask[here] = False
        self.visual_rows.append(sample.visual_positions + here.start)
        self._end_segment(here.stop + -len(sample.input_ids) % self.multiple, source, unreadable)

    def close(self, end: int) -> None:
        """What is left of a pack becomes a segment of padding."""
        assert self.cursor <= end, "planned from lengths, so a pack cannot overflow"
        if self.cursor < end:
            self._end_segment(end, -1)

    def _end_segment(self, end: int, source: int, unreadable: bool = False) -> None:
        self.borders.append(end)
        self.sources.append(source)
        self.unreadable.append(unreadable)
        self.cursor = end


@dataclass(frozen=True, slots=True)
class _Share:
    """The units of a batch, and the patches of those that one encoder rank decodes."""

    units: NDArray[np.int32]
    owners: NDArray[np.int32]
    patches: Tensor
    unreadable: NDArray[np.bool_]
    """[samples]"""


def _decode_share(samples: list[EncodedSample], decode: Decode, rank: int, ranks: int) -> _Share:
    """Deal the pictures, and let this rank's be written straight into the one buffer that the batch holds."""
    counts = np.array([len(sample.grids) for sample in samples], np.int64)
    grids = np.concatenate([np.empty((0, 3), np.int32), *(sample.grids for sample in samples)])
    units, media, first, owners = deal_units(grids, ranks)
    sample_of, before = np.repeat(np.arange(len(samples)), counts), np.cumsum(counts) - counts
    mine = np.flatnonzero(owners == rank)
    everything = [one for sample in samples for one in sample.media]
    sizes = units.prod(1, dtype=np.int64)
    patches = _buffer(int(sizes[mine].sum()), row_width([everything[media[unit]] for unit in mine]))
    unreadable, start, rows = np.zeros(len(samples), bool), 0, patches.numpy()
    for number, group in groupby(mine.tolist(), key=lambda unit: int(sample_of[media[unit]])):
        found = list(group)
        wanted = [
            (int(media[unit] - before[number]), int(first[unit]), int(units[unit, 0]))
            for unit in found
        ]
        here = rows[start : start + int(sizes[found].sum())]
        start += len(here)
        if not decode(number, wanted, here):
            here[:] = 0
            unreadable[number] = True
    return _Share(units, owners, patches, unreadable)


def _buffer(rows: int, width: int) -> Tensor:
    """An uninitialised uint8 tensor [rows, width]; in a loader's worker in the memory that it shares with its parent."""
    patches = torch.from_numpy(np.empty((rows, width), np.uint8))
    return patches.share_memory_() if rows and get_worker_info() is not None else patches


def _copied(samples: list[EncodedSample]) -> Decode:
    """Takes the patches from samples that have them already."""

    def copy(number: int, units: Sequence[Unit], out: NDArray[np.uint8]) -> bool:
        sample = samples[number]
        assert sample.patches is not None, "without decode, samples bring their patches"
        frames = sample.grids[:, 1].astype(np.int64) * sample.grids[:, 2]
        starts = np.cumsum(sample.grids[:, 0] * frames) - sample.grids[:, 0] * frames
        runs = [
            (starts[media] + first * frames[media], count * frames[media])
            for media, first, count in units
        ]
        np.concatenate(
            [widen(sample.patches[start : start + size], out.shape[1]) for start, size in runs],
            out=out,
        )
        return True

    return copy
