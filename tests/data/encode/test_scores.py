"""Scores of answers: overlaps computed by hand, boxes in every order and form, and texts that are no boxes."""

import pytest

from visionloom.data.config import SCORES
from visionloom.data.encode import scores
from visionloom.data.encode.scores import boxes_match, boxes_of, chosen_letter, iou, is_right

SEVEN = '{"bbox_2d": [0, 0, 500, 500], "label": "7"}'
THREE = '{"bbox_2d": [500, 500, 1000, 1000], "label": "3"}'


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),
        ((0, 0, 3, 1), (1, 0, 4, 1), 0.5),
        ((0, 0, 4, 4), (1, 1, 3, 3), 0.25),
        ((0, 0, 1, 1), (1, 0, 2, 1), 0.0),
        ((0, 0, 1, 1), (5, 5, 6, 6), 0.0),
        ((2, 2, 0, 0), (0, 0, 2, 2), 0.0),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
    ],
)
def test_iou(
    one: tuple[float, float, float, float],
    other: tuple[float, float, float, float],
    overlap: float,
) -> None:
    assert iou(one, other) == pytest.approx(overlap)
    assert iou(other, one) == pytest.approx(overlap)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (SEVEN, True),
        (f"[{SEVEN}]", True),
        (f"7 top left\n{SEVEN}", True),
        (f"```json\n[{SEVEN}]\n```", True),
        (f"7 top left\n{THREE}", False),
        ("7 top left", False),
        ('{"label": "7", "bbox_2d": [0, 0, 500.0, 260]}', True),
        ('{"bbox_2d": [0, 0, 500, 240], "label": "7"}', False),
        (SEVEN.replace("7", "3"), False),
        (f"[{SEVEN}, {SEVEN}]", False),
        (f"{SEVEN}{SEVEN}", False),
        (f"{SEVEN}\n{SEVEN}", False),
        (SEVEN[:-1], False),
        (f"[{SEVEN}", False),
        (f"Boxes as [x1, y1, x2, y2]:\n```json\n[{SEVEN}]\n```", True),
        (f"{SEVEN} (see [1])", True),
        (f"First {THREE}, no: {SEVEN}.", True),
        (f"First {SEVEN}, no: {THREE}.", False),
        (f"[{SEVEN}] in " + "[" * 10_000, True),
        ("[1, " * 10_000, False),
        ('{"label": [' * 10_000, False),
        ('{"bbox_2d": [0, 0, 500], "label": "7"}', False),
        ('{"bbox_2d": [0, 0, 500, "500"], "label": "7"}', False),
        ('{"bbox_2d": [0, 0, NaN, 500], "label": "7"}', False),
        ("[" * 10_000, False),
        ("", False),
        (f"<think>\n{THREE}\n</think>\n\n{SEVEN}", True),
    ],
)
def test_a_box_is_right_from_half_an_overlap(answer: str, right: bool) -> None:
    assert is_right(answer, SEVEN) == right


def test_every_box_needs_one_of_its_own() -> None:
    reference = boxes_of(f"[{SEVEN}, {THREE}]")
    assert boxes_match(boxes_of(f"[{THREE}, {SEVEN}]"), reference)
    assert boxes_match(boxes_of(f"They are\n{THREE}\n{SEVEN}"), reference)
    assert not boxes_match(boxes_of(SEVEN), reference)
    assert not boxes_match(boxes_of(f"[{SEVEN}, {SEVEN}]"), reference)
    # two of one label: each takes the one that overlaps it most
    twins = boxes_of(f"[{SEVEN}, {THREE.replace('3', '7', 1)}]")
    assert not boxes_match(twins[:1] * 2, twins)
    assert boxes_match(twins[::-1], twins)


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("7", "7", True),
        ("<think>\n3 + 4 = 8.\n</think>\n\n7", "<think>\n3 + 4 = 7.\n</think>\n\n7", True),
        ("8", "<think>\n3 + 4 = 7.\n</think>\n\n7", False),
        ("<think>\n7", "7", False),
        (SEVEN, "7", False),
        ("Page 3:7", "Page 3:7", True),
    ],
)
def test_other_answers_are_compared_word_for_word(answer: str, reference: str, right: bool) -> None:
    assert is_right(answer, reference) == right


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        # forms that VLMEvalKit's can_infer_option and lmms-eval's parse_multi_choice_response read
        ("B", "B"),
        ("(B)", "B"),
        ("b", "B"),
        ("B.", "B"),
        ("B. a cat", "B"),
        ("The answer is B.", "B"),
        ("the correct option is (C)", "C"),
        ("**Answer: C**", "C"),
        ("Because of its colour, D", "D"),
        ("It is A", "A"),
        (r"A and B are smaller, so \boxed{C}.", "C"),
        (r"$\boxed{\text{(D)}}$", "D"),
        # Chinese and Japanese have no spaces around it, and wide signs
        ("答案是B", "B"),
        ("答案是B。", "B"),
        ("答案\uff1aB", "B"),
        ("【答案】B", "B"),
        ("选B", "B"),
        ("B选项", "B"),
        ("选项A不对\uff0c故选B。", "B"),
        ("我选A", "A"),
        ("答えはBです", "B"),
        ("\uff08\uff22\uff09", "B"),
        ("【C】", "C"),
        ("A和B都对", None),
        # letters of other words, and no choice
        ("Élan, Bébé, Häuser", None),
        ("I\u2019m not sure", None),
        ("A cat sits on a mat", None),
        ("I do not know", None),
        ("Answer is a dog", None),
        ("Dogs", None),
        ("(A) or (B)", None),
        ("Both B and C", None),
        ("Both A and B", None),
        ("A, C", None),
        ("", None),
        ("I think A cat is on it, so the answer is (C).", "C"),
        ("The answer is A. No, the answer is B.", "B"),
    ],
)
def test_letter_of_a_choice(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer) == letter
    assert is_right(f"<think>\nIs it A?\n</think>\n\n{answer}", "C", "choice") == (letter == "C")


@pytest.mark.parametrize(
    ("answer", "reference", "score", "right"),
    [
        ('"A  Cat".', "a cat", "exact", True),
        ("a cat.", "A cat", "exact", True),
        ("the cat", "a cat", "exact", False),
        ("三只猫。", "三只猫", "exact", True),
        ("“三只猫。”", "三只猫", "exact", True),
        ("「三只猫」。", "三只猫", "exact", True),
        ("3.5", "3.5", "exact", True),
        ("3.", "3.5", "exact", False),
        ("7", "7", "iou", False),
        (SEVEN, SEVEN, "iou", True),
    ],
)
def test_named_scores(answer: str, reference: str, score: str, right: bool) -> None:
    assert is_right(answer, reference, score) == right
    assert set(scores.SCORES) == set(SCORES)
