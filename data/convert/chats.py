"""Conversations of other formats as messages of our schema: one parser for all of them.

`<image>` and `<video>` in a text stand for the record's pictures and videos, in order. Without any placeholder they come
first in the first user turn. Newlines next to a placeholder belong to the format and are dropped. A record without such media
only speaks of them: then the words stay.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from visionloom.data.convert.files import MediaFiles, named, reference
from visionloom.data.convert.keys import (
    LOSS_KEYS,
    Keys,
    RecordFields,
    decoded,
    listed,
    loss_of,
    refusal,
    weight_of,
)
from visionloom.data.convert.marks import (
    CALL,
    answer,
    document,
    marks_in,
    results,
    tool_calls,
    tools_of,
    with_placeholders,
)
from visionloom.data.convert.objects import OBJECTS, Objects
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft
from visionloom.data.convert.videos import SOURCES, VIDEO, VIDEO_PART, add_video
from visionloom.data.encode.tokenizer import CALL_START, THINK_END
from visionloom.data.shards.sample import (
    Element,
    Image,
    Message,
    Text,
    Think,
    ToolCall,
    Video,
    media_refs,
)

ROLES: Final = {
    "system": "system",
    "developer": "system",
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
RECORD: Final = Keys(
    "record",
    {
        "id": "id of the sample",
        "messages": "turns",
        "conversations": "turns",
        "conversation": "turns",
        "system": "system turn",
        "system_prompt": "system turn",
        "image": "pictures",
        "images": "pictures",
        "video": "videos",
        "videos": "videos",
        "t": "seconds of each frame, where a video is a list of frames",
        "fps": "rate of a video's frames, where it is a list of frames",
        "tools": "tools that may be called",
        "objects": "boxes, points and names for `<bbox>` and `<ref-object>`",
        "weight": "factor on the loss of the sample",
        "task": "evaluation task that the last answer belongs to",
        "data_source": "meta.source",
        "source": "meta.source",
    },
)
TURN: Final = Keys(
    "turn",
    {
        "from": "role",
        "role": "role",
        "value": "content",
        "content": "content",
        "tool_calls": "calls of tools",
        "function_call": "call of a tool",
        "reasoning_content": "thought before the answer",
        "reasoning": "thought before the answer",
        "thinking": "thought before the answer",
        "image": "pictures of the turn",
        "images": "pictures of the turn",
        "video": "videos of the turn",
        "videos": "videos of the turn",
        **dict.fromkeys(LOSS_KEYS, "weight in the loss"),
    },
)
TEXT: Final = Keys(
    "text",
    {
        "type": "kind of the part",
        "text": "text with placeholders",
        **dict.fromkeys(LOSS_KEYS, "weight in the loss"),
    },
)
THOUGHT: Final = Keys(
    "thought",
    {
        "type": "kind of the part",
        "text": "thought before the answer",
        "thinking": "thought before the answer",
        "reasoning": "thought before the answer",
        **dict.fromkeys(LOSS_KEYS, "weight in the loss"),
    },
)
_REFERENCES: Final = (
    "image",
    "image_url",
    "url",
    "path",
    "file",
    "source",
    "base64",
    "data",
    "bytes",
)
PICTURE: Final = Keys(
    "picture",
    {
        "type": "kind of the part",
        **dict.fromkeys(_REFERENCES, "name of a file, an object with it, or the bytes"),
        "media_type": "no effect: the bytes tell",
        "min_pixels": "smallest area",
        "max_pixels": "largest area",
    },
)
"""A typed part of a turn, and an object in place of a picture's name."""
IMAGES: Final = ("image", "images")
FILMS: Final = ("video", "videos")
"""Keys of a record's or turn's media."""
THOUGHTS: Final = ("think", "thinking", "reasoning")
PICTURES: Final = ("image", "image_url", "input_image")
VIDEOS: Final = ("video", "video_url", "input_video")
TEXTS: Final = ("text", "input_text", "output_text")
_KNOWN: Final = (*PICTURES, *VIDEOS, *TEXTS)
"""Kinds of typed parts that anybody but an assistant has."""
_CONTENTS: Final = {"image": PICTURES[:2], "video": VIDEOS[:2], "text": TEXTS[:1]}
"""Keys of a typed part that can only be what it shows: of one kind."""
_PLACEHOLDER: Final = re.compile(r"(<image>|<video>|<audio>|<bbox>|<ref-object>)")
_LIKE_PLACEHOLDER: Final = re.compile(
    r"<\|?(?:[Ii]mage|[Vv]ideo)[ _-]?\d+\|?>|<\|(?:image|video)\|>|<(?:IMAGE|Image|VIDEO|Video)(?:Here)?>"
    r"|<(?:image|video)_(?:placeholder|soft_token)>"
)
"""How other formats write a placeholder: `<image 1>` (MMMU), `<|image_1|>` (Phi), `<IMAGE>`, `<ImageHere>`."""
_IN_TEXT: Final = re.compile(r"<img>[^<>]+</img>")
"""A picture as the first Qwen-VL named it."""


