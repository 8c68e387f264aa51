"""Conversations of other formats as messages of our schema.

`<image>` and `<video>` in a text stand for the record's pictures and videos, in order. Without any placeholder they come
first in the first user turn. Newlines next to a placeholder belong to the format and are dropped.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import Draft
from visionloom.data.convert.videos import add_video
from visionloom.data.sample import Box, Element, Image, Message, Point, Text, Think, ToolCall, Video

ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
}
CALLS: Final = ("function_call", "tool_call")
_PLACEHOLDER: Final = re.compile(r"(<image>|<video>|<bbox>|<ref-object>)")
_THINK: Final = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_BOX_SPACES: Final = {"real": 1.0, "norm1": 1000.0, "norm1000": 1.0}
"""ms-swift's names of coordinate systems, and the factor to pixels (real) or thousandths."""


class Chat:
    """One record: its turns, and what their placeholders stand for."""

    def __init__(self, record: Mapping[str, Any], draft: Draft, files: MediaFiles) -> None:
        self.record, self.draft, self.files = record, draft, files
        self.images = [draft.image(files.read(ref)) for ref in media_list(record, "image", "images")]
        self.videos = [add_video(draft, files, value, record) for value in media_list(record, "video", "videos")]
        self.shown: list[Image | Video] = []
        self.objects = Objects(record.get("objects"))

    def fill(self, turns: Any) -> None:
        """Turn the record's turns into the draft's messages; raises Skip where media and placeholders differ."""
        if not isinstance(turns, list) or not turns:
            raise Skip("no conversation", f"a list of turns expected, got {type(turns).__name__}")
        messages: list[Message] = []
        for number, turn in enumerate(turns):
            role, content = self._turn(number, turn)
            if content or role != "system":
                messages.append(Message(role, tuple(content)))
        self.draft.messages = self._with_media(messages)
        if not any(message.role == "assistant" for message in messages):
            raise Skip("no answer", "no turn of an assistant")
        self.draft.tools = list(tools_of(self.record.get("tools")))

    def _turn(self, number: int, turn: Any) -> tuple[str, list[Element]]:
        if not isinstance(turn, dict):
            raise Skip("broken turn", f"turn {number}: an object expected, got {type(turn).__name__}")
        name = turn.get("from", turn.get("role"))
        role = ROLES.get(name.lower()) if isinstance(name, str) else None
        if role is None:
            raise Skip("unknown role", f"turn {number}: {name!r}")
        if role == "system" and number:
            raise Skip("system turn in the middle", f"turn {number}")
        value = turn.get("value", turn.get("content"))
        if name in CALLS:
            return role, [tool_call(value)]
        calls = [tool_call(call) for call in turn.get("tool_calls") or []]
        return role, [*self._content(value, role, number, bool(calls)), *calls]

    def _content(self, value: Any, role: str, number: int, empty: bool) -> list[Element]:
        """A turn's content: a text with placeholders, or a list of typed parts."""
        if value is None and empty:
            return []
        parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
        if not isinstance(parts, list):
            raise Skip("broken turn", f"turn {number}: a text or a list of parts expected, got {type(value).__name__}")
        return [element for part in parts for element in self._part(part, role, number)]

    def _part(self, part: Any, role: str, number: int) -> Iterator[Element]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            yield from self._text(part["text"], role)
        elif kind in ("image", "image_url"):
            ref = part.get("image", part.get("image_url", part.get("url")))
            yield self._next(self.images, "<image>") if ref is None else self.draft.image(self.files.read(ref))
        elif kind == "video" and part.get("video") is not None:
            yield add_video(self.draft, self.files, part["video"], part)
        elif kind == "video":
            yield self._next(self.videos, "<video>")
        else:
            raise Skip("unknown part of a turn", f"turn {number}: {str(part)[:80]}")

    def _text(self, text: str, role: str) -> Iterator[Element]:
        if role == "assistant" and (found := _THINK.match(text)):
            if found[1].strip():
                yield Think(found[1].strip("\n"))
            text = text[found.end() :]
        pieces = _PLACEHOLDER.split(text)
        for place, piece in enumerate(pieces):
            if place % 2:
                yield self._placeholder(piece)
            elif kept := self._trimmed(pieces, place):
                yield Text(kept)

    def _trimmed(self, pieces: list[str], place: int) -> str:
        """A text without the newlines between it and a picture or video."""
        media = ("<image>", "<video>")
        text = pieces[place]
        if place and pieces[place - 1] in media:
            text = text.lstrip("\n")
        if place + 1 < len(pieces) and pieces[place + 1] in media:
            text = text.rstrip("\n")
        return text

    def _placeholder(self, name: str) -> Element:
        if name == "<image>":
            return self._next(self.images, name)
        if name == "<video>":
            return self._next(self.videos, name)
        return self.objects.name() if name == "<ref-object>" else self.objects.place()

    def _next(self, media: Sequence[Image] | Sequence[Video], placeholder: str) -> Image | Video:
        used = sum(any(one is other for other in media) for one in self.shown)
        if used >= len(media):
            raise Skip("more placeholders than media", f"{used + 1} {placeholder}, {len(media)} given")
        self.shown.append(media[used])
        return media[used]

    def _with_media(self, messages: list[Message]) -> list[Message]:
        """Put media that no placeholder asks for first in the first user turn; some but not all is a fault."""
        given: list[Image | Video] = [*self.images, *self.videos]
        if len(self.shown) == len(given):
            return messages
        if self.shown:
            raise Skip("fewer placeholders than media", f"{len(self.shown)} placeholders, {len(given)} given")
        first = next((place for place, message in enumerate(messages) if message.role == "user"), None)
        if first is None:
            raise Skip("media without a user turn", f"{len(given)} given")
        turn = messages[first]
        return [*messages[:first], Message("user", (*given, *turn.content)), *messages[first + 1 :]]


