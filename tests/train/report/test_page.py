"""report.html and predictions.jsonl, from runs that are whole, cut off, or hardly there."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from visionloom.data.encode.encode import EncodedSample
from visionloom.data.encode.patches import put, widen
from visionloom.train.generation.predictions import PICTURE, Prediction, question_text
from visionloom.train.reinforcement.groups import Group, WrittenAnswer
from visionloom.train.reinforcement.store import RolloutStore
from visionloom.train.report.charts import Chart, compact, draw, measured
from visionloom.train.report.gallery import QUESTION_CHARACTERS, ShownPicture, shorten
from visionloom.train.report.history import History, curve, smooth, thin
from visionloom.train.report.page import write_report

EVIL = '<script>alert("x")</script>&'
VOID = {"meta", "img", "br"}


def line(step: int, phase: str, **fields: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    loss = 6.0 / step
    return {
        "step": step, "phase": phase, "loss": loss, "loss_by_source": {"captions": loss, EVIL: 2 * loss}, "grad_norm": 1.0,
        "lr": {"merger": 1e-4}, "tokens": 1000, "padding_fraction": 0.01, "step_seconds": 0.5, "data_wait_seconds": 0.01,
        "tokens_per_second": 2000.0, "mfu": None, "memory_gib": 1.0, "skipped": False, **fields,
    }  # fmt: skip


def write_run(folder: Path, steps: int = 20) -> None:
    """A run of two phases with everything a run's folder holds."""
    folder.mkdir(exist_ok=True)
    lines = [line(step, "align" if step <= steps // 2 else "rest") for step in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    events = [
        {
            "time": 1.7e9,
            "event": "validation",
            "phase": "align",
            "step": 0,
            "loss": {"captions": 6.25},
        },
        {
            "time": 1.7e9,
            "event": "validation",
            "phase": "align",
            "step": steps // 2,
            "loss": {"captions": 1.125},
            "tasks": {EVIL: {"accuracy": 0.25, "n": 4}, "needle": {"accuracy": 0.8125, "n": 16}},
        },
        {
            "time": 1.7e9,
            "event": "validation",
            "phase": "rest",
            "step": steps,
            "tasks": {EVIL: {"accuracy": 0.75, "n": 4}, "needle": {"accuracy": 0.0625, "n": 16}},
        },
        {"time": 1.7e9, "event": "resume", "step": 3},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    (folder / "eval.json").write_text(
        json.dumps(
            {"step": steps, "loss": {"captions": 0.5}, "tasks": {EVIL: {"accuracy": 0.75, "n": 4}}}
        )
    )
    (folder / "config.yaml").write_text(
        yaml.safe_dump({"run": {"name": EVIL}, "phases": {"align": {"sequence_length": 4096}}})
    )


def patches_of(frames: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Rows of an image (one frame) or of a temporal patch (two), from uint8 [frames, height, width, 3]."""
    count, height, width, _ = frames.shape
    rows = np.empty((height * width // 256, 768 * count), np.uint8)
    for number, frame in enumerate(frames):
        put(rows, np.ascontiguousarray(frame.transpose(2, 0, 1)), number if count > 1 else None)
    return rows


def predicted(question: str, pictures: int, text: str = "7", side: int = 64) -> Prediction:
    """An answer to a question about noise."""
    frames = np.random.default_rng(0).integers(0, 256, (pictures, side, side, 3), np.uint8)
    rows = [patches_of(frame[None]) for frame in frames]
    empty = np.empty(0)
    sample = EncodedSample(
        sample_id=EVIL, dataset="vqa", task=EVIL, input_ids=empty, target_weights=empty, position_ids=empty, visual_positions=empty,
        grids=np.array([[1, side // 16, side // 16]] * pictures, np.int32).reshape(-1, 3), media=(), answer="7", prompt_length=0,
        patches=np.concatenate([np.empty((0, 768), np.uint8), *rows]),
    )  # fmt: skip
    return Prediction(sample, text, question)


class Checker(HTMLParser):
    """Follows the nesting of elements and notes what would load something."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("src", "href", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check(path: Path) -> str:
    """The report's text, once it is known to be well nested, to load nothing and to be small."""
    text = path.read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(text)
    assert checker.open == []
    assert all(link.startswith(("data:image/", "#")) for link in checker.links)
    assert (
        "script" not in checker.tags
        and "@import" not in text
        and not re.search(r"url\((?!#)", text)
    )
    assert len(text) < 2_000_000
    return text


def test_whole_run(tmp_path: Path) -> None:
    write_run(tmp_path)
    shown = [predicted(f"{PICTURE}{EVIL}", 1), predicted("none", 0, EVIL)]
    text = check(write_report(tmp_path, shown))
    assert (
        "6.250 → 1.125" in text
        and "75.0%" in text
        and "4,096" in text
        and "Resumed after step 3" in text
    )
    assert text.count("✓ right") == 1 and text.count("✗ wrong") == 1 and text.count("<img") == 1
    assert (
        text.count("<svg") == 1 + 2 + 6
    )  # loss, two datasets, and all of speed but the utilisation that is null
    assert text.count("&lt;script&gt;") >= 6
    found = [json.loads(each) for each in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert found[0] == {
        "id": EVIL, "source": "vqa", "task": EVIL, "question": f"[picture]{EVIL}", "answer": "7", "prediction": "7", "correct": True,
    }  # fmt: skip
    assert not found[1]["correct"]


def test_accuracies_before_and_after_a_phase(tmp_path: Path) -> None:
    write_run(tmp_path)
    text = check(write_report(tmp_path, []))
    assert "<th>task</th><th>align</th><th>rest</th>" in text
    assert '<td>25%</td><td><span class="fell">75%</span></td>' in text
    assert '<td>needle</td><td>81%</td><td><span class="rose">6%</span></td>' in text


def test_same_run_gives_the_same_file(tmp_path: Path) -> None:
    write_run(tmp_path)
    shown = [predicted(PICTURE, 1)]
    assert write_report(tmp_path, shown).read_bytes() == write_report(tmp_path, shown).read_bytes()


@pytest.mark.parametrize(
    "kept", [(), ("metrics.jsonl",), ("eval.json",), ("events.jsonl", "config.yaml")], ids=str
)
def test_missing_files_leave_a_shorter_report(tmp_path: Path, kept: tuple[str, ...]) -> None:
    write_run(tmp_path)
    for name in {"metrics.jsonl", "events.jsonl", "eval.json", "config.yaml"} - set(kept):
        (tmp_path / name).unlink()
    text = check(write_report(tmp_path, []))
    assert ("Training loss" in text) == ("metrics.jsonl" in kept) and ("75.0%" in text) == (
        "eval.json" in kept
    )


def test_damaged_files_and_values_are_passed_over(tmp_path: Path) -> None:
    lines = [line(1, "align"), line(2, "align", loss=float("nan"), grad_norm=None, skipped=True)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in lines) + '{"step": 3, "lo'
    )
    (tmp_path / "eval.json").write_text("{")
    text = check(write_report(tmp_path, []))
    assert "1 steps were skipped" in text and "nan" not in text.lower()


def test_long_run_stays_small(tmp_path: Path) -> None:
    write_run(tmp_path, steps=6000)
    path = write_report(tmp_path, [predicted(PICTURE * 40, 40, side=256) for _ in range(12)])
    assert check(path).count('class="empty"') > 12 * 28


@pytest.mark.filterwarnings("error")
def test_a_point_far_above_the_axis_does_not_squeeze_the_chart(tmp_path: Path) -> None:
    write_run(tmp_path)
    steady = [
        line(step, "align", loss=0.5, loss_by_source={"captions": 0.5}) for step in range(1, 60)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in steady))
    event = {
        "time": 1.7e9,
        "event": "validation",
        "phase": "align",
        "step": 0,
        "loss": {"captions": 9.0},
    }
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    check(write_report(tmp_path, []))


def test_pictures_come_back_from_patches() -> None:
    frames = np.random.default_rng(1).integers(0, 256, (2, 64, 96, 3), np.uint8)
    rows = patches_of(frames[:1])
    assert np.array_equal(ShownPicture(rows, 4, 6).frames(), frames[:1])
    assert np.array_equal(ShownPicture(widen(rows, 1536), 4, 6).frames(), frames[:1])
    assert np.array_equal(ShownPicture(patches_of(frames), 4, 6).frames(), frames)


START, END = "<|vision_start|>", "<|vision_end|>"


class Words:
    """A tokenizer whose ids index a list of words."""

    words = ("<|im_start|>", "<|im_end|>", START, END, "<|image_pad|>", "<|video_pad|>")
    words += ("user", "assistant", "\n", "Look: ", f"which?{PICTURE}", "<0.5 seconds>")

    def special(self, token: str) -> int:
        return self.words.index(token)

    def decode(self, ids: list[int]) -> str:
        return "".join(self.words[i] for i in ids if not self.words[i].startswith("<|"))


def test_question_text_has_one_mark_for_each_picture() -> None:
    image, video = ([START, pad, pad, END] for pad in ("<|image_pad|>", "<|video_pad|>"))
    prompt = [
        "<|im_start|>",
        "user",
        "\n",
        "Look: ",
        *image,
        *image,
        "<0.5 seconds>",
        *video,
        f"which?{PICTURE}",
    ]
    prompt += ["<|im_end|>", "\n", "<|im_start|>", "assistant", "\n"]
    ids = np.array([Words.words.index(word) for word in prompt])
    sample = replace(predicted("", 0).sample, input_ids=ids, prompt_length=len(ids))
    assert question_text(sample, Words()) == f"Look: {PICTURE}{PICTURE}<0.5 seconds>{PICTURE}which?"


def test_long_questions_keep_their_pictures_in_place(tmp_path: Path) -> None:
    """The picture after the cut must be the last one of the sample, not the second."""
    question = (
        f"{PICTURE}{'a' * QUESTION_CHARACTERS}{PICTURE}{'b' * QUESTION_CHARACTERS}{PICTURE}end"
    )
    prediction = predicted(question, 3)
    text = check(write_report(tmp_path, [prediction]))
    images = re.findall(r'src="(data:[^"]*)"', text)
    alone = [
        re.findall(
            r'src="(data:[^"]*)"',
            check(write_report(tmp_path, [predicted(PICTURE * (n + 1), n + 1)])),
        )[n]
        for n in (0, 2)
    ]
    assert images == alone
    assert "1 pictures left out" in text and len(shorten("x" * 5000, 100)) < 200


def test_curves_break_between_phases_and_are_thinned(tmp_path: Path) -> None:
    write_run(tmp_path, steps=5000)
    phases = History.read(tmp_path).phases
    steps, losses = curve(phases, lambda each: each["loss"], 100)
    assert len(steps) <= 102 and list(np.flatnonzero(np.isnan(losses))) == [50, 101]
    x, y = thin(np.arange(10.0), np.arange(10.0) ** 2, 5)
    assert x.tolist() == [0.5, 2.5, 4.5, 6.5, 8.5] and y[0] == 0.5
    assert np.allclose(smooth(np.full(9, 3.0), 4), 3.0) and np.allclose(
        smooth(np.arange(5.0), 1), np.arange(5.0)
    )


def test_charts_take_their_colours_from_the_page(tmp_path: Path) -> None:
    write_run(tmp_path)
    phases = History.read(tmp_path).phases
    svg = draw(Chart("loss", measured(phases, lambda each: each["loss"], 100), phases, named=True))
    assert (
        set(re.findall(r"#0000[0-9a-f]{2}\b", svg)) == set()
        and "var(--one)" in svg
        and ">align</text>" in svg
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.25e6, "1.25M"), (2.5e-4, "2.5e-4"), (1500, "1.5k"), (0.5, "0.5")],
)
def test_compact_numbers(value: float, text: str) -> None:
    assert compact(value) == text


