"""Named rewards of a generated answer, each at most 1.

What says how right an answer is lies between 0 and 1, a penalty between -1 and 0. Thoughts before the answer are not compared,
and none asks for a format.
"""

import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

from visionloom.common.jsonfile import JsonError, checked, load_json
from visionloom.data.encode.scores import boxes_of, final_answer, iou, is_right
from visionloom.train.rewards.numbers import numbers_in

RIGHT: Final = "right"
DEFAULT: Final = "default"
"""Name that stands for the reward of a dataset, and what it stands for where none is named."""
TOLERANCE: Final = 1e-6
"""Relative, between numbers that are equal: decimals of a fraction have an end."""
NEAR: Final = 50.0
"""Thousandths of a picture's sides within which a point is right: 5 %, some fingertips."""
REPEATED_WORDS: Final = 4
"""Words that count as a repetition when they come again in the same order."""
FREE_SHARE: Final = 0.8
"""Of the most tokens of an answer, below which its length costs nothing (DAPO, arXiv 2503.14476, section 3.4: 16,384 of 20,480)."""


@dataclass(frozen=True)
class Judged:
    """A generated answer and what it is judged by."""

    text: str
    """The answer with its thoughts, without the token that ended it."""
    reference: str
    """The right answer."""
    question: str
    """The prompt as a person reads it."""
    tokens: int
    """Of the answer."""
    limit: int
    """Most tokens of an answer."""

    @property
    def answer(self) -> str:
        """Return the text after the thoughts."""
        return final_answer(self.text)


def number(judged: Judged) -> float:
    """Return 1 if the last number of the answer is that of the reference: as a decimal, a fraction, with separators or a unit."""
    wanted, said = numbers_in(final_answer(judged.reference)), numbers_in(judged.answer)
    if not wanted or not said:
        return 0.0
    right, own = wanted[-1], said[-1]
    return float(abs(own - right) <= abs(right) * TOLERANCE)


def default(judged: Judged) -> float:
    """Return 1 if the answer is right by the score that evaluations take by default."""
    return float(is_right(judged.text, judged.reference))


def exact(judged: Judged) -> float:
    """Return 1 if the answer is the reference but for case, white space, quotes and a full stop."""
    return float(is_right(judged.text, judged.reference, "exact"))


def choice(judged: Judged) -> float:
    """Return 1 if the answer chooses the letter of the reference, and no other."""
    return float(is_right(judged.text, judged.reference, "choice"))


def overlap(judged: Judged) -> float:
    """Return the mean overlap (IoU) of the reference's boxes with the answer's, one to one; boxes too many count as misses."""
    wanted, said = boxes_of(final_answer(judged.reference)), boxes_of(judged.answer)
    pairs = []
    for i, box in enumerate(wanted):
        pairs += [
            (iou(own.bbox_2d, box.bbox_2d), i, j)
            for j, own in enumerate(said)
            if own.label == box.label
        ]
    total, taken, given = 0.0, set[int](), set[int]()
    # The best pair first, as benchmarks of detection match them.
    for area, i, j in sorted(pairs, reverse=True):
        if i not in taken and j not in given:
            taken.add(i)
            given.add(j)
            total += area
    most = max(len(wanted), len(said))
    return total / most if wanted else 0.0


@dataclass(frozen=True)
class LabelledPoint:
    """A point as Qwen3-VL writes it."""

    point_2d: tuple[float, float]
    """In thousandths of the picture's sides."""
    label: str = ""


def points(judged: Judged) -> float:
    """Return the share of points that are in a box of the reference, or near one of its points, one to one; too many are misses."""
    said = _points_of(judged.answer)
    boxes, wanted = boxes_of(judged.reference), _points_of(judged.reference)
    regions = [box.bbox_2d for box in boxes] or [_around(*each.point_2d) for each in wanted]
    hits, left = 0, list(said)
    # Each point counts once, or many points in one box would be worth as much as one in each.
    for region in regions:
        inside = [each for each in left if _is_in(each.point_2d, region)]
        if inside:
            left.remove(inside[0])
            hits += 1
    return hits / max(len(regions), len(said)) if regions else 0.0


