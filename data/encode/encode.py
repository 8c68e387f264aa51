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
    """Tokens up to where a server's prompt for the last answer ends: after the newline of `<|im_start|>assistant` or, in the
    thinking format, of `<think>`; n if there is no answer."""
    patches: NDArray[np.uint8] | None = None
    """[patches of all grids, 768] or, with a video, [..., 1536]; None until decoded."""
    depth: float | None = None
    """meta.depth: how deep in the prompt what is asked for is, from 0 to 1; None: it does not say."""
    loss_tokens: int | None = None
    """n_s of the loss: supervised tokens of the whole sample where this is a part of one; None: supervised_tokens."""

    @property
    def patch_count(self) -> int:
        """Count the patches of all its pictures and videos."""
        return int(self.grids.prod(1).sum())

    @property
    def supervised_tokens(self) -> int:
        """Count the tokens with a loss: those of a weight above 0, for which a batch has labels."""
        return int(np.count_nonzero(self.target_weights > 0))


Block = tuple[int, int, int]
"""First token, merged height and merged width of an image or of a temporal patch."""


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
    """Encode like `encode_all`, with one of them in memory at a time."""
    renderings = [render(sample, rules, tokenizer.chat_format) for sample in samples]
    runs = [_KnownTexts.runs_of(rendering.pieces) for rendering in renderings]
    texts = {texts for sample_runs in runs for _, texts in sample_runs if texts}
    # one call for all samples: the tokenizer works on a batch in parallel, and texts that repeat are done once
    known = _KnownTexts(texts, tokenizer)
    for sample, rendering, own, dataset in zip(samples, renderings, runs, datasets, strict=True):
        tokens = known.tokens_of(rendering.pieces, own)
        yield _TokenisedRendering(rendering, *tokens).assemble(sample, dataset)


def positions(length: int, blocks: Sequence[Block]) -> NDArray[np.int32]:
    """Return interleaved-MRoPE positions int32 [3, length] of one sample, from 0.

    Text counts up on all axes; a block keeps one time, spans height and width, and moves on by the larger of the two.
    Source: `get_rope_index` of transformers' Qwen3VLModel.
    """
    out = np.empty((3, length), np.int32)
    cursor = position = 0
    for start, height, width in blocks:
        text = start - cursor
        out[:, cursor:start] = np.arange(position, position + text)
        position += text
        cursor = start + height * width

        grid = out[:, start:cursor].reshape(3, height, width)
        grid[0] = position
        grid[1] = np.arange(position, position + height)[:, None]
        grid[2] = np.arange(position, position + width)
        position += max(height, width)
    out[:, cursor:] = np.arange(position, position + length - cursor)
    return out