class Tags(HTMLParser):
    """The names of all elements and attributes of a page, as Python's parser of HTML reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.attributes = set[str](), set[str]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.mark.filterwarnings("ignore:Glyph")
def test_names_give_no_orders_to_a_browser_or_to_matplotlib(tmp_path: Path) -> None:
    """Markup, formulas (`$` and `\\` of mathtext, of which these are no whole ones), control characters and halves of pairs."""
    write_run(tmp_path)
    name = "$\\frac{a$ <script>alert(1)</script>\"onload=x \\ \x1b[2J\x00\ud800 ' javascript:x"
    lines = [line(step, name, loss_by_source={name: 0.5}) for step in range(1, 9)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    (tmp_path / "eval.json").write_text(
        json.dumps({"step": name, "loss": {name: 1.0}, "tasks": {name: {"accuracy": 0.5, "n": 2}}})
    )
    (tmp_path / "config.yaml").write_text(json.dumps({"run": {"name": "<b>"}, "phases": {"x": 3}}))
    path = write_report(tmp_path, [])
    text = path.read_text()
    assert "<script" not in text and "<b>" not in text and "\x1b" not in text
    tags = Tags()
    tags.feed(text)
    assert "script" not in tags.names and not any(name.startswith("on") for name in tags.attributes)
    assert r"$\frac{a$" in text.split("<svg")[1].split("</svg>")[0], (
        "the phase's name is drawn as it is"
    )
    assert (
        "Content-Security-Policy\" content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        in text
    )
    assert "<script" not in (page := write_report(tmp_path, []).read_text()) and page == text


BAD_LINES: list[dict[str, Any]] = [
    {"step": "1"}, {"step": -1}, {"step": 1e400}, {"step": 10**400}, {"loss": "x"}, {"loss": 1e308}, {"lr": 3}, {"lr": {"vision": []}},
    {"loss_by_source": [1]}, {"phase": {"a": 1}}, {"tokens": [], "step_seconds": {}}, {"grad_norm": True, "skipped": "x"},
]  # fmt: skip


def test_lines_of_another_form_are_passed_over(tmp_path: Path) -> None:
    write_run(tmp_path)
    lines = [json.dumps(line(1, "align") | bad) for bad in ({}, *BAD_LINES)]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join([*lines, "[]", "[" * 100_000]).replace("Infinity", "1e400")
    )
    events = [
        {"event": "validation", "phase": "align", "step": "1", "loss": {}},
        {"event": "validation", "phase": "align"},
        {
            "event": "validation",
            "phase": "align",
            "step": 1,
            "tasks": {"t": 3, "u": {"accuracy": []}},
        },
    ]
    events += [{"event": "dropped", "samples": "x"}, {"event": "resume", "time": 1e300}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(each) + "\n" for each in events))
    (tmp_path / "eval.json").write_text(
        '{"step": [], "loss": {"a": "b"}, "tasks": {"t": 3, "u": {"accuracy": "x", "n": "y"}}}'
    )
    (tmp_path / "config.yaml").write_text(
        "run: 3\nphases: {align: {trainable: 5, sequence_length: x}}\nmodel: [1]"
    )
    check(write_report(tmp_path, []))


def test_rollouts_are_shown_escaped(tmp_path: Path) -> None:
    write_run(tmp_path)
    facts = {"reward": 0.5, "pass_rate": 0.25, "prompts": 8, "groups": 2, "answer_tokens": EVIL}
    lines = [line(step, "rl", rollout=facts, entropy=0.5) for step in range(21, 30)]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(each) + "\n" for each in lines))
    answers = [
        WrittenAnswer([1], [-1.0], [-1.0], True, f"{EVIL}{place}", {EVIL: 1.0}, {}, place)
        for place in range(9)
    ]
    group = Group(0, 0, "sums", "0", EVIL, (0, 0, 0), 9, 0, 0, EVIL, EVIL, answers, "")
    store = RolloutStore(tmp_path, "rl", {})
    store.add(0, 0, [])
    store.put_aside(0)
    store.add(0, 0, [group])
    # Another round of the same rollout.
    store.add(0, 0, [])
    page = write_report(tmp_path, []).read_text()
    assert "Share of groups that teach nothing" in page and "Tokens of an answer" not in page
    assert "&lt;script&gt;" in page and "<script>" not in page
    # The two best and the two worst.
    assert re.findall(r"&amp;(\d)</td>", page) == ["8", "7", "1", "0"]

    (store.folder / "00000000" / "00000.tar").write_bytes(b"cut off")
    assert "Answers of the last rollout" not in write_report(tmp_path, []).read_text()
