"""From samples to token ids, loss weights and positions: everything of a sample but its pixels. Imports no torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from visionloom.data.config import MediaConfig
from visionloom.data.encode.chat import Piece, Rendering, render
from visionloom.data.encode.geometry import MERGE_SIZE, Grid
from visionloom.data.encode.tokenizer import IMAGE, VIDEO, Tokenizer
from visionloom.data.shards.sample import Image, Sample, Video


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A sample of n tokens, m of them visual, with g pictures or videos."""

    sample_id: str
    dataset: str
    """Name of its dataset."""
    task: str | None
    input_ids: NDArray[np.int32]
    """[n]"""
    target_weights: NDArray[np.float32]
    """[n] weight of predicting token t itself; 0 where it is not supervised, and at t = 0, which nothing predicts."""
    position_ids: NDArray[np.int32]
    """[3, n] interleaved-MRoPE positions: time, height, width."""
    visual_positions: NDArray[np.int64]
    """[m] tokens that receive the merged features, in feature order."""
    grids: NDArray[np.int32]
    """[g, 3] patches in time, height, width."""
    media: tuple[Image | Video, ...]
    """[g] what to decode."""
    answer: str | None
    """Text of the last assistant turn."""
    prompt_length: int
    """Tokens up to and including the last `<|im_start|>assistant` and its newline; n if there is none."""
    patches: NDArray[np.uint8] | None = None
    """[patches of all grids, 768] or, with a video, [..., 1536]; None until decoded."""
    loss_tokens: int | None = None
    """n_s of the loss: supervised tokens of the whole sample where this is a part of one; None: supervised_tokens."""

    @property
    def patch_count(self) -> int:
        """Patches of all its pictures and videos."""
        return int(self.grids.prod(1).sum())

    @property
    def supervised_tokens(self) -> int:
        """Tokens with a loss: those of a weight above 0, as a batch has labels for."""
        return int(np.count_nonzero(self.target_weights > 0))


def encode(
    sample: Sample, tokenizer: Tokenizer, rules: MediaConfig, dataset: str = ""
) -> EncodedSample:
    """Encode one sample; see `encode_all`."""
    return encode_all([sample], tokenizer, rules, [dataset])[0]


def encode_all(
    samples: Sequence[Sample], tokenizer: Tokenizer, rules: MediaConfig, datasets: Sequence[str]
) -> list[EncodedSample]:
    """Encode samples, each of the dataset named in `datasets`, and tokenise them in one call.

    Raises SampleError for one that cannot be rendered.
    """
    return list(encode_each(samples, tokenizer, rules, datasets))


def encode_each(
    samples: Sequence[Sample], tokenizer: Tokenizer, rules: MediaConfig, datasets: Sequence[str]
) -> Iterator[EncodedSample]:
    """As `encode_all`, with one of them in memory at a time."""
    renderings = [render(sample, rules) for sample in samples]
    runs = [_runs(rendering.pieces) for rendering in renderings]
    known = _tokenise({texts for found in runs for _, texts in found if texts}, tokenizer)
    for sample, rendering, found, dataset in zip(samples, renderings, runs, datasets, strict=True):
        yield _assemble(sample, rendering, found, known, tokenizer, dataset)


def positions(length: int, blocks: Sequence[tuple[int, int, int]]) -> NDArray[np.int32]:
    """Interleaved-MRoPE positions int32 [3, length] of one sample, from 0.

    `blocks` holds (first token, merged height, merged width) of each image or temporal patch. Text counts up on all
    axes; a block keeps one time, spans height and width, and moves on by the larger of the two. Source: `get_rope_index`
    of transformers' Qwen3VLModel.
    """
    out = np.empty((3, length), np.int32)
    cursor = position = 0
    for start, height, width in blocks:
        out[:, cursor:start] = np.arange(position, position + start - cursor)
        position += start - cursor
        cursor = start + height * width
        grid = out[:, start:cursor].reshape(3, height, width)
        grid[0] = position
        grid[1] = np.arange(position, position + height)[:, None]
        grid[2] = np.arange(position, position + width)
        position += max(height, width)
    out[:, cursor:] = np.arange(position, position + length - cursor)
    return out


def prompt_of(sample: EncodedSample) -> EncodedSample:
    """The sample up to where its last answer begins, unsupervised: what generation starts from."""
    length = sample.prompt_length
    counts = sample.grids.prod(1) // MERGE_SIZE**2
    kept = int(
        np.searchsorted(
            np.cumsum(counts), np.count_nonzero(sample.visual_positions < length), side="right"
        )
    )
    rows = int(sample.grids[:kept].prod(1).sum())
    return replace(
        sample,
        input_ids=sample.input_ids[:length],
        target_weights=np.zeros(length, np.float32),
        position_ids=sample.position_ids[:, :length],
        visual_positions=sample.visual_positions[sample.visual_positions < length],
        grids=sample.grids[:kept],
        media=sample.media[:kept],
        patches=None if sample.patches is None else sample.patches[:rows],
    )