def chat_keys(record: Keys) -> tuple[Keys, ...]:
    """The tables of a format whose records are conversations."""
    return record, TURN, TEXT, THOUGHT, PICTURE, VIDEO_PART, VIDEO, CALL, OBJECTS


class Chat:
    """One record: its turns, and what their placeholders stand for."""

    def __init__(
        self,
        record: RecordFields,
        draft: SampleDraft,
        files: MediaFiles,
        images: Sequence[str] = IMAGES,
        videos: Sequence[str] = FILMS,
    ) -> None:
        """`images`, `videos`: keys of the record's media."""
        self.record, self.draft, self.files = record, draft, files
        self.images = MediaQueue("<image>", media_of(record, *images))
        self.videos = MediaQueue("<video>", media_of(record, *videos))
        self.audios = MediaQueue("<audio>", [])  # a record with some is left out by its key
        self.in_parts: list[tuple[object, Image | Video]] = []
        """Media that typed parts name themselves, by their references."""
        self.objects = Objects(record, draft)
        self.called = False
        """Whether a turn so far has called a tool."""

    def fill(self, turns: Any) -> None:
        """Turn the record's turns into the draft's messages; raises Skip where media and placeholders differ."""
        given, turns = turns, decoded(turns)
        if not isinstance(turns, list) or not turns:
            got = "a text that is no JSON" if isinstance(given, str) else type(given).__name__
            raise Skip("no conversation", f"a list of turns or its JSON text expected, got {got}")
        messages: list[Message] = []
        for number, turn in enumerate(self._with_system(turns)):
            found = self._turn(number, turn)
            self.called = self.called or any(
                isinstance(one, ToolCall) for message in found for one in message.content
            )
            messages += found
        self.draft.messages = joined(self._with_media(messages))
        if not any(message.role == "assistant" for message in messages):
            raise Skip("no answer", "no turn of an assistant")
        self.draft.tools = list(tools_of(self.record.take("tools")))
        self._finish()

    def fill_document(self, text: str) -> None:
        """Make the draft a document: the record's media where a text has their placeholders, else before it."""
        text = document(with_placeholders(text, bool(self.images.refs), bool(self.videos.refs)))
        if not text.strip():
            raise Skip("no text", "the text is empty")
        content = list(self._placed(text))
        queues = (self.images, self.videos)
        left = [queue for queue in queues for _ in queue.refs[queue.used :]]
        if left and any(queue.used for queue in queues):
            raise Skip("fewer placeholders than media", f"{len(left)} more given")
        self.draft.content = [*(self._next(queue) for queue in left), *content]
        self._finish()

    def _finish(self) -> None:
        self.objects.check()
        weight = self.record.number("weight")
        self.draft.weight = 1.0 if weight is None else weight
        self.draft.task = self.record.text("task")

    def _with_system(self, turns: list[Any]) -> list[Any]:
        """The turns behind what the record's own key says, unless they begin with the same."""
        said = self.record.text("system", "system_prompt")
        if not said:
            return turns
        first = turns[0] if isinstance(turns[0], dict) else {}
        if ROLES.get(str(first.get("from", first.get("role"))).lower()) != "system":
            return [{"role": "system", "content": said}, *turns]
        if first.get("value", first.get("content")) != said:
            raise Skip("two system turns", "the record's key and its first turn differ")
        return turns

    # ---- a turn

    def _turn(self, number: int, turn: Any) -> list[Message]:
        """A turn's messages: several for several results of tools, none for an empty system turn."""
        if not isinstance(turn, dict):
            raise Skip(
                "broken turn", f"turn {number}: an object expected, got {type(turn).__name__}"
            )
        fields = self.draft.open(TURN, turn)
        name, role = self._role(number, fields)
        if role == "system" and number:
            raise Skip("system turn in the middle", f"turn {number}")
        value, loss = fields.agreed("value", "content"), loss_of(fields, role)
        if (role in ("user", "tool")) and (found := self._results(value, role)) is not None:
            return [
                Message("tool", tuple(self._text(one, "tool", first=False)), loss) for one in found
            ]
        content = self._content(value, name, role, number, fields)
        content = _ordered(
            [*self._thought(fields, content, role), *content, *self._calls(fields, content)]
        )
        return [Message(role, tuple(content), loss)] if content or role != "system" else []

    def _role(self, number: int, fields: RecordFields) -> tuple[str, str]:
        """The turn's name for its speaker, and the role of our schema."""
        names = [
            str(name).lower() for key in ("from", "role") if (name := fields.take(key)) is not None
        ]
        roles = {ROLES.get(name) for name in names}
        role = roles.pop() if len(roles) == 1 else None
        if role is None:
            raise Skip("unknown role", f"turn {number}: {' and '.join(names) or None}")
        return names[0], role

    def _results(self, value: Any, role: str) -> list[str] | None:
        """What tools returned, where a turn consists of `<tool_response>` blocks and a call stands before it.

        Without a call before them they are words of the user, as any mark in a user's turn.
        """
        if not isinstance(value, str) or "<tool_response>" not in value:
            return None
        if not (self.called or role == "tool"):
            return None
        found = results(value)
        if found is None and role == "user" and "<tool_response>" in value:
            raise Skip("tool result beside other text", value[:200])
        return found

    def _content(
        self, value: Any, name: str, role: str, number: int, fields: RecordFields
    ) -> list[Element]:
        """A turn's content, behind media of its own that no placeholder asks for; some but not all is a fault."""
        own = [
            (queue, media_of(fields, *names))
            for queue, names in ((self.images, IMAGES), (self.videos, FILMS))
        ]
        used_before = [queue.put_next(refs) for queue, refs in own]
        value = _tool_text(value) if role == "tool" else value
        content = (
            [] if value is None and role == "assistant" else self._parts(value, name, role, number)
        )

        shown: list[Element] = []
        for (queue, refs), before in zip(own, used_before, strict=True):
            if 0 < queue.used - before < len(refs):
                raise Skip("fewer placeholders than media", f"turn {number}")
            if queue.used == before:
                shown += [self._next(queue) for _ in refs]
        return [*shown, *content]

    def _parts(self, value: Any, name: str, role: str, number: int) -> list[Element]:
        if name in CALLS:
            return self._called(value)
        parts = [{"type": "text", "text": value}] if isinstance(value, str) else value
        parts = [parts] if isinstance(parts, dict) else parts
        if not isinstance(parts, list):
            raise Skip(
                "broken turn",
                f"turn {number}: a text or a list of parts expected, got {type(value).__name__}",
            )
        found: list[Element] = []
        for part in parts:
            found += self._part(part, role, number, first=not found)
        return found

    def _called(self, value: Any) -> list[Element]:
        """The value of a turn that is a call: its JSON, behind a thought at most."""
        if isinstance(value, str) and CALL_START in value:
            return list(answer(value, True, self.draft.open))
        thought, end, call = (
            value.partition(THINK_END) if isinstance(value, str) else ("", "", value)
        )
        if not end:
            return list(tool_calls(value, self.draft.open))
        return [*answer(thought + end, True, self.draft.open), *tool_calls(call, self.draft.open)]

    def _calls(self, fields: RecordFields, content: list[Element]) -> list[ToolCall]:
        """The calls that a turn's keys name and its content does not hold already; raises Skip where they differ."""
        found = [element for element in content if isinstance(element, ToolCall)]
        more: list[ToolCall] = []
        for name in ("tool_calls", "function_call"):
            calls = [
                call
                for one in listed(fields.take(name))
                for call in tool_calls(one, self.draft.open)
            ]
            if calls and (known := found or more) and calls != known:
                raise Skip("two lists of calls in a turn", f"turn key {name}: {str(calls)[:200]}")
            more = more or calls
        return [] if found else more

    def _thought(self, fields: RecordFields, content: list[Element], role: str) -> list[Element]:
        """The turn's reasoning where it has a key of its own."""
        thought = fields.agreed("reasoning_content", "reasoning", "thinking")
        if thought in (None, ""):
            return []
        if role != "assistant" or not isinstance(thought, str):
            raise Skip("broken thought", f"{role}: {str(thought)[:80]}")
        thought = thought.strip("\n")
        if content and isinstance(content[0], Think):
            if content[0].text.strip() != thought.strip():
                raise Skip("two thoughts in an answer", thought[:200])
            return []
        return [Think(thought)]

    # ---- parts of a turn

    def _part(self, part: Any, role: str, number: int, first: bool) -> Iterator[Element]:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        kind = _kind_of(part)
        if (
            kind in _KNOWN
            and len(
                shown := [
                    one for one, names in _CONTENTS.items() if any(part.get(key) for key in names)
                ]
            )
            > 1
        ):
            raise Skip("part of several kinds", f"turn {number}: {' and '.join(shown)}")
        if kind in TEXTS and isinstance(part.get("text"), str):
            fields = self.draft.open(TEXT, part)
            fields.take("type")
            weight, text = weight_of(fields), fields.take("text")
            yield from (_weighed(one, weight) for one in self._text(text, role, first))
        elif kind in PICTURES:
            yield self._picture(self.draft.open(PICTURE, part))
        elif kind in VIDEOS:
            yield self._video(self.draft.open(VIDEO_PART, part))
        elif kind in THOUGHTS and role == "assistant":
            fields = self.draft.open(THOUGHT, part)
            fields.take("type")
            weight = weight_of(fields)
            yield Think((fields.text("thinking", "reasoning", "text") or "").strip("\n"), weight)
        else:
            raise Skip("unknown part of a turn", f"turn {number}: {str(part)[:80]}")

    def _picture(self, fields: RecordFields) -> Image:
        fields.take("type")
        if (ref := named(fields, *_REFERENCES)) is None:
            return _bounded(self._next(self.images), fields)
        image = _bounded(picture(self.draft, self.files, ref), fields)
        self.in_parts.append((reference(ref), image))
        return image

    def _video(self, fields: RecordFields) -> Video:
        fields.take("type")
        if (ref := named(fields, *SOURCES)) is None:
            return add_video(self.draft, self.files, self.videos.next(), fields, self.record)
        video = add_video(self.draft, self.files, ref, fields, self.record)
        self.in_parts.append((reference(ref), video))
        return video

    def _text(self, text: str, role: str, first: bool) -> Iterator[Element]:
        text = with_placeholders(text, bool(self.images.refs), bool(self.videos.refs))
        if role == "assistant":
            for one in answer(text, first, self.draft.open):
                yield from self._placed(one.text) if isinstance(one, Text) else (one,)
            return
        self.draft.notes += [f"marks kept as words: {mark} of a {role}" for mark in marks_in(text)]
        yield from self._placed(text)

    def _placed(self, text: str) -> Iterator[Element]:
        """The text with media and objects where their placeholders stand."""
        if (found := _IN_TEXT.search(text)) and not self.images.refs:
            raise Skip("picture named in a text", found[0][:200])
        pieces = _PLACEHOLDER.split(text)
        for place in reversed(range(1, len(pieces), 2)):
            if self._is_word(pieces, place):
                pieces[place - 1 : place + 2] = ["".join(pieces[place - 1 : place + 2])]
        for place, piece in enumerate(pieces):
            if place % 2:
                yield self._placeholder(piece)
            elif kept := trimmed(pieces, place):
                yield Text(kept)

    def _is_word(self, pieces: list[str], place: int) -> bool:
        """Whether the text only speaks of `<image>`, `<video>` or `<audio>`: there is none, and it does not stand by itself."""
        media = {"<image>": self.images, "<video>": self.videos, "<audio>": self.audios}.get(
            pieces[place]
        )
        if media is None or media.refs:
            return False
        before, after = pieces[place - 1], pieces[place + 1]
        starts = not before or before.endswith("\n")
        ends = not after or after.startswith("\n")
        return not (
            (starts and (ends or after[:1].isalnum())) or (not after and before.endswith("\n"))
        )

    def _placeholder(self, name: str) -> Element:
        if name == "<image>":
            return self._next(self.images)
        if name == "<video>":
            return self._next(self.videos)
        if name == "<audio>":
            raise Skip("audio", "<audio> in a text")
        return self.objects.name() if name == "<ref-object>" else self.objects.place()

    # ---- media

    def _next(self, media: "MediaQueue") -> Any:
        if media is self.videos:
            return add_video(self.draft, self.files, media.next(), self.record)
        return picture(self.draft, self.files, media.next())

    def _with_media(self, messages: list[Message]) -> list[Message]:
        """Put media that no placeholder asks for first in the first user turn; some but not all is a fault.

        Media that typed parts name too are there already.
        """
        queues = (self.images, self.videos)
        given, used = sum(len(queue.refs) for queue in queues), sum(queue.used for queue in queues)
        if used == given or (
            not used and self._are_in_parts([ref for queue in queues for ref in queue.refs])
        ):
            return messages
        if used:
            raise Skip("fewer placeholders than media", f"{used} placeholders, {given} given")
        media = tuple(self._next(queue) for queue in queues for _ in queue.refs)
        if self.in_parts:
            if not {media_refs(one) for one in media} <= {
                media_refs(one) for _, one in self.in_parts
            }:
                raise Skip("media beside typed parts", f"{given} given that no part names")
            return messages
        first = next(
            (place for place, message in enumerate(messages) if message.role == "user"), None
        )
        if first is None:
            raise Skip("media without a user turn", f"{given} given")
        if strange := next(_like_placeholders(messages), None):
            raise Skip("unknown placeholder", f"{strange}: <image> or <video> expected")
        turn = messages[first]
        return [
            *messages[:first],
            replace(turn, content=(*media, *turn.content)),
            *messages[first + 1 :],
        ]

    def _are_in_parts(self, refs: list[Any]) -> bool:
        """Whether typed parts name all of these too."""
        return all(any(reference(ref) == there for there, _ in self.in_parts) for ref in refs)


