"""The content of a turn: a text with placeholders, or a list of typed parts, as elements of our schema.

`<image>` and `<video>` in a text stand for the record's pictures and videos, in order. Newlines next to a placeholder belong to
the format and are dropped. A record without such media only speaks of them: then the words stay.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from visionloom.data.convert.chat_keys import PICTURE, TEXT, THOUGHT
from visionloom.data.convert.chat_media import ChatMedia
from visionloom.data.convert.keys import refusal, weight_of
from visionloom.data.convert.marks import answer, marks_in
from visionloom.data.convert.objects import Objects
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.videos import VIDEO_PART
from visionloom.data.shards.sample import Element, Image, Text, Think, Video

THOUGHTS: Final = ("think", "thinking", "reasoning")
PICTURES: Final = ("image", "image_url", "input_image")
VIDEOS: Final = ("video", "video_url", "input_video")
TEXTS: Final = ("text", "input_text", "output_text")
_KNOWN: Final = (*PICTURES, *VIDEOS, *TEXTS)
"""Kinds of typed parts that anybody but an assistant has."""
_CONTENTS: Final = {"image": PICTURES[:2], "video": VIDEOS[:2], "text": TEXTS[:1]}
"""Keys of a typed part that only a part of one kind has."""
_PLACEHOLDER: Final = re.compile(r"(<image>|<video>|<audio>|<bbox>|<ref-object>)")
_IN_TEXT: Final = re.compile(r"<img>[^<>]+</img>")
"""A picture as the first Qwen-VL named it."""


class ChatContent:
    """Reads the contents of one record's turns; media and objects are taken in the order of their placeholders."""

    def __init__(self, media: ChatMedia, objects: Objects) -> None:
        self.media, self.objects = media, objects
        self.draft = media.draft

    def parts(self, value: Any, role: str, number: int) -> list[Element]:
        """Return the elements of the content of turn `number`. Raises Skip."""
        parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
        if isinstance(parts, dict):
            parts = [parts]
        if not isinstance(parts, list):
            got = type(value).__name__
            problem = f"turn {number}: a text or a list of parts expected, got {got}"
            raise Skip("broken turn", problem)

        elements: list[Element] = []
        for part in parts:
            elements += self._part(part, role, number, first=not elements)
        return elements

    def _part(self, part: Any, role: str, number: int, first: bool) -> list[Element]:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = _kind_of(part)
        if kind in _KNOWN:
            self._check_one_kind(part, number)
        if kind in TEXTS and isinstance(part.get("text"), str):
            return self._text_part(part, role, first)
        if kind in PICTURES:
            return [self.media.image_part(self.draft.open(PICTURE, part))]
        if kind in VIDEOS:
            return [self.media.video_part(self.draft.open(VIDEO_PART, part))]
        if kind in THOUGHTS and role == "assistant":
            return [self._thought_part(part)]
        raise Skip("unknown part of a turn", f"turn {number}: {str(part)[:80]}")

    @staticmethod
    def _check_one_kind(part: Any, number: int) -> None:
        """Raise Skip for a part of turn `number` that holds, say, a text and a picture: one would be lost."""
        kinds: list[str] = []
        for kind, names in _CONTENTS.items():
            if any(part.get(name) for name in names):
                kinds.append(kind)
        if len(kinds) > 1:
            raise Skip("part of several kinds", f"turn {number}: {' and '.join(kinds)}")

    def _text_part(self, part: Any, role: str, first: bool) -> list[Element]:
        fields = self.draft.open(TEXT, part)
        fields.take("type")
        weight, text = weight_of(fields), fields.take("text")
        return [weighed(element, weight) for element in self.text(text, role, first)]

    def _thought_part(self, part: Any) -> Think:
        fields = self.draft.open(THOUGHT, part)
        fields.take("type")
        weight = weight_of(fields)
        text = fields.text("thinking", "reasoning", "text") or ""
        return Think(text.strip("\n"), weight)

    def text(self, text: str, role: str, first: bool) -> Iterator[Element]:
        """Yield the elements of a text; `first`: nothing of its turn precedes it. Raises Skip."""
        text = self.media.with_placeholders(text)
        if role == "assistant":
            for element in answer(text, first, self.draft.open):
                if isinstance(element, Text):
                    yield from self.placed(element.text)
                else:
                    yield element
            return
        # A user's marks stay words, which the summary counts.
        self.draft.notes += [f"marks kept as words: {mark} of a {role}" for mark in marks_in(text)]
        yield from self.placed(text)

    def placed(self, text: str) -> Iterator[Element]:
        """Yield the text, and media and objects in the places of their placeholders."""
        match = _IN_TEXT.search(text)
        if match and not self.media.images.refs:
            raise Skip("picture named in a text", match[0][:200])

        pieces = self._pieces(text)
        for place, piece in enumerate(pieces):
            if place % 2:
                yield self._placeholder(piece)
                continue
            kept = trimmed(pieces, place)
            if kept:
                yield Text(kept)

    def _pieces(self, text: str) -> list[str]:
        """Split a text at its placeholders, which are the odd pieces."""
        pieces = _PLACEHOLDER.split(text)
        # One that is only a word joins the pieces around it; from the end, so that the places before it stay.
        for place in reversed(range(1, len(pieces), 2)):
            if self._is_word(pieces, place):
                around = slice(place - 1, place + 2)
                pieces[around] = ["".join(pieces[around])]
        return pieces

    def _is_word(self, pieces: list[str], place: int) -> bool:
        """Return whether the text only speaks of `<image>`, `<video>` or `<audio>`.

        That is so where the record has none, and the placeholder is not alone on its line or the first of it.
        """
        # A record with audio is left out by its key, so that none is given here.
        given = {
            "<image>": bool(self.media.images.refs),
            "<video>": bool(self.media.videos.refs),
            "<audio>": False,
        }
        if given.get(pieces[place], True):
            return False

        before, after = pieces[place - 1], pieces[place + 1]
        starts = not before or before.endswith("\n")
        ends = not after or after.startswith("\n")
        opens = starts and (ends or after[:1].isalnum())
        closes = not after and before.endswith("\n")
        return not opens and not closes

    def _placeholder(self, name: str) -> Element:
        match name:
            case "<image>":
                return self.media.next(self.media.images)
            case "<video>":
                return self.media.next(self.media.videos)
            case "<audio>":
                raise Skip("audio", "<audio> in a text")
            case "<ref-object>":
                return self.objects.name()
        return self.objects.place()


