"""Marks written out in the texts of a source: what a published tokenizer has one token for becomes structure, for all formats.

A text's own characters never become special tokens (see `visionloom.data.encode.tokenizer`), so a call or a thought that stays
text would be spelled out in ordinary tokens, which no served model writes. What an assistant says and what a document holds is
therefore turned into elements here, or leaves its record out. A user's words stay words: they cannot open a turn.
"""

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from visionloom.data.convert.keys import Keys, RecordFields, parsed, without_nulls
from visionloom.data.convert.skip import Skip
from visionloom.data.encode.tokenizer import (
    CALL_END,
    CALL_START,
    END_OF_TEXT,
    RESPONSE_START,
    THINK_END,
    THINK_START,
    TURN_END,
)
from visionloom.data.shards.sample import Text, Think, ToolCall

_MARK: Final = re.compile(
    r"</?(?:think|tool_call|tool_response)>"
    r"|<\|(?:endoftext|im_start|im_end|(?:object_ref|box|quad|vision)_(?:start|end)|(?:vision|image|video)_pad)\|>"
)
"""Everything with a token of its own in Qwen3-VL's vocabulary that text cannot write: `<|fim_prefix|>`, `<|repo_name|>` and their like
are added tokens that are not special, and match in a text."""
_LARGEST_LITERAL: Final = 1 << 16
"""Characters of a Python literal: its syntax tree takes a hundred times as much memory."""
_VISION: Final = re.compile(r"(?:<\|vision_start\|>)?(?:<\|image_pad\|>)+(?:<\|vision_end\|>)?")
_FILM: Final = re.compile(r"(?:<\|vision_start\|>)?(?:<\|video_pad\|>)+(?:<\|vision_end\|>)?")
_THOUGHT: Final = re.compile(r"\s*<think>(.*?)</think>\n*", re.DOTALL)
_RESULTS: Final = re.compile(
    r"(?:\s*<tool_response>(?:(?!</?tool_response>).)*</tool_response>)+\s*", re.DOTALL
)
_RESULT: Final = re.compile(r"<tool_response>\n?(.*?)\n?</tool_response>", re.DOTALL)


CALL: Final = Keys(
    "call",
    {
        "function": "the call itself",
        "name": "name of the call",
        "arguments": "its arguments, an object or JSON text",
        "parameters": "its arguments",
        "type": "no effect: the template does not write it",
        "id": "no effect: the template does not write it",
    },
)
Opener = Callable[[Keys, Mapping[str, Any]], RecordFields]
"""Reads an object key by key, and remembers it for the count of what was not read."""


def marks_in(text: str) -> list[str]:
    """The marks that a text holds, each once."""
    return list(dict.fromkeys(_MARK.findall(text))) if "<" in text else []


def with_placeholders(text: str, images: bool, videos: bool) -> str:
    """The vision blocks of a rendered prompt as `<image>` and `<video>`, where the record has such media."""
    if "_pad|>" not in text:
        return text
    text = _VISION.sub("<image>", text) if images else text
    return _FILM.sub("<video>", text) if videos else text


def answer(text: str, first: bool, open_fields: Opener) -> Iterator[Text | Think | ToolCall]:
    """What an assistant says: a thought at its beginning, text, and calls of tools at its end.

    `first`: nothing of the turn stands before. A thought may lack its `<think>`, as where the prompt wrote it. Newlines at
    its edges are those of the template (`reasoning_content` in that of the Qwen3-VL Thinking models). Raises Skip for marks
    that stand elsewhere.
    """
    text = _without_end(text)
    if first and (found := _THOUGHT.match(text)):
        yield Think(found[1].strip("\n"))
        text = text[found.end() :]
    elif first and THINK_END in text and THINK_START not in text:
        thought, _, text = text.partition(THINK_END)
        yield Think(thought.strip("\n"))
        text = text.lstrip("\n")
    if THINK_START in text or THINK_END in text:
        raise Skip("thought in the middle of an answer", text[:200])
    yield from _calls(text, open_fields)


def _calls(text: str, open_fields: Opener) -> Iterator[Text | ToolCall]:
    """A text and the calls behind it; the newline between them is the template's."""
    said, bodies, between = _split_calls(text)
    if any(one.strip() for one in between):
        raise Skip("text behind a tool call", "".join(between).strip()[:200])
    refuse_marks(said)
    if bodies:
        said = said.removesuffix("\n") if said.strip() else ""
    if said:
        yield Text(said)
    for body in bodies:
        yield from tool_calls(body, open_fields)


def _split_calls(text: str) -> tuple[str, list[str], list[str]]:
    """The text before the first call, what is in each call, and what stands behind each."""
    said, *rest = text.split(CALL_START)
    closed = [piece.partition(CALL_END) for piece in rest]
    if any(
        not end for _, end, _ in closed
    ):  # a mark without its other half: `refuse_marks` names it
        return text, [], []
    return said, [body for body, _, _ in closed], [behind for _, _, behind in closed]


def tool_calls(value: Any, open_fields: Opener) -> list[ToolCall]:
    """A call or a list of some, as objects or their JSON text: {"name", "arguments"}, also below a key `function`.

    Arguments are an object or its JSON text; written out again they are spaced as the template's `tojson` does. A call may be
    written as Python's dictionary, as Hermes' data set has them. Raises Skip.
    """
    found = parsed(value) or _python(value)
    if isinstance(found, list) and found:
        return [call for one in found for call in tool_calls(one, open_fields)]
    if not isinstance(found, dict):
        raise Skip("broken tool call", str(value)[:200])
    call = open_fields(CALL, found)
    call.take_all("type", "id")
    if isinstance(inner := call.take("function"), dict):
        call = open_fields(CALL, inner)
    name, arguments = call.take("name"), parsed(call.take("arguments", "parameters") or {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise Skip("broken tool call", str(value)[:200])
    return [ToolCall(name, arguments)]


def results(text: str) -> list[str] | None:
    """What tools returned, if a text consists of `<tool_response>` blocks; else None."""
    return _RESULT.findall(text) if RESPONSE_START in text and _RESULTS.fullmatch(text) else None


def document(text: str) -> str:
    """The text of a document without an end mark behind it; raises Skip for a mark inside, as in a rendered chat."""
    text = text.removesuffix(END_OF_TEXT)
    refuse_marks(text)
    return text


def refuse_marks(text: str) -> None:
    """Raise Skip if a text that is learned holds a mark."""
    if found := marks_in(text):
        raise Skip(f"{found[0]} in a text", text[max(0, text.index(found[0]) - 80) :][:200])


def tools_of(value: Any) -> list[dict[str, Any]]:
    """The tools that may be called: a list of objects, or its JSON text; raises Skip."""
    found = without_nulls(parsed(value)) if value else []
    found = [found] if isinstance(found, dict) else found
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise Skip("broken tools", str(value)[:200])
    return found


def _without_end(text: str) -> str:
    """An answer without the marks that end a turn: the template writes them."""
    stripped = text.rstrip("\n")
    for mark in (END_OF_TEXT, TURN_END):
        if stripped.endswith(mark):
            text = stripped = stripped.removesuffix(mark)
    return text


def _python(value: Any) -> Any:
    """The value of a Python literal of dictionaries, lists, texts and numbers; None for anything else."""
    if (
        not isinstance(value, str)
        or len(value) > _LARGEST_LITERAL
        or not value.strip().startswith(("{", "["))
    ):
        return None
    try:
        with warnings.catch_warnings(action="ignore"):
            found = ast.literal_eval(value.strip())
        return json.loads(json.dumps(found, allow_nan=False))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
