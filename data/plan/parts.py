"""What is trained on of a sample: usually all of it, of one longer than a pack a part, a shorter or a smaller version.

A part names its sample, a stretch of its elements and a bound on its pictures; `apply_part` makes the sample that is encoded.
A draw is always a whole sample, so a document's parts are drawn together and an epoch's order does not depend on the length
of a pack. Nothing here imports torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from visionloom.data.config import MediaConfig
from visionloom.data.encode.encode import EncodedSample, encode_all
from visionloom.data.encode.geometry import chosen_frames
from visionloom.data.encode.tokenizer import END_OF_TEXT, TURN_END, Tokenizer
from visionloom.data.plan.lengths import Lengths
from visionloom.data.plan.resumable import Rows
from visionloom.data.shards.sample import Box, Element, Image, Message, Point, Sample, Text, Video

PART: Final = np.dtype(
    [
        ("sample", "<u4"),
        ("part_number", "<u2"),
        ("flags", "<u2"),
        ("first", "<u4"),
        ("first_char", "<u4"),
        ("stop", "<u4"),
        ("stop_char", "<u4"),
        ("pixels", "<u4"),
        ("tokens", "<i4"),
        ("patches", "<i4"),
        ("supervised", "<i4"),
        ("sample_supervised", "<i4"),
        ("patch_pairs", "<i8"),
    ]
)
"""One row a part; the fields of Part."""
WHOLE: Final = 2**32 - 1
"""`stop` of a part that reaches to the end of its sample."""
UNFINISHED: Final = 1
"""Flag: the part ends inside a document or a turn, so it has no `<|endoftext|>` or `<|im_end|>` there."""
SHRUNK: Final = 2
"""Flag: pictures are smaller than the rules of the run alone would make them."""
TRUNCATED: Final = 4
"""Flag: what follows in the sample is in no part."""

Border = tuple[int, int]
"""A place in a sample: element number in reading order, and characters of it (a text) that lie before."""


@dataclass(frozen=True, slots=True)
class Part:
    """What of a sample is encoded, and how long that is."""

    sample: int
    part_number: int
    """Number of this part among those of its sample."""
    flags: int = 0
    first: int = 0
    """First element, in reading order over all messages."""
    first_char: int = 0
    """Characters of the first element, a text, that lie in the part before."""
    stop: int = WHOLE
    """The element where it ends; not in the part, but for the first `stop_char` characters of a text."""
    stop_char: int = 0
    pixels: int = 0
    """Largest area of an image and of a video's frame, in pixels; 0: as the rules of the run say."""
    tokens: int = 0
    patches: int = 0
    supervised: int = 0
    sample_supervised: int = 0
    """Supervised tokens of the whole sample: n_s of the loss."""
    patch_pairs: int = 0

    @classmethod
    def of(cls, row: Any) -> "Part":
        """Return the part of a row of dtype PART."""
        return cls(*row.tolist())

    @property
    def is_whole(self) -> bool:
        """Return whether it is the sample as it was written."""
        begins_later = self.first or self.first_char
        is_cut = begins_later or self.stop_char or self.stop != WHOLE
        return not is_cut and not self.pixels