class MediaQueue:
    """Pictures or videos that placeholders stand for, taken in order."""

    def __init__(self, placeholder: str, refs: list[Any]) -> None:
        self.placeholder, self.refs, self.used = placeholder, refs, 0

    def put_next(self, refs: list[Any]) -> int:
        """Put a turn's own media before those that are still to come; returns how many were taken so far."""
        self.refs[self.used : self.used] = refs
        return self.used

    def next(self) -> Any:
        """The reference of the next one; raises Skip if there is none."""
        if self.used >= len(self.refs):
            raise Skip(
                "more placeholders than media",
                f"{self.used + 1} {self.placeholder}, {len(self.refs)} given",
            )
        self.used += 1
        return self.refs[self.used - 1]


def picture(draft: SampleDraft, files: MediaFiles, ref: Any) -> Image:
    """A picture by its reference, or by an object with it and its own limits. Raises Skip."""
    if not isinstance(ref, Mapping):
        return draft.image(files.read(ref))
    fields = draft.open(PICTURE, ref)
    fields.take_all("type", "media_type")
    inner = named(fields, "bytes", *_REFERENCES)
    return _bounded(
        picture(draft, files, inner)
        if isinstance(inner, Mapping)
        else draft.image(files.read(inner)),
        fields,
    )


def media_of(fields: RecordFields, *names: str) -> list[Any]:
    """The media under these keys; raises Skip where two of them name different ones."""
    if not fields.has(*names):
        return []
    given = [refs for name in names if (refs := listed(fields.take(name)))]
    if any(
        [reference(one) for one in refs] != [reference(one) for one in given[0]]
        for refs in given[1:]
    ):
        raise Skip(
            "keys that say different things", f"{fields.keys.kind} keys {' and '.join(names)}"
        )
    return list(given[0]) if given else []