def extend(sample: EncodedSample, tokens: Sequence[int]) -> EncodedSample:
    """The sample with unsupervised text tokens after it, their positions continued on all three axes."""
    position = int(sample.position_ids.max()) + 1
    more = np.arange(position, position + len(tokens), dtype=np.int32)
    return replace(
        sample,
        input_ids=np.concatenate([sample.input_ids, np.array(tokens, np.int32)]),
        target_weights=np.concatenate([sample.target_weights, np.zeros(len(tokens), np.float32)]),
        position_ids=np.concatenate(
            [sample.position_ids, np.broadcast_to(more, (3, len(tokens)))], axis=1
        ),
    )


Texts = tuple[str, ...]
"""Neighbouring plain texts, tokenised as one string; empty for a special piece."""
Tokens = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Ids, and for each the number of the text that its last character lies in."""


def _runs(pieces: list[Piece]) -> list[tuple[int, Texts]]:
    """First piece of each run, and its texts."""
    runs: list[tuple[int, list[str]]] = []
    for index, piece in enumerate(pieces):
        if piece.count:
            runs.append((index, []))
        elif runs and runs[-1][1] and not piece.apart:
            runs[-1][1].append(piece.text)
        else:
            runs.append((index, [piece.text]))
    return [(first, tuple(texts)) for first, texts in runs]


def _tokenise(runs: set[Texts], tokenizer: Tokenizer) -> dict[Texts, Tokens]:
    single: list[Texts] = [texts for texts in runs if len(texts) == 1]
    joined: list[Texts] = [texts for texts in runs if len(texts) > 1]
    known: dict[Texts, Tokens] = {}
    for texts, ids in zip(single, tokenizer.encode([texts[0] for texts in single]), strict=True):
        known[texts] = ids, np.zeros(len(ids), np.int64)
    for texts, (ids, ends) in zip(
        joined, tokenizer.encode_with_ends(["".join(texts) for texts in joined]), strict=True
    ):
        borders = np.cumsum([len(text) for text in texts])
        known[texts] = ids, np.searchsorted(borders, ends, side="right")
    return known


def _assemble(
    sample: Sample,
    rendering: Rendering,
    runs: list[tuple[int, Texts]],
    known: dict[Texts, Tokens],
    tokenizer: Tokenizer,
    dataset: str,
) -> EncodedSample:
    ids, pieces = _tokens_of(rendering.pieces, runs, known, tokenizer)
    weights = np.array([piece.weight for piece in rendering.pieces], np.float32)[pieces]
    weights[:1] = 0
    visual = np.array(
        [piece.text in (IMAGE, VIDEO) and piece.count > 0 for piece in rendering.pieces], bool
    )
    starts = np.searchsorted(pieces, np.flatnonzero(visual))
    return EncodedSample(
        sample_id=sample.id,
        dataset=dataset,
        task=sample.task,
        input_ids=ids,
        target_weights=weights,
        position_ids=positions(len(ids), _blocks(starts, rendering.grids)),
        visual_positions=np.flatnonzero(visual[pieces]),
        grids=np.array(rendering.grids, np.int32).reshape(-1, 3),
        media=tuple(rendering.media),
        answer=rendering.answer,
        prompt_length=int(np.searchsorted(pieces, rendering.prompt_pieces))
        if rendering.prompt_pieces
        else len(ids),
    )


def _tokens_of(
    pieces: list[Piece],
    runs: list[tuple[int, Texts]],
    known: dict[Texts, Tokens],
    tokenizer: Tokenizer,
) -> Tokens:
    ids, numbers = [], []
    for first, texts in runs:
        if texts:
            ids.append(known[texts][0])
            numbers.append(known[texts][1] + first)
        else:
            ids.append(
                np.full(pieces[first].count, tokenizer.special(pieces[first].text), np.int32)
            )
            numbers.append(np.full(pieces[first].count, first, np.int64))
    return np.concatenate(ids), np.concatenate(numbers)


def _blocks(starts: NDArray[np.intp], grids: list[Grid]) -> list[tuple[int, int, int]]:
    shapes = [
        (height // MERGE_SIZE, width // MERGE_SIZE)
        for time, height, width in grids
        for _ in range(time)
    ]
    return [(int(start), *shape) for start, shape in zip(starts, shapes, strict=True)]