def weighed(element: Element, weight: float | None) -> Element:
    """Return the element with a weight in the loss, unless it has one of its own."""
    if weight is None or isinstance(element, Image | Video) or element.loss is not None:
        return element
    return replace(element, loss=weight)


def is_part(value: Any) -> bool:
    """Return whether an object is a typed part of a turn, not an object that a tool returned."""
    if not isinstance(value, dict):
        return False
    kind = value.get("type")
    if not isinstance(kind, str):
        # {"text": ...} may be either: with one key it is taken for a part.
        return len(value) == 1 and _kind_of(value) is not None
    return kind in _KNOWN or bool(refusal("part", kind, True))


def _kind_of(part: Any) -> str | None:
    """Return the kind of a typed part; without `type` that of the key it has, as in Qwen's own examples."""
    if not isinstance(part, dict):
        return None
    kind = part.get("type")
    if kind is not None:
        return kind if isinstance(kind, str) else None
    for name in ("image", "image_url", "video", "video_url", "text"):
        if name in part:
            return name
    return None


def trimmed(pieces: list[str], place: int) -> str:
    """Return a text without the newlines between it and a picture or video."""
    media = ("<image>", "<video>")
    text = pieces[place]
    if place and pieces[place - 1] in media:
        text = text.lstrip("\n")
    if place + 1 < len(pieces) and pieces[place + 1] in media:
        text = text.rstrip("\n")
    return text
