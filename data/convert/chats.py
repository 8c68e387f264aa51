"""Conversations of other formats as messages of our schema: one parser for all of them.

Media that no placeholder asks for come first in the first user turn.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from visionloom.data.convert.chat_content import ChatContent, is_part, weighed
from visionloom.data.convert.chat_keys import TURN
from visionloom.data.convert.chat_media import ChatMedia, MediaQueue, media_of
from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.keys import RecordFields, decoded, listed, loss_of
from visionloom.data.convert.marks import (
    answer,
    document,
    results,
    tool_calls,
    tools_of,
)
from visionloom.data.convert.objects import Objects
from visionloom.data.convert.skip import Skip
from visionloom.data.convert.source import SampleDraft
from visionloom.data.encode.tokenizer import CALL_START, THINK_END
from visionloom.data.shards.sample import Element, Message, Think, ToolCall

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
IMAGES: Final = ("image", "images")
FILMS: Final = ("video", "videos")
"""Keys of a record's or turn's media."""


@dataclass(frozen=True, slots=True)
class _Turn:
    """A turn's place, its word for the speaker, and the role of our schema."""

    number: int
    speaker: str
    role: str


class Chat:
    """One record: its turns, and the media and objects that their placeholders stand for."""

    def __init__(
        self,
        record: RecordFields,
        draft: SampleDraft,
        files: MediaFiles,
        images: Sequence[str] = IMAGES,
        videos: Sequence[str] = FILMS,
    ) -> None:
        """`images`, `videos`: keys of the record's media."""
        self.record, self.draft = record, draft
        self.media = ChatMedia(record, draft, files, images, videos)
        self.objects = Objects(record, draft)
        self.content = ChatContent(self.media, self.objects)
        self.called = False
        """True once a turn has called a tool."""

    def fill(self, turns: Any) -> None:
        """Turn the record's turns into the draft's messages; raises Skip where media and placeholders differ."""
        # Tables often hold the turns as JSON text.
        given, turns = turns, decoded(turns)
        if not isinstance(turns, list) or not turns:
            got = "a text that is no JSON" if isinstance(given, str) else type(given).__name__
            raise Skip("no conversation", f"a list of turns or its JSON text expected, got {got}")

        messages = self._messages(self._with_system(turns))
        self.draft.messages = joined(self.media.placed(messages))
        # A chat without an answer has nothing to learn.
        if not any(message.role == "assistant" for message in messages):
            raise Skip("no answer", "no turn of an assistant")
        self.draft.tools = list(tools_of(self.record.take("tools")))
        self._finish()

    def _messages(self, turns: list[Any]) -> list[Message]:
        messages: list[Message] = []
        for number, turn in enumerate(turns):
            turn_messages = self._turn(number, turn)
            # Later turns may hold the results.
            for message in turn_messages:
                if any(isinstance(element, ToolCall) for element in message.content):
                    self.called = True
            messages += turn_messages
        return messages

    def fill_document(self, text: str) -> None:
        """Make the draft a document: the record's media where a text has their placeholders, else before it."""
        media = self.media
        text = document(media.with_placeholders(text))
        if not text.strip():
            raise Skip("no text", "the text is empty")

        content = list(self.content.placed(text))
        left = [queue for queue in media.queues for _ in queue.refs[queue.used :]]
        if left and any(queue.used for queue in media.queues):
            raise Skip("fewer placeholders than media", f"{len(left)} more given")
        self.draft.content = [*(media.next(queue) for queue in left), *content]
        self._finish()

    def _finish(self) -> None:
        self.objects.check()
        weight = self.record.number("weight")
        self.draft.weight = 1.0 if weight is None else weight
        self.draft.task = self.record.text("task")

    def _with_system(self, turns: list[Any]) -> list[Any]:
        """Return the turns after the system turn of the record's own key, unless they begin with the same."""
        system = self.record.text("system", "system_prompt")
        if not system:
            return turns
        first = turns[0] if isinstance(turns[0], dict) else {}
        speaker = str(first.get("from", first.get("role"))).lower()
        if ROLES.get(speaker) != "system":
            return [{"role": "system", "content": system}, *turns]
        if first.get("value", first.get("content")) != system:
            raise Skip("two system turns", "the record's key and its first turn differ")
        return turns

    # ---- a turn

    def _turn(self, number: int, value: Any) -> list[Message]:
        """Return a turn's messages: several for several results of tools, none for an empty system turn."""
        if not isinstance(value, dict):
            got = type(value).__name__
            raise Skip("broken turn", f"turn {number}: an object expected, got {got}")
        fields = self.draft.open(TURN, value)
        turn = self._speaker(number, fields)
        # The template has one place for it.
        if turn.role == "system" and number:
            raise Skip("system turn in the middle", f"turn {number}")
        said, loss = fields.agreed("value", "content"), loss_of(fields, turn.role)

        returned = self._results(said, turn.role)
        if returned is not None:
            texts = [tuple(self.content.text(text, "tool", first=False)) for text in returned]
            return [Message("tool", content, loss) for content in texts]

        content = self._content(said, turn, fields)
        thought = self._thought(fields, content, turn.role)
        content = [*thought, *content, *self._calls(fields, content)]
        _check_order(content)
        if not content and turn.role == "system":
            return []
        return [Message(turn.role, tuple(content), loss)]

    def _speaker(self, number: int, fields: RecordFields) -> _Turn:
        """Return the turn's word for its speaker, and the role of our schema."""
        words = [fields.take(key) for key in ("from", "role")]
        names = [str(word).lower() for word in words if word is not None]
        roles = {ROLES.get(name) for name in names}
        role = roles.pop() if len(roles) == 1 else None
        if role is None:
            raise Skip("unknown role", f"turn {number}: {' and '.join(names) or None}")
        return _Turn(number, names[0], role)

    def _results(self, value: Any, role: str) -> list[str] | None:
        """Return the answers of tools, where a turn consists of `<tool_response>` blocks after a call.

        Without a call before them they are words of the user, as any mark in a user's turn.
        """
        if role not in ("user", "tool"):
            return None
        if not isinstance(value, str) or "<tool_response>" not in value:
            return None
        if not self.called and role != "tool":
            return None
        blocks = results(value)
        if blocks is None and role == "user":
            raise Skip("tool result beside other text", value[:200])
        return blocks

    def _content(self, value: Any, turn: _Turn, fields: RecordFields) -> list[Element]:
        """Return a turn's content, after media of its own that no placeholder asks for; some but not all is a fault."""
        images, videos = media_of(fields, *IMAGES), media_of(fields, *FILMS)
        own = (self.media.images, images), (self.media.videos, videos)
        # A turn's own media come before those of the record that are still waiting.
        used_before = [queue.put_next(refs) for queue, refs in own]
        content = self._said(value, turn)

        unasked: list[Element] = []
        for (queue, refs), before in zip(own, used_before, strict=True):
            used = queue.used - before
            unasked += self._unasked(queue, len(refs), used, turn)
        return [*unasked, *content]

    def _unasked(self, queue: MediaQueue, given: int, used: int, turn: _Turn) -> list[Element]:
        """Return a turn's own media where no placeholder took any; raises Skip where placeholders took some."""
        if 0 < used < given:
            raise Skip("fewer placeholders than media", f"turn {turn.number}")
        return [] if used else [self.media.next(queue) for _ in range(given)]

    def _said(self, value: Any, turn: _Turn) -> list[Element]:
        """Return the elements of a turn's text or typed parts."""
        if turn.role == "tool":
            value = _tool_text(value)
        # An answer that only calls tools may have no content.
        if value is None and turn.role == "assistant":
            return []
        if turn.speaker in CALLS:
            return self._called(value)
        return self.content.parts(value, turn.role, turn.number)

    def _called(self, value: Any) -> list[Element]:
        """Return the value of a turn that is a call: its JSON, after a thought at most."""
        if not isinstance(value, str):
            return list(tool_calls(value, self.draft.open))
        if CALL_START in value:
            return list(answer(value, True, self.draft.open))
        thought, end, call = value.partition(THINK_END)
        if not end:
            return list(tool_calls(value, self.draft.open))
        return [*answer(thought + end, True, self.draft.open), *tool_calls(call, self.draft.open)]

    def _calls(self, fields: RecordFields, content: list[Element]) -> list[ToolCall]:
        """Return the calls of a turn's keys that its content does not hold already; raises Skip where they differ."""
        in_content = [element for element in content if isinstance(element, ToolCall)]
        known = in_content
        for name in ("tool_calls", "function_call"):
            calls: list[ToolCall] = []
            for value in listed(fields.take(name)):
                calls += tool_calls(value, self.draft.open)
            if calls and known and calls != known:
                raise Skip("two lists of calls in a turn", f"turn key {name}: {str(calls)[:200]}")
            known = known or calls
        return [] if in_content else known

    def _thought(self, fields: RecordFields, content: list[Element], role: str) -> list[Element]:
        """Return the turn's reasoning where it has a key of its own."""
        thought = fields.agreed("reasoning_content", "reasoning", "thinking")
        if thought in (None, ""):
            return []
        if role != "assistant" or not isinstance(thought, str):
            raise Skip("broken thought", f"{role}: {str(thought)[:80]}")
        thought = thought.strip("\n")
        if content and isinstance(content[0], Think):
            # Its text may hold the same thought once more.
            if content[0].text.strip() != thought.strip():
                raise Skip("two thoughts in an answer", thought[:200])
            return []
        return [Think(thought)]


