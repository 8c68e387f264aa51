"""Scores of answers: pure functions of the generated text and the right one."""

import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from visionloom.common.jsonfile import JsonError, checked, load_json
from visionloom.data.encode.tokenizer import THINK_END, THINK_START

LEAST_IOU: Final = 0.5
"""Overlap with which a box counts as right, as in the grounding benchmarks of the report (section 5)."""

FULL_WIDTH: Final = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
"""Signs as wide as a Chinese character, and their ASCII; for str.translate. Units such as the sign for cm² stay."""
NO_WORD: Final = r"(?![A-Za-z0-9_\u00c0-\u024f'\u2019])"
"""After a letter that stands alone. Next to Chinese or Japanese characters, which put no spaces around it, it does too."""
ALONE: Final = NO_WORD.replace("(?!", "(?<!")
ANSWER_IS: Final = re.compile(
    r"(?:(?i:answer|choice|option)(?i:\s+is)?"
    r"|(?:答案|故选|应选|正解|答え|選択肢?)"
    r"[\u3011\]]?\s*(?:应该)?[是为為は选]?(?:选项)?)"
    rf"\s*:?\s*\**[(\u3010\u300c]?([A-J]{NO_WORD}|[a-j](?=[\s.)*\u3002\u3011\u300d]*\Z))"
)
"""As in "The answer is (B)" and "Answer: B", and in Chinese and Japanese."""
CHOICES: Final = (
    re.compile(r"\A[\s(\[*\u3010\u300c]*([A-Ja-j])[\s)\].:*,\u3011\u300d\u3002\u3001]*\Z"),
    re.compile(rf"\\boxed\{{[\s(]*(?:\\text\{{)?[\s(]*([A-J]){NO_WORD}"),
    ANSWER_IS,
    re.compile(r"\(([A-J])\)"),
    re.compile(r"\A\s*\**([A-J])[).:]"),
    # "A cat" and "I think" are words, "A or B" are two letters
    re.compile(rf"{ALONE}([A-J]){NO_WORD}(?:(?<=[B-HJ])|(?!\s+(?!(?:and|or)\b)[a-z]))"),
)
"""Forms in which a letter is chosen, the surest first; the words "A" and "I" are none. Free text is read as VLMEvalKit's
can_infer_option and lmms-eval's parse_multi_choice_response read it, but several letters are no choice."""
QUOTES: Final = "\"'`\u2018\u2019\u201c\u201d\u300c\u300d\u300e\u300f\u00ab\u00bb"
BRACKET: Final = re.compile(r"[\[{]")
EXTENT: Final = json.JSONDecoder(parse_int=str, parse_float=str)
"""Finds where JSON ends; load_json then judges what is in it."""
Corners = tuple[float, float, float, float]
"""Left, top, right and bottom of a rectangle, in any unit."""


@dataclass(frozen=True)
class LabelledBox:
    """A box as Qwen3-VL writes it."""

    bbox_2d: Corners
    """In thousandths of the picture's sides."""
    label: str = ""


def is_right(answer: str, reference: str, score: str = "default") -> bool:
    """Return whether an answer is right by a score of SCORES; thoughts before it are not compared."""
    return SCORES[score](final_answer(answer), final_answer(reference))


def by_default(said: str, right: str) -> bool:
    """Return whether boxes overlap those of the reference by LEAST_IOU, or anything else equals it word for word."""
    boxes = boxes_of(right)
    if boxes:
        return boxes_match(boxes_of(said), boxes)
    return said == right


def exact(said: str, right: str) -> bool:
    """Return whether two texts are equal but for case, runs of white space, and quotes and a full stop around all of it."""
    return _normalised(said) == _normalised(right)


def _normalised(text: str) -> str:
    words = unicodedata.normalize("NFKC", text).casefold().split()
    # the full stop of Chinese and Japanese, which NFKC keeps
    inside = " ".join(words).strip(QUOTES).removesuffix(".").removesuffix("\u3002")
    return inside.strip(QUOTES + " ")


def choice(said: str, right: str) -> bool:
    """Return whether an answer to a multiple-choice question names the letter of the reference, and no other."""
    # A reference may be the letter alone, or the letter with the text of the choice.
    letter = chosen_letter(right)
    return letter is not None and chosen_letter(said) == letter


