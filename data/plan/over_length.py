"""What becomes of a sample that no pack can hold: the policies of data.datasets.<name>.over_length.

- `error` refuses the dataset and names the longest sample; `drop` leaves such samples out and counts them.
- `split` cuts documents at element borders and at sentence ends, a longer sentence between words; a picture, a video and the
  boxes on a picture stay with it. Parts keep the document's id, their positions restart, only the last ends with
  `<|endoftext|>`. A chat is cut before user turns only, and if it has pictures only before turns that bring their own: what a
  part is about must be in it. Its system message is repeated in each part.
- `shrink` bounds the area of all pictures and frames, the largest first, until the sample fits.
- `truncate_tail` leaves out elements at the end, then characters of the last text; never part of a picture or a video.
What fits under no policy is lost: not drawn, and counted. Every part is measured by encoding it, so it cannot be longer than
planned; the estimates below only say where to look.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from visionloom.common.errors import UserError, unknown
from visionloom.data.config import OVER_LENGTH, MediaConfig
from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.geometry import MERGE_SIZE, grid_of
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.lengths import Lengths, row_of
from visionloom.data.plan.parts import (
    PART,
    SHRUNK,
    TRUNCATED,
    UNFINISHED,
    WHOLE,
    Border,
    Part,
    Parts,
    bounded,
    encode_parts,
)
from visionloom.data.plan.resumable import NO_HELP, CountingHelp, Rows, in_blocks, load_rows
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Box, Image, Point, Sample, SampleError, Text, Video

VIEWS_VERSION: Final = 1
BLOCK: Final = 64
"""Over-long samples of a file while their parts are made: seconds of work."""
_MERGED_AREA: Final = 1024
"""Pixels behind one visual token."""
_SENTENCE: Final = re.compile(r"""(?<=[.!?])["')\]]*\s+|[。\uff01\uff1f]["」』]*\s*|\n+""")
_WORD: Final = re.compile(r"\s+")
_TURN_TOKENS: Final = 5
_OTHER_TOKENS: Final = 30
_TIMESTAMP_TOKENS: Final = 8
"""Rough lengths of a turn's marks, of a box or point, and of a video block's time; they guide the search only."""


@dataclass(frozen=True, slots=True)
class PackLimits:
    """What a pack can hold, and the options that say so in an error."""

    tokens: int
    patches: int
    tokens_option: str
    policy: str
    policy_option: str

    def fit(self, tokens: int, patches: int) -> bool:
        """Whether a pack can hold as much."""
        return tokens <= self.tokens and patches <= self.patches


@dataclass(frozen=True)
class PartsCache:
    """Where the parts of a length table are kept, and who makes them."""

    folder: Path
    identity: str
    """Hash of the length table."""
    helpers: CountingHelp = NO_HELP


def make_parts(
    dataset: Dataset,
    lengths: Lengths,
    limits: PackLimits,
    tokenizer: Tokenizer,
    rules: MediaConfig,
    cache: PartsCache,
) -> Parts:
    """Return the parts of a dataset under its over-length policy; those of over-long samples are kept in `cache`.

    Raises UserError naming the dataset, the longest sample, its size, the limit and
    the options under the policy `error`, for an unknown policy, and if nothing is left.
    """
    if limits.policy not in OVER_LENGTH:
        raise UserError(unknown(limits.policy_option, limits.policy, OVER_LENGTH))
    too_long = (lengths["tokens"] > limits.tokens) | (lengths["patches"] > limits.patches)
    over = np.flatnonzero(too_long | (lengths["tokens"] == 0))
    if limits.policy == "error" and too_long.any():
        raise UserError(_refusal(dataset, lengths, limits))
    special = np.empty(0, PART)
    if limits.policy not in ("error", "drop") and too_long.any():
        work = Cutting(dataset, np.flatnonzero(too_long), lengths, limits, tokenizer, rules)
        special = work.load_or_make(cache)
    parts = Parts(lengths, over, special)
    if not len(parts):
        raise UserError(
            f"dataset {dataset.name}: none of its {len(lengths)} samples fits a pack: raise {limits.tokens_option}"
        )
    return parts


def parts_hash(identity: str, limits: PackLimits) -> str:
    """Name of the parts of a table under a policy; with `error` and `drop` nothing but the table is stored."""
    facts = [VIEWS_VERSION, identity, limits.policy, limits.tokens, limits.patches]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _refusal(dataset: Dataset, lengths: Lengths, limits: PackLimits) -> str:
    over_tokens, over_patches = (
        lengths["tokens"] > limits.tokens,
        lengths["patches"] > limits.patches,
    )
    kind, mask, most = (
        ("tokens", over_tokens, limits.tokens)
        if over_tokens.any()
        else ("patches", over_patches, limits.patches)
    )
    worst = int(np.argmax(np.where(mask, lengths[kind], 0)))
    fix = (
        f"raise {limits.tokens_option}"
        if kind == "tokens"
        else "raise data.max_patches_per_token (patches per token of the sequence)"
    )
    return (
        f"dataset {dataset.name}: sample {dataset.sample(worst).id} has {lengths[kind][worst]} {kind}, a pack holds {most}"
        f" ({int(mask.sum())} such samples): {fix}, or set {limits.policy_option}=drop (or split, shrink, truncate_tail)"
    )


@dataclass(frozen=True)
class Cutting:
    """Makes the parts of stretches of the over-long samples; goes to other processes."""

    dataset: Dataset
    samples: NDArray[np.int64]
    lengths: Lengths
    limits: PackLimits
    tokenizer: Tokenizer
    rules: MediaConfig

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "lengths": np.asarray(self.lengths[self.samples])}

    def load_or_make(self, cache: PartsCache) -> Rows:
        """Return all parts (dtype PART), sample by sample."""
        path = cache.folder / f"parts-{parts_hash(cache.identity, self.limits)}.npy"
        rows = load_rows(path, PART)
        if (
            rows is None
            or not np.isin(rows["sample"], self.samples).all()
            or np.any(np.diff(rows["sample"].astype(np.int64)) < 0)
        ):
            work = replace(self, lengths=np.asarray(self.lengths[self.samples]))
            rows = in_blocks(path, len(self.samples), BLOCK, work, PART, cache.helpers)
        return np.asarray(rows)

    def __call__(self, start: int, stop: int) -> Rows:
        """Parts of the over-long samples start .. stop, in order of (sample, part)."""
        found: list[Part] = []
        for index in range(start, stop):
            number = int(self.samples[index])
            whole = Part(number, 0, 0, 0, 0, WHOLE, 0, 0, *self.lengths[index].tolist()[:3])
            try:
                sample = self.dataset.sample(number)
                parts = POLICIES[self.limits.policy](
                    _Sizes(sample, whole, self.limits, self.tokenizer, self.rules)
                )
                found += [
                    replace(part, part_number=part_number) for part_number, part in enumerate(parts)
                ]
            except SampleError:
                continue  # the shard was damaged since it was counted: nothing of the sample is drawn
        return np.array([astuple(part) for part in found], PART)


class _Sizes:
    """How long the stretches of one sample are."""

    def __init__(
        self,
        sample: Sample,
        whole: Part,
        limits: PackLimits,
        tokenizer: Tokenizer,
        rules: MediaConfig,
    ) -> None:
        self.sample, self.limits, self.tokenizer, self.rules = sample, limits, tokenizer, rules
        self.whole = replace(whole, sample_supervised=whole.supervised)
        self.elements = sample.elements
        self.end: Border = (len(self.elements), 0)

    def measured(self, part: Part) -> Part:
        """The part with its true size."""
        (encoded,) = encode_parts([self.sample], [part], self.tokenizer, self.rules, [""])
        tokens, patches, supervised, squares = row_of(encoded)
        return replace(
            part, tokens=tokens, patches=patches, supervised=supervised, patch_pairs=squares
        )

    def stretch(self, start: Border, stop: Border, flags: int = 0) -> Part:
        """The part from one border to another, measured."""
        end = (WHOLE, 0) if stop == self.end else stop
        return self.measured(
            replace(
                self.whole,
                first=start[0],
                first_char=start[1],
                stop=end[0],
                stop_char=end[1],
                flags=flags,
            )
        )

    def longest(
        self, start: Border, borders: list[Border], flags: Callable[[Border], int]
    ) -> Part | None:
        """The longest part from `start` to one of the borders (ascending) that a pack holds; None if none does."""
        low = bisect_right(borders, start)
        tokens, patches = (
            here + most for here, most in zip(self.before(start), self._most, strict=True)
        )
        at = self._last_before(borders, low, len(borders), tokens, patches)
        while at >= low:
            part = self.stretch(start, borders[at], flags(borders[at]))
            if self.limits.fit(part.tokens, part.patches):
                return self._grown(part, start, borders[at + 1 :], flags)
            tokens -= max(part.tokens - self.limits.tokens, 0)
            patches -= max(part.patches - self.limits.patches, 0)
            at = self._last_before(borders, low, at, tokens, patches) if at > low else -1
        return None

    def _grown(
        self, part: Part, start: Border, later: list[Border], flags: Callable[[Border], int]
    ) -> Part:
        """The part reaching further, while estimates that were too high left room for it."""
        end = (part.stop, part.stop_char)
        while later:
            tokens, patches = (
                here + most for here, most in zip(self.before(end), self._most, strict=True)
            )
            at = self._last_before(
                later, 0, len(later), tokens - part.tokens, patches - part.patches
            )
            longer = self.stretch(start, later[at], flags(later[at]))
            if not self.limits.fit(longer.tokens, longer.patches):
                break
            part, end, later = longer, later[at], later[at + 1 :]
        return part

    @property
    def _most(self) -> tuple[int, int]:
        return self.limits.tokens, self.limits.patches

    def _last_before(
        self, borders: list[Border], low: int, high: int, tokens: int, patches: int
    ) -> int:
        """The last of borders low .. high before which there are about so many tokens and patches; else the first."""
        by_tokens = bisect_right(
            borders, tokens, low, high, key=lambda border: self.before(border)[0]
        )
        by_patches = bisect_right(
            borders, patches, low, high, key=lambda border: self.before(border)[1]
        )
        return max(min(by_tokens, by_patches) - 1, min(low, high - 1))

    def before(self, border: Border) -> tuple[int, int]:
        """About how many tokens and patches lie before a border."""
        number, chars = border
        tokens, patches = self._cumulative[number]
        if chars:
            tokens += bisect_right(self._ends[number], chars)
        return tokens, patches

    @cached_property
    def _ends(self) -> dict[int, list[int]]:
        """Of each text, how many characters lie before the end of each of its tokens."""
        texts = {
            number: element.text
            for number, element in enumerate(self.elements)
            if isinstance(element, Text)
        }
        found = self.tokenizer.encode_with_ends(list(texts.values()))
        return {number: (ends + 1).tolist() for number, (_, ends) in zip(texts, found, strict=True)}

    @cached_property
    def _cumulative(self) -> list[tuple[int, int]]:
        tokens = patches = offset = 0
        turns = set[int]()
        for message in self.sample.messages:
            turns.add(offset)
            offset += len(message.content)
        found = []
        for number, element in enumerate(self.elements):
            tokens += _TURN_TOKENS if number in turns else 0
            found.append((tokens, patches))
            if isinstance(element, Text):
                tokens += len(self._ends[number])
            elif isinstance(element, Image | Video):
                time, height, width = grid_of(element, self.rules)
                patches += time * height * width
                tokens += time * (
                    height * width // MERGE_SIZE**2
                    + 2
                    + _TIMESTAMP_TOKENS * isinstance(element, Video)
                )
            else:
                tokens += len(getattr(element, "text", "")) // 4 or _OTHER_TOKENS
        return [*found, (tokens, patches)]

    def inside(self, number: int, pattern: re.Pattern[str]) -> list[Border]:
        """Borders behind each match in a text."""
        element = self.elements[number]
        if not isinstance(element, Text):
            return []
        ends = (match.end() for match in pattern.finditer(element.text))
        return [(number, end) for end in ends if 0 < end < len(element.text)]

    def token_ends(self, number: int) -> list[Border]:
        """Borders behind each token of a text."""
        element = self.elements[number]
        if not isinstance(element, Text):
            return []
        return [
            (number, end) for end in sorted(set(self._ends[number])) if 0 < end < len(element.text)
        ]

    def bonds(self, backwards: bool) -> tuple[set[int], set[int]]:
        """Elements before which, and texts inside which, no cut may be: a box or point stays with its picture.

        `backwards`: only what lies before its picture counts, as where the rest is left out.
        """
        pictures = [
            number for number, element in enumerate(self.elements) if isinstance(element, Image)
        ]
        before, inside = set[int](), set[int]()
        for number, element in enumerate(self.elements):
            if isinstance(element, Box | Point) and not (
                backwards and pictures[element.image] < number
            ):
                low, high = sorted((number, pictures[element.image]))
                before.update(range(low + 1, high + 1))
                inside.update(range(low + 1, high))
        return before, inside


# ---- split


def _split(sizes: _Sizes) -> Iterator[Part]:
    levels = _chat_borders(sizes) if sizes.sample.kind == "chat" else _document_borders(sizes)
    start: Border = (0, 0)
    while start < sizes.end:
        part = next(
            (
                found
                for borders in levels
                if (found := sizes.longest(start, borders, _part_flags(sizes)))
            ),
            None,
        )
        if part is None:  # what is alone between two borders is too long: lost, and counted
            start = next(border for border in levels[0] if border > start)
            continue
        yield part
        start = sizes.end if part.stop == WHOLE else (part.stop, part.stop_char)


def _part_flags(sizes: _Sizes) -> Callable[[Border], int]:
    unfinished = UNFINISHED if sizes.sample.kind == "doc" else 0
    return lambda stop: 0 if stop == sizes.end else unfinished


def _document_borders(sizes: _Sizes) -> list[list[Border]]:
    """At sentence ends; for what is longer between words; for what is longer still between tokens."""
    before, inside = sizes.bonds(backwards=False)
    elements = [(number, 0) for number in range(len(sizes.elements)) if number not in before]
    texts = [number for number in range(len(sizes.elements)) if number not in inside]
    finer = (
        lambda n: sizes.inside(n, _SENTENCE),
        lambda n: sizes.inside(n, _WORD),
        sizes.token_ends,
    )
    return [
        sorted({*elements, sizes.end, *(border for number in texts for border in borders(number))})
        for borders in finer
    ]


def _chat_borders(sizes: _Sizes) -> list[list[Border]]:
    before, _ = sizes.bonds(backwards=False)
    has_media = any(isinstance(element, Image | Video) for element in sizes.elements)
    borders, offset, asked = set[Border](), 0, False
    for message in sizes.sample.messages:
        brings = any(isinstance(element, Image | Video) for element in message.content)
        if message.role == "user" and asked and offset not in before and (brings or not has_media):
            borders.add((offset, 0))
        asked = asked or message.role == "user"
        offset += len(message.content)
    return [sorted({*borders, sizes.end})]


# ---- truncate_tail


def _truncate_tail(sizes: _Sizes) -> Iterator[Part]:
    """The longest beginning that fits; of a chat only if it still has something to learn."""
    before, inside = sizes.bonds(backwards=True)
    borders: set[Border] = {
        (number, 0) for number in range(len(sizes.elements)) if number not in before
    }
    borders |= {
        border
        for n in range(len(sizes.elements))
        if n not in inside
        for border in sizes.token_ends(n)
    }
    turn_ends, offset = set[Border](), 0
    for message in sizes.sample.messages:
        turn_ends.add((offset, 0))
        offset += len(message.content)

    def flags(stop: Border) -> int:
        return TRUNCATED if stop in turn_ends else TRUNCATED | UNFINISHED

    part = sizes.longest((0, 0), sorted(borders), flags)
    if part is not None and (part.supervised or not sizes.whole.supervised):
        yield part


# ---- shrink


def _shrink(sizes: _Sizes) -> Iterator[Part]:
    """The largest bound on the area of pictures and frames, a multiple of 1024 pixels, with which the sample fits."""
    media = [element for element in sizes.elements if isinstance(element, Image | Video)]
    visual = sum(_size(element, sizes.rules)[0] for element in media)

    def fits(area: int) -> bool:
        small = [_size(_smaller(element, area, sizes.rules), sizes.rules) for element in media]
        tokens = sizes.whole.tokens - visual + sum(tokens for tokens, _ in small)
        return sizes.limits.fit(tokens, sum(patches for _, patches in small))

    low, high = 0, max((_size(element, sizes.rules)[0] for element in media), default=0)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    if low and sizes.limits.fit(
        (
            part := sizes.measured(replace(sizes.whole, pixels=low * _MERGED_AREA, flags=SHRUNK))
        ).tokens,
        part.patches,
    ):
        yield part


def _smaller(element: Image | Video, area: int, rules: MediaConfig) -> Image | Video:
    found = bounded(element, area * _MERGED_AREA, rules)
    assert isinstance(found, Image | Video)
    return found


def _size(element: Image | Video, rules: MediaConfig) -> tuple[int, int]:
    """Visual tokens and patches."""
    time, height, width = grid_of(element, rules)
    return time * height * width // MERGE_SIZE**2, time * height * width


POLICIES: Final = {"split": _split, "shrink": _shrink, "truncate_tail": _truncate_tail}


def fits_some_policy(
    sample: Sample,
    encoded: EncodedSample,
    limits: PackLimits,
    tokenizer: Tokenizer,
    rules: MediaConfig,
) -> bool:
    """Whether any policy has a part of a sample that no pack can hold whole; `encoded` is all of it."""
    whole = Part(0, 0, 0, 0, 0, WHOLE, 0, 0, *row_of(encoded)[:3])
    return any(
        next(policy(_Sizes(sample, whole, limits, tokenizer, rules)), None)
        for policy in POLICIES.values()
    )
