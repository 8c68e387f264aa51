"""The turns of a chat for a model that always thinks before it answers.

A server's prompt ends with `<think>`, so such a model never writes an answer without thoughts, and it never reads the thoughts that
led to the answers before: of these the template keeps the answers alone. Source: the chat template of the Qwen3-VL Thinking models.
"""

from collections.abc import Sequence
from dataclasses import replace

from visionloom.data.shards.sample import Element, Image, Message, Text, Think, Video


def thinking_turns(messages: Sequence[Message]) -> list[Message]:
    """Return the turns of a chat as the thinking format has them.

    Answers to the last question of the user, which results of tools are not, keep their thoughts; the turn that ends the chat gets an
    empty thought, without loss, if it has none. All other turns of the assistant lose their thoughts and their loss: no
    model in this format writes them so.
    """
    asked = [place for place, message in enumerate(messages) if message.role == "user"]
    question, last = max(asked, default=-1), len(messages) - 1
    turns = []
    for place, message in enumerate(messages):
        if message.role == "assistant":
            thought = _thought_of(message)
            thinks = place > question and (place == last or bool(thought.text))
            message = _with_thought(message, thought) if thinks else _without_thoughts(message)
        turns.append(message)
    return turns


def begins_with_thought(message: Message) -> bool:
    """Return whether a turn of `thinking_turns` is one that a model writes after `<think>`."""
    return bool(message.content) and isinstance(message.content[0], Think)


def _thought_of(message: Message) -> Think:
    """Return the thought that a turn begins with; an empty one, without loss, if there is none."""
    first = message.content[0] if message.content else None
    # newlines at the edges are the template's
    text = first.text.strip("\n") if isinstance(first, Think) else ""
    return replace(first, text=text) if isinstance(first, Think) and text else Think("", 0.0)


def _with_thought(message: Message, thought: Think) -> Message:
    """Return a turn that begins with a thought, and goes on right after the template's newlines."""
    rest = list(message.content)
    if rest and isinstance(rest[0], Think):
        del rest[0]
    if rest and isinstance(rest[0], Text):
        rest[0] = replace(rest[0], text=rest[0].text.lstrip("\n"))
    return replace(message, content=(thought, *rest))


def _without_thoughts(message: Message) -> Message:
    """Return a turn of the past: what was said, which is read and not learned."""
    # An element's own loss goes before its message's: both have to go.
    said = [_unlearned(each) for each in message.content if not isinstance(each, Think)]
    return replace(message, content=tuple(said), loss=0.0)


def _unlearned(element: Element) -> Element:
    """Return an element with the loss of its message."""
    return element if isinstance(element, Image | Video) else replace(element, loss=None)
