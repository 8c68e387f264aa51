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
from visionloom.train.rewards.rewards import (
    REWARDS,
    Judged,
    most_pairs,
    unusable_reference,
)
from visionloom.train.rewards.scripts import letters_by_script

PENALTIES = ("length", "repetition", "language")


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
        # digits of units, names and powers
        ("25 cm^2", [25]), ("30 m2", [30]), ("25 cm\u00b2", [25]), ("25 м2", [25]), ("5 g CO2", [5]), (r"5 g \text{CO}_{2}", [5]),
        (r"25\,\mathrm{cm}^{2}", [25]), (r"90^\circ", [90]), ("5 cases of COVID-19", [5]), ("v1.2.3", []), ("No.5", [5]),
        ("CO2", [2]), ("x^2", [2]), ("USD12", [12]), ("image2", [2]), ("Table2", [2]), ("Type-2", [2]), ("Route-66", [66]), ("共3只", [3]),
        # powers of ten, and others
        (r"3 \times 10^8", [3 * 10**8]), ("5\u00d710^{8}", [5 * 10**8]), ("3x10^8", [3 * 10**8]), ("2 * 10^3", [2000]),
        (r"1.5 \cdot 10^{-3}", [Fraction(3, 2000)]), ("3 \u00d7 10⁻³", [Fraction(3, 1000)]), ("10^{-3}", [Fraction(1, 1000)]),
        ("2^10", [1024]), ("2^{9999}", [2]), ("0^-1", []), ("2 \u00d7 3 = 6", [2, 3, 6]), ("1e-3", [Fraction(1, 1000)]),
        # dates and times are no numbers
        ("12/05/2023", []), ("2023-05-12", []), ("12.05.2023", []), ("at 10:30", []), ("2023年5月12日", []), ("5 on 12/05/2023", [5]),
        # the box of an answer
        (r"so \boxed{\frac{3}{4}}, not 5", [Fraction(3, 4)]), (r"\boxed{25\text{ cm}^2} in 3 steps", [25]), (r"\boxed{7}, \boxed{8} or 9", [8]),
        (r"7 or \boxed{\text{none}}", []), (r"\boxed{7", [7]),
        # mixed numbers and fractions
        ("3 1/2.", [Fraction(7, 2)]), ("2 1/2, so", [Fraction(5, 2)]), ("-2 1/2", [Fraction(-5, 2)]), ("1.5 1/2", [Fraction(3, 2), Fraction(1, 2)]),
        ("3\n1/2", [3, Fraction(1, 2)]), (r"3\frac{1}{2}", [Fraction(7, 2)]), (r"\frac{-3}{4}", [Fraction(-3, 4)]), (r"-\frac{3}{4}", [Fraction(-3, 4)]),
        (r"\tfrac{1}{2}", [Fraction(1, 2)]), (r"\frac12", [Fraction(1, 2)]), (r"\frac{1.5}{2}", [Fraction(3, 4)]), ("½", [Fraction(1, 2)]),
        ("2½", [Fraction(5, 2)]), ("1{,}234", [1234]), (r"1\,234", [1234]), (r"1,\!234", [1234]), ("9" * 50_000 + " 1/2", []), ("²" * 50_000, []), ("a/5", [5]),
        # signs, bullets, ranges and hyphens
        ("Answer:\n- 12", [12]), ("Total - 12", [12]), ("10 - 20", [10, 20]), ("10-20", [10, 20]), ("100~200", [100, 200]), ("5%-10%", [Fraction(1, 20), Fraction(1, 10)]),
        ("step-3", [3]), ("COVID-19", [19]), ("x = -5", [-5]), ("x = - 5", [-5]), ("(-5)", [-5]), ("$-5$", [-5]), ("-$5", [-5]), (r"-\$5", [-5]),
        ("气温是-5度", [-5]),
        # percentages and signs of full width
        ("50 percent", [Fraction(1, 2)]), ("50 per cent", [Fraction(1, 2)]), ("50\uff05", [Fraction(1, 2)]), ("5 percentage points", [5]),
        ("\uff0d\uff15", [-5]), ("\uff11\uff0c\uff12\uff13\uff14", [1234]), ("\uff13\uff0e\uff15", [Fraction(7, 2)]), ("3\uff0c120", [3, 120]),
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
        ("number", "30 cm^2", "25 cm^2", 0.0),
        ("number", "25 cm^2", "25", 1.0),
        ("number", "5\u00d710^8", r"3 \times 10^8", 0.0),
        ("number", "12/05/2024", "12/05/2023", 0.0),
        ("number", "50%", "50", 1.0),
        ("number", "50", "50 percent", 1.0),
        ("number", "0.5", "50%", 1.0),
        ("number", "5%", "50%", 0.0),
        ("number", "5000", "50", 0.0),
        ("choice", "The answer is (B).", "B", 1.0),
        ("choice", "答案是B。", "B", 1.0),
        ("choice", "B or C", "B", 0.0),
        ("exact", "'A  cat.'", "a cat", 1.0),
        ("default", "a cat", "a cat", 1.0),
        ("fields", '{"total": "4 EUR", "date": 3}', '{"total": "4  eur", "date": 3}', 1.0),
        ("fields", '{"total": 4, "more": 1}', '{"total": 4, "date": 3}', 1 / 3),
        ("fields", '{"paid": 1}', '{"paid": true}', 0.0),
        ("fields", '{"items": ["red"]}', '{"items": ["Red"]}', 1.0),
        ("fields", '{"a": {"b": 1}}', '{"a": {"b": true}}', 0.0),
        ("fields", '{"a": [1, 2]}', '{"a": [1]}', 0.0),
        ("fields", '["red"]', '["Red"]', 1.0),
        ("fields", 'As {x}: {"a": 1}\n{"a": 2} (see [1])', '{"a": 2}', 1.0),
        ("fields", '{"a": 2} and {"a": 3', '{"a": 2}', 1.0),
        ("fields", "no json", '{"paid": true}', 0.0),
        ("points", '[{"point_2d": [100, 120], "label": "x"}]', '[{"bbox_2d": [90, 90, 110, 130], "label": "x"}]', 1.0),
        ("points", '[{"point_2d": [100, 100]}, {"point_2d": [900, 900]}]', '[{"point_2d": [140, 60]}]', 0.5),
        ("points", '[{"point_2d": [160, 100]}]', '[{"point_2d": [100, 100]}]', 0.0),
        ("points", '[{"point_2d": [130, 100]}, {"point_2d": [60, 100]}]', '[{"point_2d": [100, 100]}, {"point_2d": [140, 100]}]', 1.0),
        ("points", '{"point_2d": [60, 100]}\n{"point_2d": [130, 100]}', '[{"point_2d": [100, 100]}, {"point_2d": [140, 100]}]', 1.0),
        ("points", '{"point_2d": [1, 1]}', '<think>[or {}</think>{"bbox_2d": [0, 0, 2, 2]}', 1.0),
        ("iou", "nothing", '[{"bbox_2d": [0, 0, 1, 1], "label": "x"}]', 0.0),
        ("repetition", "a b c d e f g h", "", 0.0),
        ("repetition", "a b c d a b c d", "", -0.2),
        ("repetition", "no " * 103, "", -0.99),
        ("repetition", "", "", 0.0),
        ("repetition", "好的" * 50, "", -91 / 93),
        ("repetition", "ไป" * 50, "", -91 / 93),
        ("repetition", "图中有三只黑色的猫", "", 0.0),
        ("repetition", "- " * 103, "", -0.99),
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
        # what is written alike in every language
        ("图中有几只猫? A. 一 B. 二", "B", 0.0), ("框出所有的猫", '[{"bbox_2d": [1, 2, 3, 4], "label": "猫"}]', 0.0), ("多远?", "12 km", 0.0),
        ("框出所有的猫", '{"bbox_2d": [1, 2, 3, 4], "label": "black cats"}', 0.0), ("多少?", r"\frac{3}{4} \text{or} \boxed{1}", 0.0),
        ("多少?", "<think>\n三加一\n</think>\n\n4", 0.0), ("写代码", "```python\nprint(answer)\n```", 0.0),
        # the user's last turn decides, and may quote
        ("system: You are a helpful assistant.\nuser: 有几只猫", "三只猫", 0.0), ("system: You are a helpful assistant.\nuser: 有几只猫", "three cats", -1.0),
        ("user: How many cats?\nassistant: three\nuser: 有几只狗", "two small dogs", -1.0),
        ("把 The quick brown fox 译成中文", "敏捷的棕色狐狸", 0.0), ("为什么?", "因为使用了 pandas 的表格功能", 0.0), ("고양이가 몇 마리?", "three cats", -1.0),
    ],
)  # fmt: skip
def test_language(question: str, answer: str, expected: float) -> None:
    assert reward("language", answer, "", question=question) == expected


