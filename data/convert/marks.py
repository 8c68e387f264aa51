"""Marks written out in the texts of a source: those with one token in a published tokenizer become structure, for all formats.

A text's own characters never become special tokens (see `visionloom.data.encode.tokenizer`), so a call or a thought that stays
text would be spelled out in ordinary tokens, which no served model writes. The words of an assistant and of a document are
therefore turned into elements here, or leave their record out. A user's words stay words: they cannot open a turn.
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
    """Return the marks that a text holds, each once."""
    return list(dict.fromkeys(_MARK.findall(text))) if "<" in text else []


def with_placeholders(text: str, images: bool, videos: bool) -> str:
    """Replace the vision blocks of a rendered prompt by `<image>` and `<video>`, where the record has such media."""
    if "_pad|>" not in text:
        return text
    if images:
        text = _VISION.sub("<image>", text)
    return _FILM.sub("<video>", text) if videos else text


def answer(text: str, first: bool, open_fields: Opener) -> Iterator[Text | Think | ToolCall]:
    """Yield the elements of an answer: a thought at its beginning, text, and calls of tools at its end.

    `first`: nothing of the turn precedes the text. A thought may lack its `<think>`, as where the prompt wrote it. Newlines at
    its edges are those of the template (`reasoning_content` in that of the Qwen3-VL Thinking models). Raises Skip for marks
    that stand elsewhere.
    """
    text = _without_end(text)
    match = _THOUGHT.match(text) if first else None
    if match:
        yield Think(match[1].strip("\n"))
        text = text[match.end() :]
    elif first and THINK_END in text and THINK_START not in text:
        thought, _, text = text.partition(THINK_END)
        yield Think(thought.strip("\n"))
        text = text.lstrip("\n")
    if THINK_START in text or THINK_END in text:
        raise Skip("thought in the middle of an answer", text[:200])
    yield from _calls(text, open_fields)


def _calls(text: str, open_fields: Opener) -> Iterator[Text | ToolCall]:
    """Yield a text and the calls after it; the newline between them is the template's."""
    said, *rest = text.split(CALL_START)
    calls = [piece.partition(CALL_END) for piece in rest]
    if all(end for _, end, _ in calls):
        between = "".join(after for _, _, after in calls).strip()
        if between:
            raise Skip("text behind a tool call", between[:200])
    else:
        # A mark without its other half: `refuse_marks` names it.
        said, calls = text, []

    refuse_marks(said)
    if calls:
        said = said.removesuffix("\n") if said.strip() else ""
    if said:
        yield Text(said)
    for body, _, _ in calls:
        yield from tool_calls(body, open_fields)


def tool_calls(value: Any, open_fields: Opener) -> list[ToolCall]:
    """Read a call or a list of some, as objects or their JSON text: {"name", "arguments"}, also below a key `function`.

    Arguments are an object or its JSON text; written out again they are spaced as the template's `tojson` does. A call may be
    written as Python's dictionary, as Hermes' data set has them. Raises Skip.
    """
    given = parsed(value) or _python(value)
    if isinstance(given, list) and given:
        calls: list[ToolCall] = []
        for one in given:
            calls += tool_calls(one, open_fields)
        return calls
    call = _tool_call(given, open_fields) if isinstance(given, dict) else None
    if call is None:
        raise Skip("broken tool call", str(value)[:200])
    return [call]


def _tool_call(given: dict[str, Any], open_fields: Opener) -> ToolCall | None:
    """Read one call; None if it lacks a name, or its arguments are no object."""
    call = open_fields(CALL, given)
    call.take_all("type", "id")
    # OpenAI's form has the call itself below `function`.
    inner = call.take("function")
    if isinstance(inner, dict):
        call = open_fields(CALL, inner)
    name = call.take("name")
    arguments = parsed(call.take("arguments", "parameters") or {})
    if not isinstance(name, str) or not isinstance(arguments, dict):
        return None
    return ToolCall(name, arguments)


def results(text: str) -> list[str] | None:
    """Return the answers of tools, if a text consists of `<tool_response>` blocks; else None."""
    if RESPONSE_START not in text or not _RESULTS.fullmatch(text):
        return None
    return _RESULT.findall(text)


def document(text: str) -> str:
    """Return the text of a document without an end mark after it; raises Skip for a mark inside, as in a rendered chat."""
    text = text.removesuffix(END_OF_TEXT)
    refuse_marks(text)
    return text


def refuse_marks(text: str) -> None:
    """Raise Skip if a text that is learned holds a mark."""
    marks = marks_in(text)
    if marks:
        # Some words before it, to recognize the place by.
        start = max(0, text.index(marks[0]) - 80)
        raise Skip(f"{marks[0]} in a text", text[start : start + 200])


def tools_of(value: Any) -> list[dict[str, Any]]:
    """Read the tools that may be called: a list of objects, or its JSON text; raises Skip."""
    # Nothing and an empty text say that there are none; 0 and false say nothing that can be read.
    is_none = value is None or value == ""
    tools = [] if is_none else without_nulls(parsed(value))
    if isinstance(tools, dict):
        tools = [tools]
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Skip("broken tools", str(value)[:200])
    return tools


def _without_end(text: str) -> str:
    """Return an answer without the marks that end a turn: the template writes them."""
    stripped = text.rstrip("\n")
    for mark in (END_OF_TEXT, TURN_END):
        if stripped.endswith(mark):
            text = stripped = stripped.removesuffix(mark)
    return text


def _python(value: Any) -> Any:
    """Return the value of a Python literal of dictionaries, lists, texts and numbers; None for anything else."""
    if not isinstance(value, str) or len(value) > _LARGEST_LITERAL:
        return None
    text = value.strip()
    if not text.startswith(("{", "[")):
        return None
    try:
        # Python warns of odd escapes, as of any source text.
        with warnings.catch_warnings(action="ignore"):
            literal = ast.literal_eval(text)
        # Through JSON: tuples become lists, and what JSON cannot hold is refused.
        return json.loads(json.dumps(literal, allow_nan=False))
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
