"""Rewards of answers. References: Python's fractions and formatting for numbers, scipy's assignment for boxes, tables by hand."""

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from visionloom.data.encode.scores import iou
from visionloom.train.rewards.numbers import numbers_in
from visionloom.train.rewards.rewards import REWARDS, Judged, script_of


def judged(text: str, reference: str, **more: Any) -> Judged:
    return Judged(text, reference, **{"question": "", "tokens": 1, "limit": 100, **more})


def reward(name: str, text: str, reference: str, **more: Any) -> float:
    return REWARDS[name](judged(text, reference, **more))


@given(st.integers(-(10**12), 10**12), st.integers(1, 10**6))
def test_numbers_as_python_writes_them(top: int, bottom: int) -> None:
    forms = {
        f"{top:,}": Fraction(top),
        f"{top}": Fraction(top),
        f"${top / 100:,.2f}" if top >= 0 else f"{top}": Fraction(top, 100 if top >= 0 else 1),
        f"{top}/{bottom}": Fraction(top, bottom),
        f"{top}e3": Fraction(top) * 1000,
        f"{top}%": Fraction(top, 100),
        f"{'-' if top < 0 else ''}\\frac{{{abs(top)}}}{{{bottom}}}": Fraction(top, bottom),
    }
    for text, number in forms.items():
        assert numbers_in(f"It is {text}.") == [pytest.approx(number)], text


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("between 3 and 4", [3, 4]), ("10-5", [10, 5]), ("5 - -3", [5, -3]), ("a -7 b", [-7]), ("2 1/2 cups", [Fraction(5, 2)]),
        (".5", [Fraction(1, 2)]), ("1,5", [1, 5]), ("12 km/h", [12]), ("1/0", []), ("none", []), ("9" * 500, []), ("\u22124", [-4]),
        ("1 234", [1, 234]), ("1\u202f234", [1234]), ("50\\%", [Fraction(1, 2)]),
    ],
)  # fmt: skip
def test_numbers_of_other_forms(text: str, numbers: list[Any]) -> None:
    assert numbers_in(text) == numbers


@pytest.mark.parametrize(
    ("name", "text", "reference", "expected"),
    [
        ("number", "<think>12 or 13</think>So 1,200 apples.", "1200", 1.0),
        ("number", "0.3333333", "1/3", 1.0),
        ("number", "0.33", "1/3", 0.0),
        ("number", "<think>7", "7", 0.0),
        ("number", "no idea", "7", 0.0),
        ("choice", "The answer is (B).", "B", 1.0),
        ("choice", "B or C", "B", 0.0),
        ("exact", "'A  cat.'", "a cat", 1.0),
        ("default", "a cat", "a cat", 1.0),
        ("fields", '{"total": "4 EUR", "date": 3}', '{"total": "4  eur", "date": 3}', 1.0),
        ("fields", '{"total": 4, "more": 1}', '{"total": 4, "date": 3}', 1 / 3),
        ("fields", '{"paid": 1}', '{"paid": true}', 0.0),
        ("fields", "no json", '{"paid": true}', 0.0),
        ("points", '[{"point_2d": [100, 120], "label": "x"}]', '[{"bbox_2d": [90, 90, 110, 130], "label": "x"}]', 1.0),
        ("points", '[{"point_2d": [100, 100]}, {"point_2d": [900, 900]}]', '[{"point_2d": [140, 60]}]', 0.5),
        ("points", '[{"point_2d": [160, 100]}]', '[{"point_2d": [100, 100]}]', 0.0),
        ("iou", "nothing", '[{"bbox_2d": [0, 0, 1, 1], "label": "x"}]', 0.0),
        ("repetition", "a b c d e f g h", "", 0.0),
        ("repetition", "a b c d a b c d", "", -0.2),
        ("repetition", "no " * 103, "", -0.99),
        ("repetition", "", "", 0.0),
    ],
)  # fmt: skip
def test_by_hand(name: str, text: str, reference: str, expected: float) -> None:
    assert reward(name, text, reference) == pytest.approx(expected)


@pytest.mark.parametrize(("tokens", "expected"), [(80, 0.0), (90, -0.5), (100, -1.0), (1, 0.0)])
def test_length(tokens: int, expected: float) -> None:
    assert reward("length", "", "", tokens=tokens) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        ("How many cats?", "three cats", 0.0), ("How many cats?", "三只猫", -1.0), ("有几只猫", "three cats", -1.0),
        ("猫は何匹ですか", "ねこは三匹です", 0.0), ("How many?", "3", 0.0), ("Сколько?", "три x", 0.0),
    ],
)  # fmt: skip
def test_language(question: str, answer: str, expected: float) -> None:
    assert reward("language", answer, "", question=question) == expected


def test_scripts() -> None:
    assert script_of("γάτα") == "GREEK" and script_of("123") == ""


BOXES = st.lists(
    st.tuples(*[st.integers(0, 20)] * 2, *[st.integers(1, 20)] * 2).map(
        lambda box: (box[0], box[1], box[0] + box[2], box[1] + box[3])
    ),
    max_size=3,
)


@given(BOXES, BOXES)
def test_overlap_is_at_most_that_of_the_best_assignment(said: list[Any], wanted: list[Any]) -> None:
    """With a box alone on either side it is that one: a greedy match is the best there."""
    texts = [
        json.dumps([{"bbox_2d": box, "label": "x"} for box in some]) for some in (said, wanted)
    ]
    own = reward("iou", texts[0], texts[1])
    areas = np.array([[iou(a, b) for b in wanted] for a in said] or [[0.0]])
    rows, columns = linear_sum_assignment(-areas)
    most = max(len(said), len(wanted))
    best = float(areas[rows, columns].sum()) / most if wanted and said else 0.0
    assert own <= best + 1e-9
    if min(len(said), len(wanted)) <= 1:
        assert own == pytest.approx(best)


@given(st.text(max_size=60), st.text(max_size=60))
def test_all_are_bounded(text: str, reference: str) -> None:
    for name in REWARDS:
        penalty = name in ("length", "repetition", "language")
        assert (-1.0 if penalty else 0.0) <= reward(name, text, reference) <= (not penalty), name