@pytest.mark.parametrize(
    ("name", "question", "answer"),
    [
        ("choice", "图中有几只猫? A. 一 B. 二", "B"),
        ("iou", "框出所有的猫", '[{"bbox_2d": [1, 2, 30, 40], "label": "猫"}]'),
        ("number", "从家到学校有多远?", "12 km"),
        ("number", "这个分数是多少?", r"\frac{3}{4}"),
    ],
)
def test_a_right_answer_that_is_short_costs_nothing(name: str, question: str, answer: str) -> None:
    thought = f"<think>\n看图。\n</think>\n\n{answer}"
    for text in (answer, thought):
        worth = [reward(each, text, answer, question=question) for each in (name, *PENALTIES)]
        assert worth == [1.0, 0.0, 0.0, 0.0]


def test_scripts() -> None:
    assert letters_by_script("γάτα") == {"GREEK": 4} and not letters_by_script("123")


@given(st.lists(st.lists(st.integers(0, 6), max_size=4), max_size=7))
def test_pairs_are_those_of_the_best_assignment(choices: list[list[int]]) -> None:
    possible = np.array([[column in row for column in range(7)] for row in choices] or [[False]])
    rows, columns = linear_sum_assignment(possible, maximize=True)
    assert most_pairs(choices) == possible[rows, columns].sum()


