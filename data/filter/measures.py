"""Measures of a chat's text: repetition, and letters of scripts that its question does not have. Pure functions."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from visionloom.data.shards.sample import Element, Message, Sample, Text, Think

RUN: Final = 8
"""Words of a run that counts as repeated when it comes again: shorter ones repeat in any list or proof."""
WORD: Final = re.compile(r"[^\W\u3040-\u30ff\u3400-\u9fff]+|[\u3040-\u30ff\u3400-\u9fff]|[^\w\s]")
"""A word, one character of Chinese or Japanese, which has no spaces, or a punctuation mark."""
JOINED: Final = {
    "HIRAGANA": "CJK",
    "KATAKANA": "CJK",
    "KATAKANA-HIRAGANA": "CJK",
    "IDEOGRAPHIC": "CJK",
    "FULLWIDTH": "LATIN",
}
"""Scripts that are written together: Japanese has three."""


def repetition(text: str) -> float:
    """Return the share of the runs of RUN words that were there before, 0 to 1; 0 for a text that has no two runs."""
    words = WORD.findall(text)
    runs = [tuple(words[start : start + RUN]) for start in range(len(words) - RUN + 1)]
    if len(runs) < 2:
        return 0.0
    return 1 - len(set(runs)) / len(runs)


def scripts(text: str) -> Counter[str]:
    """Count the letters of a text by their script, as the names of Unicode begin: LATIN, CYRILLIC, CJK and so on."""
    counts: Counter[str] = Counter()
    for letter, number in Counter(text).items():
        if script := script_of(letter):
            counts[script] += number
    return counts


@lru_cache(maxsize=65_536)
def script_of(letter: str) -> str:
    """Return the script of a letter; empty for what is none."""
    if not letter.isalpha():
        return ""
    # Unicode's own property of scripts is not in Python; the names say as much.
    first = unicodedata.name(letter, "").partition(" ")[0]
    return JOINED.get(first, first)


def language_mismatch(question: str, answer: str) -> float:
    """Return the share of an answer's letters whose script is not in the question, 0 to 1; 0 if either has no letters."""
    asked, answered = scripts(question), scripts(answer)
    # A question of numbers alone says nothing about the language of its answer.
    if not asked or not answered:
        return 0.0
    strange = sum(number for script, number in answered.items() if script not in asked)
    return strange / answered.total()


def question_of(sample: Sample) -> str:
    """Return all text that users wrote in a chat."""
    return "\n".join(
        text_of(message.content) for message in sample.messages if message.role == "user"
    )


def last_answer(sample: Sample) -> Message | None:
    """Return the last turn of the assistant in a chat; None if there is none."""
    answers = [message for message in sample.messages if message.role == "assistant"]
    return answers[-1] if answers else None


def text_of(content: Sequence[Element]) -> str:
    """Return the text of a turn, without thoughts."""
    return "".join(element.text for element in content if isinstance(element, Text))


def thoughts_of(content: Sequence[Element]) -> str:
    """Return the thoughts of a turn."""
    return "".join(element.text for element in content if isinstance(element, Think))
