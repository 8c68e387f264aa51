"""Named rewards of a generated answer, each at most 1.

What says how right an answer is lies between 0 and 1, a penalty between -1 and 0. Thoughts before the answer are not compared,
and none asks for a format.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

from visionloom.data.encode.scores import (
    boxes_of,
    chosen_letter,
    entries_of,
    final_answer,
    iou,
    is_right,
    json_in,
)
from visionloom.train.rewards.numbers import Percentage, numbers_in
from visionloom.train.rewards.scripts import (
    ENOUGH,
    SPACELESS,
    last_turn,
    letters_by_script,
    words_of,
)

RIGHT: Final = "right"
DEFAULT: Final = "default"
"""Name that stands for the reward of a dataset, and what it stands for where none is named."""
TOLERANCE: Final = 1e-6
"""Relative, between numbers that are equal: decimals of a fraction have an end."""
NEAR: Final = 50.0
"""Thousandths of a picture's sides within which a point is right: 5 %, some fingertips."""
REPEATED_WORDS: Final = 4
"""Words that count as a repetition when they come again in the same order; of words of one character twice as many."""
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
    equal = _is_near(own, right)
    # Asked for a percentage, some write its sign and some do not.
    if isinstance(own, Percentage) and not isinstance(right, Percentage):
        equal |= _is_near(own * 100, right)
    elif isinstance(right, Percentage) and not isinstance(own, Percentage):
        equal |= _is_near(own, right * 100)
    return float(equal)


def _is_near(own: Fraction, right: Fraction) -> bool:
    return abs(own - right) <= abs(right) * TOLERANCE


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
    said = points_of(judged.answer)
    boxes, wanted = boxes_of(final_answer(judged.reference)), points_of(judged.reference)
    regions = [box.bbox_2d for box in boxes] or [_around(*each.point_2d) for each in wanted]
    # Each point counts once, or many points in one box would be worth as much as one in each.
    hits = most_pairs(
        [[j for j, own in enumerate(said) if _is_in(own.point_2d, region)] for region in regions]
    )
    return hits / max(len(regions), len(said)) if regions else 0.0


def points_of(text: str) -> list[LabelledPoint]:
    """Read the points of an answer, as `boxes_of` reads boxes."""
    return entries_of(final_answer(text), list[LabelledPoint])


def most_pairs(choices: Sequence[Sequence[int]]) -> int:
    """Return how many can have one of their choices each, all different ones (Kuhn's augmenting paths)."""
    owners, owned = dict[int, int](), dict[int, int]()
    for newcomer in range(len(choices)):
        asked_by = dict[int, int]()
        choice = _free_choice(newcomer, choices, owners, asked_by)
        # Back along the path each gets the next choice and gives up its own; the newcomer has none.
        while choice is not None:
            owner = asked_by[choice]
            owners[choice] = owner
            given_up = owned.get(owner)
            owned[owner] = choice
            choice = given_up
    return len(owners)


def _free_choice(
    newcomer: int,
    choices: Sequence[Sequence[int]],
    owners: dict[int, int],
    asked_by: dict[int, int],
) -> int | None:
    """Return a free choice that is reached by owners giving up theirs, and in `asked_by` who asked for each on the way."""
    waiting = [newcomer]
    while waiting:
        asking = waiting.pop()
        for choice in choices[asking]:
            if choice in asked_by:
                continue
            asked_by[choice] = asking
            if choice not in owners:
                return choice
            waiting.append(owners[choice])
    return None


def _around(x: float, y: float) -> tuple[float, float, float, float]:
    """Return the square within which a point is near another one."""
    return x - NEAR, y - NEAR, x + NEAR, y + NEAR


def _is_in(point: tuple[float, float], region: tuple[float, float, float, float]) -> bool:
    left, top, right, bottom = region
    return left <= point[0] <= right and top <= point[1] <= bottom


def fields(judged: Judged) -> float:
    """Return the share of the fields of a JSON object that are those of the reference; fields too many count as misses."""
    wanted = _last_json(judged.reference)
    said = _last_json(judged.answer, type(wanted))
    if not isinstance(wanted, dict) or not isinstance(said, dict) or not wanted:
        return float(wanted is not None and _alike(wanted, said))
    equal = sum(name in said and _alike(said[name], value) for name, value in wanted.items())
    return equal / len(wanted.keys() | said.keys())


def _last_json(text: str, kind: type = object) -> Any:
    """Return the last JSON of a kind in a text, after the thoughts; None without."""
    values = [value for group in json_in(final_answer(text)) for value in group]
    fitting = [value for value in values if value is not None and isinstance(value, kind)]
    return fitting[-1] if fitting else None


def _alike(one: Any, other: Any) -> bool:
    """Return whether two values are equal, texts in them but for case and runs of white space."""
    if isinstance(one, str) and isinstance(other, str):
        return one.casefold().split() == other.casefold().split()
    if isinstance(one, dict) and isinstance(other, dict):
        same_names = one.keys() == other.keys()
        return same_names and all(_alike(value, other[name]) for name, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


def length(judged: Judged) -> float:
    """Return a penalty that grows from 0 at FREE_SHARE of the limit to -1 at it.

    Source: soft overlong punishment of DAPO (arXiv 2503.14476), equation 13.
    """
    free = FREE_SHARE * judged.limit
    return -min(1.0, max(0.0, (judged.tokens - free) / (judged.limit - free)))


def repetition(judged: Judged) -> float:
    """Return minus the share of the answer's runs of REPEATED_WORDS words that have come before; thoughts count too."""
    words = words_of(judged.text)
    is_spaceless = 2 * len(SPACELESS.findall(judged.text)) > len(words)
    size = 2 * REPEATED_WORDS if is_spaceless else REPEATED_WORDS
    # Words and not tokens: the same words may be cut differently.
    runs = Counter(tuple(words[start : start + size]) for start in range(len(words) - size + 1))
    total = sum(runs.values())
    return -(total - len(runs)) / total if total else 0.0


def language(judged: Judged) -> float:
    """Return -1 if most letters of the answer are of a script that the user's last turn does not use; 0 for few letters."""
    asked = letters_by_script(last_turn(judged.question)).most_common()
    said = letters_by_script(judged.text).most_common(1)
    if not asked or not said or said[0][1] < ENOUGH:
        return 0.0
    # A question that quotes another language may be answered in it.
    allowed = [asked[0][0], *(script for script, letters in asked if letters >= ENOUGH)]
    return 0.0 if said[0][0] in allowed else -1.0


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
REFERENCES: Final[dict[str, tuple[Callable[[str], object], str]]] = {
    "choice": (chosen_letter, "its reference chooses no letter"),
    "number": (numbers_in, "its reference has no number"),
    "iou": (boxes_of, "its reference has no box"),
    "points": (lambda text: boxes_of(text) or points_of(text), "its reference has no point or box"),
    "fields": (lambda text: _last_json(text) is not None, "its reference has no JSON"),
}
"""What a reward must read in a reference, by its name, and what is said where it cannot."""


def unusable_reference(name: str, reference: str) -> str:
    """Return why no answer can be right by a reward and a reference; empty if one can."""
    if name not in REFERENCES:
        return ""
    read, fault = REFERENCES[name]
    return "" if read(final_answer(reference)) else fault