class Parts:
    """The parts of all samples of a dataset.

    Nearly all samples are their own only part, so only the others are held: memory does not grow with the dataset.
    """

    def __init__(
        self,
        lengths: Lengths,
        over: NDArray[np.int64],
        special: Rows,
    ) -> None:
        """`over`: the samples that are not used whole, ascending; `special`: their parts (dtype PART), sample by sample."""
        self.lengths, self.over, self.special = lengths, over, special
        samples = special["sample"].astype(np.int64)
        self._first = np.searchsorted(samples, over)
        self._count = np.searchsorted(samples, over, side="right") - self._first

    def __len__(self) -> int:
        return len(self.lengths) - len(self.over) + len(self.special)

    @property
    def dropped(self) -> int:
        """Count the samples without a part."""
        return int(np.count_nonzero(self._count == 0))

    def total(self, field: str) -> int:
        """Sum up over all parts `tokens`, `patches`, `supervised` or `patch_pairs`."""
        values = self.lengths[field]
        # all but the special ones: they are few, so no copy of the table is made
        total = values.sum(dtype=np.int64) - values[self.over].sum(dtype=np.int64)
        return int(total + self.special[field].sum(dtype=np.int64))

    @property
    def unsupervised(self) -> int:
        """Count the samples that are drawn although no part of them has a supervised token."""
        whole = (self.lengths["supervised"] == 0) & (self.lengths["tokens"] > 0)
        whole[self.over] = False
        samples = self.special["sample"]
        silent = np.setdiff1d(samples, samples[self.special["supervised"] > 0])
        return int(np.count_nonzero(whole)) + len(silent)

    @property
    def lost_tokens(self) -> int:
        """Count the tokens of samples and of parts of samples that no part holds; what shrinking saves is not lost."""
        shrunk = (self.special["flags"] & SHRUNK) != 0
        counted = np.setdiff1d(self.over, self.special["sample"][shrunk])
        before = int(self.lengths["tokens"][counted].sum(dtype=np.int64))
        kept = int(self.special["tokens"][~shrunk].sum(dtype=np.int64))
        # parts of a chat repeat its system message, so they may hold more than the sample
        return max(0, before - kept)

    def of(
        self,
        samples: NDArray[np.int64],
    ) -> tuple[Rows, NDArray[np.int64]]:
        """Return the parts of drawn samples (int64 [d]) in order.

        Returns:
            rows of dtype PART [n], and int64 [n]: the number of the draw that each belongs to.
        """
        place, is_over = self._find(samples)
        counts = np.ones(len(samples), np.int64)
        counts[is_over] = self._count[place[is_over]]
        draws = np.repeat(np.arange(len(samples)), counts)
        within = np.arange(len(draws)) - (np.cumsum(counts) - counts)[draws]

        rows = np.empty(len(draws), PART)
        is_special = is_over[draws]
        first = self._first[place[draws[is_special]]]
        rows[is_special] = self.special[first + within[is_special]]
        rows[~is_special] = _whole(samples[draws[~is_special]], self.lengths)
        return rows, draws

    def part(self, sample: int, part_number: int) -> Part:
        """Return one part of a sample."""
        at = int(self.over.searchsorted(sample))
        if at < len(self.over) and self.over[at] == sample:
            return Part.of(self.special[self._first[at] + part_number])
        tokens, patches, supervised, pairs = self.lengths[sample].item()
        return Part(
            sample,
            part_number,
            tokens=tokens,
            patches=patches,
            supervised=supervised,
            sample_supervised=supervised,
            patch_pairs=pairs,
        )

    def _find(
        self,
        samples: NDArray[np.int64],
    ) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Return where each sample (int64 [d]) lies among the special ones, and whether it does."""
        if not len(self.over):
            return np.zeros(len(samples), np.intp), np.zeros(len(samples), bool)
        place = np.searchsorted(self.over, samples)
        place = np.minimum(place, len(self.over) - 1)
        return place, self.over[place] == samples


def _whole(samples: NDArray[np.int64], lengths: Lengths) -> Rows:
    """Return the parts of samples (int64 [n]) that are their own only one, dtype PART [n]."""
    known = lengths[samples]
    whole = np.zeros(len(samples), PART)
    whole["sample"], whole["stop"] = samples, WHOLE
    for field in ("tokens", "patches", "supervised", "patch_pairs"):
        whole[field] = known[field]
    whole["sample_supervised"] = known["supervised"]
    return whole


# ---- from a part to what is encoded


def encode_parts(
    samples: Sequence[Sample],
    parts: Sequence[Part],
    tokenizer: Tokenizer,
    rules: MediaConfig,
    names: Sequence[str],
) -> list[EncodedSample]:
    """Encode the parts of samples, each with as many tokens and patches as it says; see `encode_all`."""
    shown = [apply_part(sample, part, rules) for sample, part in zip(samples, parts, strict=True)]
    finished = []
    encoded = encode_all(shown, tokenizer, rules, names)
    for one, sample, part in zip(encoded, samples, parts, strict=True):
        finished.append(_finish(one, sample.kind, part, tokenizer))
    return finished


def apply_part(sample: Sample, part: Part, rules: MediaConfig) -> Sample:
    """Return the sample that is encoded: the part's elements under the sample's id, its pictures bounded.

    A chat's part keeps the system message. Boxes and points keep to their picture, which lies in the same part.
    """
    if part.is_whole:
        return sample
    if part.first or part.first_char or part.stop != WHOLE:
        sample = between(sample, (part.first, part.first_char), (part.stop, part.stop_char))
    if not part.pixels:
        return sample
    return _with_elements(sample, lambda element: bounded(element, part.pixels, rules))


def between(sample: Sample, start: Border, stop: Border) -> Sample:
    """Keep the elements from `start` up to `stop`; messages without any are left out, but for the first system message."""
    if sample.kind == "doc":
        cut = replace(sample, content=_cut(sample.content, 0, start, stop))
    else:
        cut = replace(sample, messages=_cut_messages(sample.messages, start, stop))
    numbers = _picture_numbers(sample, start, stop)
    if len(numbers) == len(sample.images):
        return cut

    def renumbered(element: Element) -> Element:
        if isinstance(element, Box | Point):
            return replace(element, image=numbers[element.image])
        return element

    return _with_elements(cut, renumbered)


def _picture_numbers(sample: Sample, start: Border, stop: Border) -> dict[int, int]:
    """Return the new number of each picture that stays: boxes and points name pictures by number."""
    # the system message is repeated in each part, with its pictures
    leading = 0
    if sample.messages and sample.messages[0].role == "system":
        leading = len(sample.messages[0].content)
    numbers: dict[int, int] = {}
    picture = 0
    for place, element in enumerate(sample.elements):
        if isinstance(element, Image):
            if start[0] <= place < stop[0] or place < leading:
                numbers[picture] = len(numbers)
            picture += 1
    return numbers


def _cut_messages(
    messages: Sequence[Message],
    start: Border,
    stop: Border,
) -> tuple[Message, ...]:
    """Keep what of each message lies between two borders."""
    kept, offset = list[Message](), 0
    elements = sum(len(message.content) for message in messages)
    for number, message in enumerate(messages):
        # a message without elements at the very end belongs to what ends there
        begins_inside = start[0] <= offset and ((offset, 0) < stop or offset == elements)
        if number == 0 and message.role == "system":
            kept.append(message)
        elif begins_inside:
            kept.append(replace(message, content=_cut(message.content, offset, start, stop)))
        offset += len(message.content)
    return tuple(kept)


def _cut(
    elements: Sequence[Element], offset: int, start: Border, stop: Border
) -> tuple[Element, ...]:
    """Keep the elements, the first of which has the number `offset`, between two borders; texts may be cut inside."""
    kept = list[Element]()
    for number, element in enumerate(elements, start=offset):
        if number < start[0] or (number, 0) >= stop:
            continue
        if isinstance(element, Text):
            first = start[1] if number == start[0] else 0
            end = stop[1] if number == stop[0] else None
            element = replace(element, text=element.text[first:end])
        kept.append(element)
    return tuple(kept)


def bounded(element: Element, pixels: int, rules: MediaConfig) -> Element:
    """Return an image, or a video's frames, with an area of at most `pixels`; anything else as it is."""
    if isinstance(element, Image):
        return replace(element, max_pixels=min(element.max_pixels or pixels, pixels))
    if isinstance(element, Video):
        most = pixels * len(chosen_frames(element, rules))
        return replace(element, total_pixels=min(element.total_pixels or most, most))
    return element


def _with_elements(sample: Sample, change: Callable[[Element], Element]) -> Sample:
    """Return a sample with each of its elements changed."""
    messages = []
    for message in sample.messages:
        messages.append(replace(message, content=tuple(map(change, message.content))))
    content = tuple(map(change, sample.content))
    return replace(sample, messages=tuple(messages), content=content)


def _finish(encoded: EncodedSample, kind: str, part: Part, tokenizer: Tokenizer) -> EncodedSample:
    """Take away the end mark of what does not end there, and weigh the loss by the whole sample."""
    if part.flags & UNFINISHED:
        mark = tokenizer.special(END_OF_TEXT if kind == "doc" else TURN_END)
        # the last mark is the one that the rendering has added
        length = int(np.flatnonzero(encoded.input_ids == mark)[-1])
        encoded = replace(
            encoded,
            input_ids=encoded.input_ids[:length],
            target_weights=encoded.target_weights[:length],
            position_ids=encoded.position_ids[:, :length],
            prompt_length=min(encoded.prompt_length, length),
        )
    # n_s of the whole, so that the parts of a sample weigh together what it would
    return encoded if part.is_whole else replace(encoded, loss_tokens=part.sample_supervised)
