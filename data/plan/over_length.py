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
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
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
)
from visionloom.data.plan.resumable import NO_HELP, CountingHelp, Rows, in_blocks, load_rows
from visionloom.data.plan.stretches import PackLimits, SampleSizes, whole_part
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import (
    Element,
    Image,
    Sample,
    SampleError,
    Video,
)

PARTS_VERSION: Final = 1
BLOCK: Final = 64
"""Over-long samples of a file while their parts are made: seconds of work."""
_MERGED_AREA: Final = 1024
"""Pixels behind one visual token."""
_SENTENCE: Final = re.compile(r"""(?<=[.!?])["')\]]*\s+|[。\uff01\uff1f]["」』]*\s*|\n+""")
_WORD: Final = re.compile(r"\s+")


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

    Raises UserError naming the dataset, the longest sample, its size, the limit and the options under the policy `error`,
    for an unknown policy, and if nothing is left.
    """
    if limits.policy not in OVER_LENGTH:
        raise UserError(unknown(limits.policy_option, limits.policy, OVER_LENGTH))
    is_long = (lengths["tokens"] > limits.tokens) | (lengths["patches"] > limits.patches)
    too_long = np.flatnonzero(is_long)
    special = np.empty(0, PART)
    if len(too_long):
        if limits.policy == "error":
            raise UserError(_refusal(dataset, lengths, limits))
        if limits.policy != "drop":
            work = Cutting(dataset, too_long, lengths, limits, tokenizer, rules)
            special = work.load_or_make(cache)

    # a sample that could not be read has no tokens, and no part either
    over = np.flatnonzero(is_long | (lengths["tokens"] == 0))
    parts = Parts(lengths, over, special)
    if not len(parts):
        raise UserError(
            f"dataset {dataset.name}: none of its {len(lengths)} samples fits a pack: raise {limits.tokens_option}"
        )
    return parts


def parts_hash(identity: str, limits: PackLimits) -> str:
    """Return the name of the parts of a table under a policy; with `error` and `drop` nothing but the table is stored."""
    facts = [PARTS_VERSION, identity, limits.policy, limits.tokens, limits.patches]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _refusal(dataset: Dataset, lengths: Lengths, limits: PackLimits) -> str:
    """Name the longest sample: by its tokens, or by its patches if no sample has too many tokens."""
    kind, most, fix = "tokens", limits.tokens, f"raise {limits.tokens_option}"
    if not (lengths["tokens"] > limits.tokens).any():
        kind, most = "patches", limits.patches
        fix = "raise data.max_patches_per_token (patches per token of the sequence)"
    sizes = lengths[kind]
    worst = int(np.argmax(sizes))
    count = int((sizes > most).sum())
    name = f"dataset {dataset.name}: sample {dataset.sample(worst).id}"
    return (
        f"{name} has {sizes[worst]} {kind}, a pack holds {most}"
        f" ({count} such samples): {fix}, or set {limits.policy_option}=drop (or split, shrink, truncate_tail)"
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
        """Pickle the rows of the over-long samples only: a table of all may have gigabytes."""
        return {**self.__dict__, "lengths": np.asarray(self.lengths[self.samples])}

    def load_or_make(self, cache: PartsCache) -> Rows:
        """Return all parts (dtype PART), sample by sample."""
        path = cache.folder / f"parts-{parts_hash(cache.identity, self.limits)}.npy"
        rows = load_rows(path, PART)
        if rows is None or not self._is_ours(rows):
            work = replace(self, lengths=np.asarray(self.lengths[self.samples]))
            rows = in_blocks(path, len(self.samples), BLOCK, work, PART, cache.helpers)
        return np.asarray(rows)

    def _is_ours(self, rows: Rows) -> bool:
        """Return whether rows are of these samples, in order: the file lies with the dataset, which a stranger made."""
        samples = rows["sample"].astype(np.int64)
        is_ascending = not np.any(np.diff(samples) < 0)
        return is_ascending and bool(np.isin(samples, self.samples).all())

    def __call__(self, start: int, stop: int) -> Rows:
        """Return the parts of the over-long samples start .. stop, in order of (sample, part), dtype PART."""
        made: list[Part] = []
        for index in range(start, stop):
            # the shard was damaged since it was counted: nothing more of the sample is drawn
            with suppress(SampleError):
                for part in self._parts_of(index):
                    made.append(part)
        return np.array([astuple(part) for part in made], PART)

    def _parts_of(self, index: int) -> Iterator[Part]:
        """Yield the parts of an over-long sample; raises SampleError if its shard was damaged."""
        number = int(self.samples[index])
        whole = whole_part(number, self.lengths[index].tolist())
        sample = self.dataset.sample(number)
        sizes = SampleSizes(sample, whole, self.limits, self.tokenizer, self.rules)
        policy = POLICIES[self.limits.policy]
        for part_number, part in enumerate(policy(sizes)):
            yield replace(part, part_number=part_number)


# ---- split


def _split(sizes: SampleSizes) -> Iterator[Part]:
    """Yield the longest parts one after the other; what no pack holds is left out."""
    is_chat = sizes.sample.kind == "chat"
    levels = _chat_borders(sizes) if is_chat else _document_borders(sizes)

    def flags(stop: Border) -> int:
        return 0 if is_chat or stop == sizes.end else UNFINISHED

    start: Border = (0, 0)
    while start < sizes.end:
        part = None
        # finer borders only where the coarser ones leave nothing that fits
        for borders in levels:
            part = part or sizes.longest(start, borders, flags)
        if part is None:  # what is alone between two borders is too long: lost, and counted
            start = next(border for border in levels[0] if border > start)
            continue
        yield part
        start = sizes.end if part.stop == WHOLE else (part.stop, part.stop_char)


def _document_borders(sizes: SampleSizes) -> list[list[Border]]:
    """Return borders at sentence ends; for what is longer between words; for what is longer still between tokens."""
    before, inside = sizes.bonds(backwards=False)
    count = len(sizes.elements)
    elements = [(number, 0) for number in range(count) if number not in before]
    finer = (
        lambda number: sizes.inside(number, _SENTENCE),
        lambda number: sizes.inside(number, _WORD),
        sizes.token_ends,
    )
    levels = []
    for borders_of in finer:
        borders = {*elements, sizes.end}
        for number in range(count):
            if number not in inside:
                borders.update(borders_of(number))
        levels.append(sorted(borders))
    return levels


def _chat_borders(sizes: SampleSizes) -> list[list[Border]]:
    """Return the borders before user turns: if the chat has pictures, before those that bring their own."""
    before, _ = sizes.bonds(backwards=False)
    has_media = _has_media(sizes.elements)
    borders, offset, asked = set[Border](), 0, False
    for message in sizes.sample.messages:
        if message.role == "user":
            may_cut = _has_media(message.content) or not has_media
            # never before the first question: a part without any has nothing to learn
            if asked and may_cut and offset not in before:
                borders.add((offset, 0))
            asked = True
        offset += len(message.content)
    return [sorted({*borders, sizes.end})]


def _has_media(elements: Iterable[Element]) -> bool:
    return any(isinstance(element, Image | Video) for element in elements)


# ---- truncate_tail


def _truncate_tail(sizes: SampleSizes) -> Iterator[Part]:
    """Yield the longest beginning that fits; of a chat only if it still has something to learn."""
    before, inside = sizes.bonds(backwards=True)
    borders = set[Border]()
    for number in range(len(sizes.elements)):
        if number not in before:
            borders.add((number, 0))
        if number not in inside:
            borders.update(sizes.token_ends(number))

    def flags(stop: Border) -> int:
        # at the end of a turn its end mark stays
        return TRUNCATED if sizes.begins_turn(stop) else TRUNCATED | UNFINISHED

    part = sizes.longest((0, 0), sorted(borders), flags)
    if part is not None and (part.supervised or not sizes.whole.supervised):
        yield part


# ---- shrink


def _shrink(sizes: SampleSizes) -> Iterator[Part]:
    """Yield the sample with the largest bound on the area of pictures and frames with which it fits.

    The bound is a multiple of 1024 pixels, one visual token.
    """
    area = _AreaSearch(sizes).largest()
    if not area:
        return
    part = sizes.measured(replace(sizes.whole, pixels=area * _MERGED_AREA, flags=SHRUNK))
    if sizes.limits.fit(part.tokens, part.patches):
        yield part


class _AreaSearch:
    """Search for a bound on the area of a sample's pictures and frames, in units of 1024 pixels."""

    def __init__(self, sizes: SampleSizes) -> None:
        self.limits, self.rules = sizes.limits, sizes.rules
        self.media = [element for element in sizes.elements if isinstance(element, Image | Video)]
        self.visual = [_size(element, self.rules)[0] for element in self.media]
        self.text = sizes.whole.tokens - sum(self.visual)

    def largest(self) -> int:
        """Return the largest area with which the sample fits, 0 if none."""
        # by halves: sizes only grow with it
        low, high = 0, max(self.visual, default=0)
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._fits(middle) else (low, middle - 1)
        return low

    def _fits(self, area: int) -> bool:
        tokens, patches = self.text, 0
        for element in self.media:
            small = bounded(element, area * _MERGED_AREA, self.rules)
            assert isinstance(small, Image | Video)
            more_tokens, more_patches = _size(small, self.rules)
            tokens, patches = tokens + more_tokens, patches + more_patches
        return self.limits.fit(tokens, patches)


def _size(element: Image | Video, rules: MediaConfig) -> tuple[int, int]:
    """Return the visual tokens and patches of a picture or video."""
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
    """Return whether any policy has a part of a sample that no pack can hold whole; `encoded` is all of it."""
    whole = whole_part(0, row_of(encoded))
    for policy in POLICIES.values():
        sizes = SampleSizes(sample, whole, limits, tokenizer, rules)
        if next(policy(sizes), None) is not None:
            return True
    return False