def chosen_letter(text: str) -> str | None:
    """Return the letter that a text chooses; None if it chooses none, or several.

    The first form of CHOICES that there is decides, from what only an answer looks like to a letter that stands alone. The
    last one that it finds is taken where the text says "the answer is" more than once.
    """
    text = text.translate(FULL_WIDTH)
    for form in CHOICES:
        letters = [match.group(1) for match in form.finditer(text)]
        if form is ANSWER_IS and letters:
            return letters[-1].upper()
        if letters:
            return letters[0].upper() if len(set(letters)) == 1 else None
    return None


def overlap(said: str, right: str) -> bool:
    """Return whether boxes overlap those of the reference by LEAST_IOU; a reference without boxes is never met."""
    boxes = boxes_of(right)
    return bool(boxes) and boxes_match(boxes_of(said), boxes)


def final_answer(text: str) -> str:
    """Return the text after the thoughts, without surrounding white space; empty for thoughts that did not end."""
    if text.lstrip().startswith(THINK_START) and THINK_END not in text:
        return ""
    return text.rpartition(THINK_END)[2].strip()


def boxes_of(text: str) -> list[LabelledBox]:
    """Read the boxes of an answer: one or several in JSON, alone or with words or a fence around them; empty if there are none."""
    return entries_of(text, list[LabelledBox])


def entries_of[T](text: str, schema: type[list[T]]) -> list[T]:
    """Read what a text says last in JSON as entries of a schema: one, a list, or one after the other; empty if there are none."""
    for values in reversed(json_in(text)):
        entries = []
        for value in values:
            entries += value if isinstance(value, list) else [value]
        with suppress(JsonError):
            return checked(entries, schema, "answer")
    return []


def json_in(text: str) -> list[list[Any]]:
    """Return the JSON lists and objects in a text, those together that nothing but white space and commas parts.

    What stands in brackets that are not closed is left out; None stands for what has numbers that JSON has not.
    """
    groups, last = list[list[Any]](), 0
    for start, end in extents_of_json(text):
        if not groups or text[last:start].strip(" \t\r\n,"):
            groups.append([])
        value = None
        with suppress(JsonError):
            value = load_json(text[start:end], "answer")
        groups[-1].append(value)
        last = end
    return groups


def extents_of_json(text: str) -> Iterator[tuple[int, int]]:
    """Yield where lists and objects that are not inside others begin and end in a text."""
    end = 0
    while bracket := BRACKET.search(text, end):
        start = bracket.start()
        try:
            _, end = EXTENT.raw_decode(text, start)
            yield start, end
        except RecursionError:
            return
        except json.JSONDecodeError as error:
            # Behind what was read of it: parts of a broken list are no answer, and none is read twice.
            end = max(error.pos, start + 1)


def boxes_match(
    answer: list[LabelledBox], reference: list[LabelledBox], least: float = LEAST_IOU
) -> bool:
    """Return whether each box of the reference has one of the answer's to itself, of its label, that overlaps it enough.

    The answer must have no others.
    """
    left = list(answer)
    for wanted in reference:
        # Each box of the answer serves once, so that one cannot stand for two.
        rivals = [box for box in left if box.label == wanted.label]
        best = max(rivals, key=lambda box: iou(box.bbox_2d, wanted.bbox_2d), default=None)
        if best is None or iou(best.bbox_2d, wanted.bbox_2d) < least:
            return False
        left.remove(best)
    return not left


def iou(one: Corners, other: Corners) -> float:
    """Return the area that two rectangles share as a part of the area that they cover together; 0 without any area."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0.0, width) * max(0.0, height)
    covered = area(one) + area(other) - shared
    return shared / covered if covered > 0 else 0.0


def area(corners: Corners) -> float:
    """Return the area of a rectangle; 0 if it is turned inside out."""
    left, top, right, bottom = corners
    return max(0.0, right - left) * max(0.0, bottom - top)


SCORES: Final[dict[str, Callable[[str, str], bool]]] = {
    "default": by_default,
    "exact": exact,
    "choice": choice,
    "iou": overlap,
}
"""Scores by name, in the words of data.config.SCORES."""