def _points_of(text: str) -> list[LabelledPoint]:
    content = _json_in(text)
    entries = content if isinstance(content, list) else [content]
    try:
        return checked(entries, list[LabelledPoint], "answer")
    except JsonError:
        return []


def _around(x: float, y: float) -> tuple[float, float, float, float]:
    """Return the square within which a point is near another one."""
    return x - NEAR, y - NEAR, x + NEAR, y + NEAR


def _is_in(point: tuple[float, float], region: tuple[float, float, float, float]) -> bool:
    left, top, right, bottom = region
    return left <= point[0] <= right and top <= point[1] <= bottom


def fields(judged: Judged) -> float:
    """Return the share of the fields of a JSON object that are those of the reference; fields too many count as misses."""
    wanted, said = _json_in(judged.reference), _json_in(judged.answer)
    if not isinstance(wanted, dict) or not isinstance(said, dict) or not wanted:
        return float(wanted is not None and wanted == said)
    equal = sum(name in said and _alike(said[name], value) for name, value in wanted.items())
    return equal / len(wanted.keys() | said.keys())


def _json_in(text: str) -> Any:
    """Return the JSON between the first opening and the last closing bracket of a text; None without."""
    text = final_answer(text)
    start = min((text.find(mark) for mark in "[{" if mark in text), default=-1)
    end = max(text.rfind("]"), text.rfind("}")) + 1
    if start < 0 or end <= start:
        return None
    try:
        return load_json(text[start:end], "answer")
    except JsonError:
        return None


def _alike(one: Any, other: Any) -> bool:
    """Return whether two values are equal, texts but for case and runs of white space."""
    if isinstance(one, str) and isinstance(other, str):
        return one.casefold().split() == other.casefold().split()
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def length(judged: Judged) -> float:
    """Return a penalty that grows from 0 at FREE_SHARE of the limit to -1 at it.

    Source: soft overlong punishment of DAPO (arXiv 2503.14476), equation 13.
    """
    free = FREE_SHARE * judged.limit
    return -min(1.0, max(0.0, (judged.tokens - free) / (judged.limit - free)))


def repetition(judged: Judged) -> float:
    """Return minus the share of the answer's runs of REPEATED_WORDS words that have come before; thoughts count too."""
    words = judged.text.casefold().split()
    # Words and not tokens: the same words may be cut differently.
    runs = Counter(
        tuple(words[start : start + REPEATED_WORDS])
        for start in range(len(words) - REPEATED_WORDS + 1)
    )
    total = sum(runs.values())
    return -(total - len(runs)) / total if total else 0.0


def language(judged: Judged) -> float:
    """Return -1 if most letters of the answer are of another script than those of the question; 0 without letters."""
    asked, said = script_of(judged.question), script_of(judged.text)
    return -1.0 if asked and said and asked != said else 0.0


def script_of(text: str) -> str:
    """Return the script that most letters of a text are of, by the first word of their Unicode names; empty without letters."""
    scripts: Counter[str] = Counter()
    for letter in filter(str.isalpha, text):
        name = unicodedata.name(letter, "").partition(" ")[0]
        scripts[JOINED.get(name, name)] += 1
    return max(scripts, key=lambda script: scripts[script], default="")


JOINED: Final = {"HIRAGANA": "CJK", "KATAKANA": "CJK", "FULLWIDTH": "LATIN"}
"""Scripts that are written together: Japanese has three."""
REWARDS: Final[dict[str, Callable[[Judged], float]]] = {
    "default": default,
    "exact": exact,
    "choice": choice,
    "number": number,
    "iou": overlap,
    "points": points,
    "fields": fields,
    "length": length,
    "repetition": repetition,
    "language": language,
}
"""Rewards by name."""


def unusable_reference(name: str, reference: str) -> str:
    """Return why a reward cannot judge by a reference; empty if it can."""
    return ""
