"""How long the stretches of one sample are: what an over-length policy cuts by.

Estimates say where to look; every part is measured by encoding it, so it cannot be longer than planned.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from visionloom.data.config import MediaConfig
from visionloom.data.encode.geometry import MERGE_SIZE, grid_of
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.plan.lengths import row_of
from visionloom.data.plan.parts import WHOLE, Border, Part, encode_parts
from visionloom.data.shards.sample import Box, Element, Image, Point, Sample, Text, Video

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
        """Return whether a pack can hold as much."""
        return tokens <= self.tokens and patches <= self.patches


def whole_part(number: int, row: Sequence[int]) -> Part:
    """Return a sample as one part, of its row in the length table."""
    tokens, patches, supervised = row[:3]
    return Part(number, 0, tokens=tokens, patches=patches, supervised=supervised)


class SampleSizes:
    """Tells how long the stretches of one sample are."""

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
        """Return the part with its true size."""
        (encoded,) = encode_parts([self.sample], [part], self.tokenizer, self.rules, [""])
        tokens, patches, supervised, pairs = row_of(encoded)
        return replace(
            part, tokens=tokens, patches=patches, supervised=supervised, patch_pairs=pairs
        )

    def stretch(self, start: Border, stop: Border, flags: int = 0) -> Part:
        """Return the part from one border to another, measured."""
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
        self,
        start: Border,
        borders: list[Border],
        flags: Callable[[Border], int],
    ) -> Part | None:
        """Return the longest part from `start` to one of the borders (ascending) that a pack holds; None if none does."""
        low = bisect_right(borders, start)
        tokens, patches = self._room_after(start)
        at = self._last_before(borders, low, len(borders), (tokens, patches))
        while at >= low:
            part = self.stretch(start, borders[at], flags(borders[at]))
            if self.limits.fit(part.tokens, part.patches):
                return self._grown(part, start, borders[at + 1 :], flags)
            # the estimate was too low by as much: look that much further to the front
            tokens -= max(part.tokens - self.limits.tokens, 0)
            patches -= max(part.patches - self.limits.patches, 0)
            at = self._last_before(borders, low, at, (tokens, patches)) if at > low else -1
        return None

    def _room_after(self, border: Border) -> tuple[int, int]:
        """Return about how many tokens and patches lie before the end of a pack that begins at a border."""
        tokens, patches = self.before(border)
        return tokens + self.limits.tokens, patches + self.limits.patches

    def _grown(
        self,
        part: Part,
        start: Border,
        later: list[Border],
        flags: Callable[[Border], int],
    ) -> Part:
        """Let the part reach further, while estimates that were too high left room for it."""
        end = (part.stop, part.stop_char)
        while later:
            tokens, patches = self._room_after(end)
            room = tokens - part.tokens, patches - part.patches
            at = self._last_before(later, 0, len(later), room)
            longer = self.stretch(start, later[at], flags(later[at]))
            if not self.limits.fit(longer.tokens, longer.patches):
                break
            part, end, later = longer, later[at], later[at + 1 :]
        return part

    def _last_before(
        self,
        borders: list[Border],
        low: int,
        high: int,
        room: tuple[int, int],
    ) -> int:
        """Return the last of borders low .. high before which lie about `room` tokens and patches; else the first."""

        def tokens_before(border: Border) -> int:
            return self.before(border)[0]

        def patches_before(border: Border) -> int:
            return self.before(border)[1]

        by_tokens = bisect_right(borders, room[0], low, high, key=tokens_before)
        by_patches = bisect_right(borders, room[1], low, high, key=patches_before)
        return max(min(by_tokens, by_patches) - 1, min(low, high - 1))

    def before(self, border: Border) -> tuple[int, int]:
        """Return about how many tokens and patches lie before a border."""
        number, chars = border
        tokens, patches = self._cumulative[number]
        if chars:
            tokens += bisect_right(self._ends[number], chars)
        return tokens, patches

    @cached_property
    def _ends(self) -> dict[int, list[int]]:
        """Return, of each text, how many characters lie before the end of each of its tokens."""
        texts = {}
        for number, element in enumerate(self.elements):
            if isinstance(element, Text):
                texts[number] = element.text
        encoded = self.tokenizer.encode_with_ends(list(texts.values()))
        ends_of = {}
        for number, (_, ends) in zip(texts, encoded, strict=True):
            ends_of[number] = (ends + 1).tolist()
        return ends_of

    @cached_property
    def turn_starts(self) -> set[int]:
        """Return the numbers of the elements that begin a turn."""
        starts, offset = set[int](), 0
        for message in self.sample.messages:
            starts.add(offset)
            offset += len(message.content)
        return starts

    def begins_turn(self, border: Border) -> bool:
        """Return whether a turn begins at a border."""
        number, chars = border
        return number in self.turn_starts and not chars

    @cached_property
    def _cumulative(self) -> list[tuple[int, int]]:
        """Return about how many tokens and patches lie before each element, and before the end."""
        before: list[tuple[int, int]] = []
        tokens = patches = 0
        for number, element in enumerate(self.elements):
            # the marks of a turn lie before its first element
            tokens += _TURN_TOKENS if number in self.turn_starts else 0
            before.append((tokens, patches))
            more_tokens, more_patches = self._size_of(number, element)
            tokens, patches = tokens + more_tokens, patches + more_patches
        return [*before, (tokens, patches)]

    def _size_of(self, number: int, element: Element) -> tuple[int, int]:
        """Return about how many tokens and patches an element has."""
        if isinstance(element, Text):
            return len(self._ends[number]), 0
        if isinstance(element, Image | Video):
            time, height, width = grid_of(element, self.rules)
            # two marks around each block of placeholders, and before those of a video its time
            marks = 2 + _TIMESTAMP_TOKENS * isinstance(element, Video)
            tokens = time * (height * width // MERGE_SIZE**2 + marks)
            return tokens, time * height * width
        return len(getattr(element, "text", "")) // 4 or _OTHER_TOKENS, 0

    def inside(self, number: int, pattern: re.Pattern[str]) -> list[Border]:
        """Return the borders after each match in a text."""
        element = self.elements[number]
        if not isinstance(element, Text):
            return []
        ends = (match.end() for match in pattern.finditer(element.text))
        return [(number, end) for end in ends if 0 < end < len(element.text)]

    def token_ends(self, number: int) -> list[Border]:
        """Return the borders after each token of a text."""
        element = self.elements[number]
        if not isinstance(element, Text):
            return []
        # several tokens may share a character, and so their end
        ends = sorted(set(self._ends[number]))
        return [(number, end) for end in ends if 0 < end < len(element.text)]

    def bonds(self, backwards: bool) -> tuple[set[int], set[int]]:
        """Return the elements before which, and the texts inside which, no cut may be: boxes stay with their picture.

        `backwards`: only what lies before its picture counts, as where the rest is left out.
        """
        pictures = [
            number for number, element in enumerate(self.elements) if isinstance(element, Image)
        ]
        before, inside = set[int](), set[int]()
        for number, element in enumerate(self.elements):
            if not isinstance(element, Box | Point):
                continue
            picture = pictures[element.image]
            if backwards and picture < number:
                continue
            low, high = sorted((number, picture))
            before.update(range(low + 1, high + 1))
            inside.update(range(low + 1, high))
        return before, inside
