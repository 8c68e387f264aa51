"""Filters of questions and answers. References: shares counted by hand; the source dataset, sample by sample."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from visionloom.data.filter.measures import language_mismatch, repetition
from visionloom.data.filter.rules import FilterRules
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Image, Message, Sample, Text, Think
from visionloom.data.shards.write import write_shards
from visionloom.launch.data import main
from visionloom.tests.data.samples import png


def chat(name: str, question: str, answer: str, thoughts: str = "", **meta: Any) -> Sample:
    content = (Think(thoughts), Text(answer)) if thoughts else (Text(answer),)
    messages = (Message("user", (Text(question),)), Message("assistant", content))
    return Sample(name, "chat", messages, meta=meta)


LOOP = "and so we look at the picture again "
SAMPLES = [
    chat("good", "How many apples are there?", "There are three apples."),
    chat("short", "How many?", "3"),
    chat("loop", "What do you see?", "A dog.", LOOP * 12),
    chat("mixed", "What is written on the sign?", "The sign says 禁止停车 which nobody may do"),
    chat("refusal", "What is in the picture?", "I'm sorry, but I cannot see pictures."),
]
PICTURE = Sample(
    "picture",
    "chat",
    (
        Message("user", (Image("a.png", 40, 30), Text("What colour is it here?"))),
        Message("assistant", (Text("It is a shade of grey."),)),
    ),
)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    media = {"a.png": png(30, 40, 1)}
    write_shards(tmp_path / "source", "source", [*((s, {}) for s in SAMPLES), (PICTURE, media)])
    return tmp_path / "source"


def names(folder: Path) -> list[str]:
    dataset = Dataset.open(folder, "x")
    return [dataset.sample(index).id for index in range(len(dataset))]


def filtered(source: Path, words: Sequence[str], capsys: Any) -> tuple[list[str], str]:
    target = source.parent / "target"
    assert main(["filter", str(source), str(target), *words]) == 0
    return names(target), capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "gone", "reason"),
    [
        (["--min-answer", "5"], "short", "answer below 5"),
        (["--min-question", "10"], "short", "question below 10"),
        (["--max-repetition", "0.5"], "loop", "repetition above 0.5"),
        (["--max-thoughts", "100"], "loop", "thoughts above 100"),
        (["--max-mismatch", "0.1"], "mixed", "language mismatch above 0.1"),
        (["--answers-unlike", "(?i)i'm sorry"], "refusal", "answer has the pattern"),
    ],
)
def test_each_rule_leaves_out_what_it_is_for(
    words: list[str], gone: str, reason: str, source: Path, capsys: Any
) -> None:
    kept, output = filtered(source, words, capsys)
    assert kept == [name for name in names(source) if name != gone]
    assert "5 of 6 samples kept" in output and f"1 left out: {reason}" in output
    (row,) = (source.parent / "target" / "left_out.jsonl").read_text().splitlines()
    left_out = json.loads(row)
    assert left_out["reason"] == reason
    keys = Dataset.open(source, "x").keys
    assert names(source)[keys.index(left_out["key"])] == gone


def test_what_is_kept_is_kept_whole(source: Path, capsys: Any) -> None:
    kept, _ = filtered(source, ["--answers-like", "grey|three"], capsys)
    assert kept == ["good", "picture"]
    before, after = Dataset.open(source, "x"), Dataset.open(source.parent / "target", "x")
    assert (after.sample(0), after.sample(1)) == (before.sample(0), before.sample(5))
    assert after.member(1, "a.png") == before.member(5, "a.png")


def test_pass_rates_come_from_stored_answers(source: Path, capsys: Any) -> None:
    """Four answers each: always right, half right, never right; the fourth question has none."""
    rollouts = []
    for name, rights in (("good", 4), ("short", 2), ("loop", 0)):
        for number in range(4):
            answer = " 42 " if number < rights else "43"
            facts = {"source_id": name, "reference": "<think>\nhm\n</think>\n\n42"}
            sample = chat(f"{name}-{number}", "?", answer, "a thought", generation=facts)
            rollouts.append((sample, {}))
    write_shards(source.parent / "rollouts", "rollouts", rollouts)
    words = ["--rollouts", str(source.parent / "rollouts")]
    words += ["--min-pass-rate", "0.1", "--max-pass-rate", "0.9"]
    kept, output = filtered(source, words, capsys)
    assert kept == ["short"]
    for line in (
        "1 left out: pass rate above 0.9",
        "1 left out: pass rate below 0.1",
        "3 left out: no answers",
    ):
        assert line in output


def test_repetition_is_the_share_of_runs_that_come_again() -> None:
    words = " ".join(f"w{number}" for number in range(20))
    assert repetition(words) == 0
    # 33 runs of 8 in 40 words, of which 20 are different: each rotation of the twenty words.
    assert repetition(f"{words} {words}") == pytest.approx(1 - 20 / 33)
    assert repetition("no") == repetition("") == 0
    # Without spaces a character is a word: 13 runs of 8 in 20, of which 4 are different.
    assert repetition("图中有猫" * 5) == pytest.approx(1 - 4 / 13)


@pytest.mark.parametrize(
    ("question", "answer", "share"),
    [
        ("What is it?", "It is a cat 12!", 0.0),
        ("这是什么?", "一只猫。", 0.0),
        ("これは何ですか", "猫です", 0.0),
        ("What is it?", "猫猫 it", 0.5),
        ("What is it?", "это", 1.0),
        ("1 + 1", "zwei", 0.0),
    ],
)
def test_letters_of_other_scripts_are_counted(question: str, answer: str, share: float) -> None:
    assert language_mismatch(question, answer) == share


def test_documents_have_no_question() -> None:
    document = Sample("d", "doc", content=(Text("x" * 50),))
    assert FilterRules(min_answer=5, answers_like=re.compile("y")).reason(document, None) == ""
    assert FilterRules(min_pass_rate=0.5).reason(document, None) == "no answers of a model"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no rule is given"),
        (["--max-repetition", "2"], "--max-repetition 2: a share of 0 to 1 expected"),
        (["--min-answer", "-1"], "--min-answer -1: at least 0 expected"),
        (["--answers-like", "("], "--answers-like (: no regular expression"),
        (["--min-pass-rate", "0.5"], "need --rollouts DIR"),
        (["--min-answer", "1000"], "no sample passes: answer below 1000 6"),
        (["--rollouts", "{source}", "--min-pass-rate", "0"], "has no reference answer"),
    ],
)
def test_a_wrong_word_is_one_line(
    words: list[str], message: str, source: Path, capsys: Any
) -> None:
    given = [word.format(source=source) for word in words]
    with pytest.raises(SystemExit) as stopped:
        main(["filter", str(source), str(source.parent / "target"), *given])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line