def joined(messages: list[Message]) -> list[Message]:
    """Join calls of tools in turns of their own to the assistant's turn before: one turn, one end mark."""
    turns: list[Message] = []
    for message in messages:
        are_calls = all(isinstance(element, ToolCall) for element in message.content)
        continues = bool(turns) and turns[-1].role == message.role == "assistant"
        if continues and message.content and are_calls:
            before = turns.pop()
            # One message has one weight; elements can have their own.
            if before.loss != message.loss:
                before, message = _with_own_loss(before), _with_own_loss(message)
            message = replace(message, content=(*before.content, *message.content))
        turns.append(message)
    return turns


def _with_own_loss(message: Message) -> Message:
    """Return the message with its weight at each element, so that elements of several can stand in one."""
    weight = 1.0 if message.loss is None else message.loss
    return replace(message, content=tuple(weighed(element, weight) for element in message.content))


def _tool_text(value: Any) -> Any:
    """Return a tool's answer as JSON text where it is neither a text nor typed parts."""
    if value is None or isinstance(value, str):
        return value
    parts = value if isinstance(value, list) else [value]
    if parts and all(map(is_part, parts)):
        return value
    return json.dumps(value, ensure_ascii=False)


def _check_order(content: list[Element]) -> None:
    """Raise Skip unless a thought is only at the beginning, and calls are only at the end."""
    if any(isinstance(element, Think) for element in content[1:]):
        raise Skip("thought in the middle of an answer", "")
    calls = [isinstance(element, ToolCall) for element in content]
    if sorted(calls) != calls:
        raise Skip("text behind a tool call", "")