class Objects:
    """Boxes and names that `<bbox>` and `<ref-object>` stand for (ms-swift's `objects`), taken in order."""

    def __init__(self, value: Any) -> None:
        found = value if isinstance(value, dict) else {}
        self.names, self.places = list(found.get("ref") or []), list(found.get("bbox") or [])
        self.images = list(found.get("image_id") or [])
        self.system = found.get("bbox_type") or "real"
        self.named = self.placed = 0

    def name(self) -> Text:
        """The next name."""
        if self.named >= len(self.names):
            raise Skip("more placeholders than objects", f"{self.named + 1} <ref-object>, {len(self.names)} given")
        self.named += 1
        return Text(str(self.names[self.named - 1]))

    def place(self) -> Box | Point:
        """The next box (four numbers) or point (two)."""
        if self.placed >= len(self.places):
            raise Skip("more placeholders than objects", f"{self.placed + 1} <bbox>, {len(self.places)} given")
        image = int(self.images[self.placed]) if self.placed < len(self.images) else 0
        factor, values = _BOX_SPACES.get(self.system), self.places[self.placed]
        if factor is None or not isinstance(values, list) or len(values) not in (2, 4):
            raise Skip("broken box", f"{self.system}: {str(values)[:80]}")
        numbers = tuple(float(value) * factor for value in values)
        space: Any = "px" if self.system == "real" else "relative1000"
        self.placed += 1
        if len(numbers) == 4:
            return Box(image, numbers, space)
        return Point(image, (numbers[0], numbers[1]), space)


def media_list(record: Mapping[str, Any], *names: str) -> list[Any]:
    """The record's media under one of these names: one value or a list."""
    for name in names:
        if (value := record.get(name)) not in (None, "", []):
            return value if isinstance(value, list) else [value]
    return []


def tool_call(value: Any) -> ToolCall:
    """A call as an object or its JSON text: {"name": ..., "arguments": {...}}, also below a key `function`."""
    found = _json(value)
    found = found.get("function", found) if isinstance(found, dict) else None
    arguments = _json(found.get("arguments") or {}) if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not isinstance(arguments, dict):
        raise Skip("broken tool call", str(value)[:80])
    return ToolCall(found["name"], arguments)


def tools_of(value: Any) -> Iterator[Mapping[str, Any]]:
    """The tools that may be called: a list of objects, or its JSON text."""
    found = _json(value) if value else []
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise Skip("broken tools", str(value)[:80])
    yield from found


def _json(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None