def prompt_of(sample: EncodedSample) -> EncodedSample:
    """Return the sample up to where its last answer begins, unsupervised: what generation starts from."""
    length = sample.prompt_length
    visual = sample.visual_positions[sample.visual_positions < length]
    # an answer may have pictures of its own: they go
    visual_tokens = np.cumsum(sample.grids.prod(1) // MERGE_SIZE**2)
    kept = int(np.searchsorted(visual_tokens, len(visual), side="right"))
    grids, patches = sample.grids[:kept], sample.patches
    if patches is not None:
        patches = patches[: int(grids.prod(1).sum())]
    return replace(
        sample,
        input_ids=sample.input_ids[:length],
        target_weights=np.zeros(length, np.float32),
        position_ids=sample.position_ids[:, :length],
        visual_positions=visual,
        grids=grids,
        media=sample.media[:kept],
        patches=patches,
    )


def extend(
    sample: EncodedSample, tokens: Sequence[int], target_weight: float = 0.0
) -> EncodedSample:
    """Return the sample with text tokens of a weight after it, their positions continued on all three axes."""
    count = len(tokens)
    ids, weights = np.array(tokens, np.int32), np.full(count, target_weight, np.float32)
    # by the highest position of any axis: a picture's are fewer than its tokens
    position = int(sample.position_ids.max()) + 1
    more = np.arange(position, position + count, dtype=np.int32)
    places = np.broadcast_to(more, (3, count))
    return replace(
        sample,
        input_ids=np.concatenate([sample.input_ids, ids]),
        target_weights=np.concatenate([sample.target_weights, weights]),
        position_ids=np.concatenate([sample.position_ids, places], axis=1),
    )


Texts = tuple[str, ...]
"""Neighbouring plain texts, tokenised as one string; empty for a special piece."""
Run = tuple[int, Texts]
"""First piece of neighbouring texts, and the texts; of a special piece its number, and none."""
Tokens = tuple[NDArray[np.int32], NDArray[np.int64]]
"""Ids, and for each the number of the text that its last character lies in."""


class _KnownTexts:
    """The tokens of runs: the texts of each tokenised as one string."""

    def __init__(self, runs: set[Texts], tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.known: dict[Texts, Tokens] = {}
        # ends of tokens cost a slower call, and only runs of several texts need them
        self._add_single([texts for texts in runs if len(texts) == 1])
        self._add_joined([texts for texts in runs if len(texts) > 1])

    @staticmethod
    def runs_of(pieces: list[Piece]) -> list[Run]:
        """Join neighbouring texts: only so are the tokens those of the whole string."""
        runs: list[tuple[int, list[str]]] = []
        for index, piece in enumerate(pieces):
            if piece.count:
                runs.append((index, []))
            elif runs and runs[-1][1] and not piece.apart:
                runs[-1][1].append(piece.text)
            else:
                runs.append((index, [piece.text]))
        return [(first, tuple(texts)) for first, texts in runs]

    def _add_single(self, single: list[Texts]) -> None:
        encoded = self.tokenizer.encode([texts[0] for texts in single])
        for texts, ids in zip(single, encoded, strict=True):
            self.known[texts] = ids, np.zeros(len(ids), np.int64)

    def _add_joined(self, joined: list[Texts]) -> None:
        with_ends = self.tokenizer.encode_with_ends(["".join(texts) for texts in joined])
        for texts, (ids, ends) in zip(joined, with_ends, strict=True):
            borders = np.cumsum([len(text) for text in texts])
            self.known[texts] = ids, np.searchsorted(borders, ends, side="right")

    def tokens_of(self, pieces: list[Piece], runs: list[Run]) -> Tokens:
        """Return the ids of all pieces, int32 [n], and the number of each id's piece, int64 [n]."""
        ids, numbers = [], []
        for first, texts in runs:
            if texts:
                text_ids, text_numbers = self.known[texts]
                ids.append(text_ids)
                numbers.append(text_numbers + first)
            else:
                count, special = pieces[first].count, self.tokenizer.special(pieces[first].text)
                ids.append(np.full(count, special, np.int32))
                numbers.append(np.full(count, first, np.int64))
        return np.concatenate(ids), np.concatenate(numbers)


@dataclass(frozen=True, slots=True)
class _TokenisedRendering:
    """A rendering, its ids (int32 [n]) and the number of each id's piece (int64 [n])."""

    rendering: Rendering
    ids: NDArray[np.int32]
    numbers: NDArray[np.int64]

    def assemble(self, sample: Sample, dataset: str) -> EncodedSample:
        """Make the encoded sample."""
        rendering, visual = self.rendering, self._visual_pieces()
        return EncodedSample(
            sample_id=sample.id,
            dataset=dataset,
            task=sample.task,
            input_ids=self.ids,
            target_weights=self._target_weights(),
            position_ids=self._positions(visual),
            visual_positions=np.flatnonzero(visual[self.numbers]),
            grids=np.array(rendering.grids, np.int32).reshape(-1, 3),
            media=tuple(rendering.media),
            answer=rendering.answer,
            prompt_length=self._prompt_length(),
            depth=_depth_of(sample),
        )

    def _target_weights(self) -> NDArray[np.float32]:
        """Return the weight of each token, float32 [n]."""
        of_pieces = np.array([piece.weight for piece in self.rendering.pieces], np.float32)
        weights = of_pieces[self.numbers]
        # nothing predicts the first token
        weights[:1] = 0
        return weights

    def _visual_pieces(self) -> NDArray[np.bool_]:
        """Return which pieces are placeholders, bool [pieces]."""
        is_visual = []
        for piece in self.rendering.pieces:
            # a text may spell a placeholder; only a piece with a count is one
            is_visual.append(piece.text in (IMAGE, VIDEO) and piece.count > 0)
        return np.array(is_visual, bool)

    def _positions(self, visual: NDArray[np.bool_]) -> NDArray[np.int32]:
        """Return the positions int32 [3, n]; `visual`: bool [pieces]."""
        starts = np.searchsorted(self.numbers, np.flatnonzero(visual))
        return positions(len(self.ids), _blocks(starts, self.rendering.grids))

    def _prompt_length(self) -> int:
        """Count the tokens before the last answer; without one, all."""
        if not self.rendering.prompt_pieces:
            return len(self.ids)
        return int(np.searchsorted(self.numbers, self.rendering.prompt_pieces))


def _depth_of(sample: Sample) -> float | None:
    """Return meta.depth of a sample, which anybody may have written; None unless it is a number from 0 to 1."""
    depth = sample.meta.get("depth")
    if isinstance(depth, bool) or not isinstance(depth, int | float):
        return None
    return float(depth) if 0 <= depth <= 1 else None


def _blocks(
    starts: NDArray[np.intp],
    grids: list[Grid],
) -> list[Block]:
    """Return the block of each vision start, int64 [images and temporal patches]."""
    blocks: list[Block] = []
    places = iter(starts.tolist())
    for time, height, width in grids:
        for _ in range(time):
            blocks.append((next(places), height // MERGE_SIZE, width // MERGE_SIZE))
    return blocks