def joined(messages: list[Message]) -> list[Message]:
    """Calls of tools in turns of their own as part of what the assistant said before: one turn, one end mark."""
    found: list[Message] = []
    for message in messages:
        calls = message.role == "assistant" and all(
            isinstance(element, ToolCall) for element in message.content
        )
        if calls and message.content and found and found[-1].role == "assistant":
            before = found.pop()
            if before.loss != message.loss:
                before, message = _with_own_loss(before), _with_own_loss(message)
            message = replace(message, content=(*before.content, *message.content))
        found.append(message)
    return found


def _with_own_loss(message: Message) -> Message:
    """The message with its weight at each element, so that elements of several can stand in one."""
    weight = 1.0 if message.loss is None else message.loss
    return replace(message, content=tuple(_weighed(element, weight) for element in message.content))


def _weighed(element: Element, weight: float | None) -> Element:
    if weight is None or isinstance(element, Image | Video) or element.loss is not None:
        return element
    return replace(element, loss=weight)


def _bounded(image: Image, fields: RecordFields) -> Image:
    """The picture with the limits that the object says."""
    least, most = fields.whole("min_pixels"), fields.whole("max_pixels")
    return replace(image, min_pixels=least or image.min_pixels, max_pixels=most or image.max_pixels)


def _like_placeholders(messages: list[Message]) -> Iterator[str]:
    """What looks like another format's placeholder in the words of a user or the system."""
    texts = (
        one.text
        for message in messages
        if message.role != "assistant"
        for one in message.content
        if isinstance(one, Text)
    )
    yield from (found[0] for text in texts if (found := _LIKE_PLACEHOLDER.search(text)))