@pytest.mark.parametrize(
    ("name", "reference", "fault"),
    [
        ("number", "twelve", "its reference has no number"), ("number", "五", "its reference has no number"), ("number", "12 cm", ""),
        ("number", "12/05/2023", "its reference has no number"), ("choice", "A, C", "its reference chooses no letter"),
        ("choice", "K", "its reference chooses no letter"), ("choice", "答案是B", ""), ("iou", "a cat", "its reference has no box"),
        ("iou", '{"bbox_2d": [0, 0, 1, 1]}', ""), ("points", '{"bbox_2d": [0, 0, 1, 1]}', ""), ("points", '{"point_2d": [0, 0]}', ""),
        ("points", "[0, 0]", "its reference has no point or box"), ("fields", "{}", ""), ("fields", "{a}", "its reference has no JSON"),
        ("fields", '{"a": NaN}', "its reference has no JSON"), ("number", "<think>7</think>", "its reference has no number"),
        ("exact", "", ""), ("default", "", ""), ("right", "", ""), ("of_a_user", "", ""),
    ],
)  # fmt: skip
def test_references_that_nothing_can_meet(name: str, reference: str, fault: str) -> None:
    assert unusable_reference(name, reference) == fault


@given(st.sampled_from(["number", "choice", "iou", "points", "fields"]), st.text(max_size=20))
def test_an_answer_meets_every_usable_reference(name: str, reference: str) -> None:
    usable = not unusable_reference(name, reference)
    assert (reward(name, reference, reference) == 1.0) == usable


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
        penalty = name in PENALTIES
        assert (-1.0 if penalty else 0.0) <= reward(name, text, reference) <= (not penalty), name
