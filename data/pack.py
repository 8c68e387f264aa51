"""PackedBatch, what the model gets: samples end to end in packs of one length, with labels, weights and boundaries."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from visionloom.data.decode import IMAGE_ROW, VIDEO_ROW, decode_patches, widen
from visionloom.data.encode import EncodedSample, encode, encode_all, extend, prompt_of

__all__ = [
    "EXPONENTS",
    "EncodedSample",
    "PackedBatch",
    "decode_patches",
    "encode",
    "encode_all",
    "extend",
    "pack",
    "pack_prompts",
    "prompt_of",
]

EXPONENTS: Final = {"token": 0.0, "sqrt": 0.5, "sample": 1.0}
"""alpha of the loss sum_s n_s^-alpha sum_t l / sum_s n_s^(1 - alpha), n_s the supervised tokens of sample s.

`sqrt` is named by the Qwen3-VL report (arXiv 2511.21631), the formula is InternVL2.5's square averaging.
"""
IGNORED: Final = -100


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
    """int32 [S + 1]: where segments begin; what a pack does not fill is a segment of its own. The last is T."""
    max_seqlen: int
    """Tokens of the longest segment."""
    patches: Tensor
    """uint8 [N, 768] of images as (channel, row, column), or, with any video, [N, 1536] as (channel, frame, row, column)."""
    grid_thw: Tensor
    """int32 [n, 3]: patches in time, height and width of each picture and video, in token order."""
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

    def to(self, device: torch.device | str) -> "PackedBatch":
        """A copy on a device, without waiting for it."""
        values: dict[str, Any] = {item.name: getattr(self, item.name) for item in fields(self)}
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items() if isinstance(value, Tensor)}
        return PackedBatch(**{**values, **moved})


def pack(
    packs: Sequence[Sequence[EncodedSample]], sequence_length: int, loss: str, source_names: Sequence[str], pad_id: int
) -> PackedBatch:
    """Lay samples, with their patches, end to end: each inner list in one pack of `sequence_length` tokens.

    An empty list makes a pack of nothing but padding. Samples must fit; their `source` must be among `source_names`.
    """
    text = _TextBuffers(sequence_length * len(packs), pad_id)
    names = list(source_names)
    for number, samples in enumerate(packs):
        text.cursor = number * sequence_length
        for sample in samples:
            text.append(sample, EXPONENTS[loss], names.index(sample.source))
        text.close((number + 1) * sequence_length)
    everything = [sample for samples in packs for sample in samples]
    borders = np.array(text.borders, np.int32)
    return PackedBatch(
        input_ids=torch.from_numpy(text.input_ids),
        labels=torch.from_numpy(text.labels),
        loss_weights=torch.from_numpy(text.loss_weights),
        position_ids=torch.from_numpy(text.position_ids),
        cu_seqlens=torch.from_numpy(borders),
        max_seqlen=int(np.diff(borders).max()),
        patches=_patches(everything),
        grid_thw=torch.from_numpy(np.concatenate([np.empty((0, 3), np.int32), *(sample.grids for sample in everything)])),
        visual_rows=torch.from_numpy(np.concatenate([np.empty(0, np.int64), *text.visual_rows])),
        padding_mask=torch.from_numpy(text.padding_mask),
        segment_sources=torch.tensor(text.sources, dtype=torch.int32),
        source_names=tuple(source_names),
        sample_ids=tuple(sample.sample_id for sample in everything),
        supervised_tokens=int(np.count_nonzero(text.labels != IGNORED)),
        real_tokens=int(np.count_nonzero(~text.padding_mask)),
    )


def pack_prompts(prompts: Sequence[EncodedSample], pad_id: int, multiple: int = 1) -> tuple[PackedBatch, Tensor]:
    """Prompts (of `prompt_of` and `extend`) in one pack for generation, and int64 [prompts]: the last row of each.

    The pack is as long as they are together, rounded up to a multiple.
    """
    lengths = np.array([len(prompt.input_ids) for prompt in prompts], np.int64)
    total = -(-int(lengths.sum()) // multiple) * multiple
    sources = sorted({prompt.source for prompt in prompts})
    return pack([prompts], total, "token", sources, pad_id), torch.from_numpy(np.cumsum(lengths) - 1)


class _TextBuffers:
    """The token-wise tensors of a batch while it is filled."""

    def __init__(self, length: int, pad_id: int) -> None:
        self.input_ids = np.full(length, pad_id, np.int64)
        self.labels = np.full(length, IGNORED, np.int64)
        self.loss_weights = np.zeros(length, np.float32)
        self.position_ids = np.zeros((3, length), np.int32)
        self.padding_mask = np.ones(length, bool)
        self.visual_rows: list[np.ndarray[tuple[int], np.dtype[np.int64]]] = []
        self.borders, self.sources = [0], list[int]()
        self.cursor = 0

    def append(self, sample: EncodedSample, alpha: float, source: int) -> None:
        here = slice(self.cursor, self.cursor + len(sample.input_ids))
        predicting = slice(here.start, here.stop - 1)
        weights = sample.target_weights[1:]
        self.input_ids[here] = sample.input_ids
        self.labels[predicting] = np.where(weights > 0, sample.input_ids[1:], IGNORED)
        whole = sample.supervised_tokens if sample.loss_tokens is None else sample.loss_tokens
        self.loss_weights[predicting] = weights * max(1, whole) ** -alpha
        self.position_ids[:, here] = sample.position_ids
        self.padding_mask[here] = False
        self.visual_rows.append(sample.visual_positions + here.start)
        self._end_segment(here.stop, source)

    def close(self, end: int) -> None:
        """What is left of a pack becomes a segment of padding."""
        assert self.cursor <= end, "planned from lengths, so a pack cannot overflow"
        if self.cursor < end:
            self._end_segment(end, -1)

    def _end_segment(self, end: int, source: int) -> None:
        self.borders.append(end)
        self.sources.append(source)
        self.cursor = end


def _patches(samples: list[EncodedSample]) -> Tensor:
    found = [sample.patches for sample in samples if sample.patches is not None and len(sample.patches)]
    width = max((rows.shape[1] for rows in found), default=IMAGE_ROW)
    assert width in (IMAGE_ROW, VIDEO_ROW)
    return torch.from_numpy(np.concatenate([np.empty((0, width), np.uint8), *(widen(rows, width) for rows in found)]))