def _tool_text(value: Any) -> Any:
    """What a tool returned, as JSON text where it is neither a text nor typed parts."""
    if value is None or isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    return value if parts and all(map(_is_part, parts)) else json.dumps(value, ensure_ascii=False)


def _is_part(value: Any) -> bool:
    """Whether an object is a typed part of a turn, not an object that a tool returned."""
    if not isinstance(value, dict):
        return False
    if not isinstance(kind := value.get("type"), str):
        return len(value) == 1 and _kind_of(value) is not None
    return kind in _KNOWN or bool(refusal("part", kind, True))


def _kind_of(part: Any) -> str | None:
    """The kind of a typed part; without `type` that of the key it has, as in Qwen's own examples."""
    if not isinstance(part, dict):
        return None
    if (kind := part.get("type")) is not None:
        return kind if isinstance(kind, str) else None
    return next(
        (name for name in ("image", "image_url", "video", "video_url", "text") if name in part),
        None,
    )


def _ordered(content: list[Element]) -> list[Element]:
    """The content, with a thought at its beginning and calls at its end only; raises Skip."""
    if any(isinstance(element, Think) for element in content[1:]):
        raise Skip("thought in the middle of an answer", "")
    calls = [isinstance(element, ToolCall) for element in content]
    if sorted(calls) != calls:
        raise Skip("text behind a tool call", "")
    return content


def trimmed(pieces: list[str], place: int) -> str:
    """A text without the newlines between it and a picture or video."""
    media = ("<image>", "<video>")
    text = pieces[place]
    if place and pieces[place - 1] in media:
        text = text.lstrip("\n")
    if place + 1 < len(pieces) and pieces[place + 1] in media:
        text = text.rstrip("\n")
    return text
