"""The demo's data: the same bytes for the same seed, no handwriting in two splits, and every answer true."""

import hashlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as PillowImage

from visionloom.common.errors import UserError
from visionloom.data.config import MediaConfig
from visionloom.data.demo.make import make_demo
from visionloom.data.demo.tasks import RECIPES
from visionloom.data.demo.tokenizer import PLAIN_TOKENS, QWEN_PATTERN, SPECIAL_TOKENS, VOCABULARY
from visionloom.data.encode.chat import render
from visionloom.data.encode.tokenizer import Tokenizer
from visionloom.data.shards.dataset import Dataset
from visionloom.data.shards.sample import Box, Image, Message, Sample, Text, Think, Time, Video

load_digits = pytest.importorskip("sklearn.datasets").load_digits
SCALE = 0.02


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    assert make_demo(folder, scale=SCALE)
    return folder


@pytest.fixture(scope="module")
def digits() -> list[int]:
    return [int(digit) for digit in load_digits().target]


def read(demo: Path, name: str, split: str = "train") -> Iterator[Sample]:
    dataset = Dataset.open(demo / split / name, name)
    return (dataset.sample(index) for index in range(len(dataset)))


def sha256_of(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def said(sample: Sample, role: str) -> list[str]:
    """Text of every turn of a role, without what is thought."""
    turns = [message for message in sample.messages if message.role == role]
    return ["".join(part.text for part in turn.content if isinstance(part, Text)) for turn in turns]


def shown(turn: Message) -> list[str]:
    """A turn's texts and moments as they are rendered."""
    return [
        part.text if isinstance(part, Text) else f"<{part.seconds:.1f} seconds>"
        for part in turn.content
        if isinstance(part, Text | Time)
    ]


def test_the_seed_decides_every_byte(tmp_path: Path) -> None:
    """Once more in another process, since the order of sets and of Rust's hash maps changes with the process."""
    make_demo(tmp_path / "here", scale=0.001)
    script = f"from visionloom.data.demo.make import make_demo; make_demo({str(tmp_path / 'there')!r}, scale=0.001)"
    subprocess.run([sys.executable, "-c", script], check=True)
    here = sha256_of(tmp_path / "here")
    assert sha256_of(tmp_path / "there") == here
    make_demo(tmp_path / "other", seed=1, scale=0.001)
    other = sha256_of(tmp_path / "other")
    assert other.keys() == here.keys()
    assert not [name for name in other if name.endswith(".tar") and other[name] == here[name]]


def test_no_handwriting_in_two_splits(demo: Path) -> None:
    used = {
        split: {
            picture
            for name in RECIPES
            for sample in read(demo, name, split)
            for picture in sample.meta.get("pictures", [])
        }
        for split in ("train", "tuning", "test")
    }
    assert len(used["train"]) > 500
    assert len(used["tuning"]) > 100 and len(used["test"]) > 100
    assert len(set().union(*used.values())) == sum(map(len, used.values()))


def test_pictures_are_the_ones_in_meta(demo: Path) -> None:
    """Reference: scikit-learn's 8 x 8 pictures, found again as the means of the 4 x 4 blocks of each cell."""
    images = load_digits().images
    for name in ("vqa", "captions"):
        dataset = Dataset.open(demo / "test" / name, name)
        for index in range(len(dataset)):
            sample = dataset.sample(index)
            image = sample.images[0]
            pixels = np.asarray(
                PillowImage.open(io.BytesIO(dataset.member(index, image.ref))), float
            )
            assert pixels.shape == (image.height, image.width)
            pictures = sample.meta["pictures"]
            cells = sample.meta.get("cells", range(len(pictures)))
            for position, picture in zip(cells, pictures, strict=True):
                row, column = divmod(position, sample.meta["columns"])
                cell = pixels[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
                small = cell.reshape(8, 4, 8, 4).mean((1, 3))
                distances = np.abs(images * 255 / 16 - small).mean((1, 2))
                assert int(distances.argmin()) == picture


def test_captions_name_every_row_or_the_place_of_each_digit(demo: Path, digits: list[int]) -> None:
    placed = 0
    for sample in read(demo, "captions"):
        values = [digits[picture] for picture in sample.meta["pictures"]]
        columns = sample.meta["columns"]
        text = "".join(part.text for part in sample.content if isinstance(part, Text))
        if "cells" not in sample.meta:
            rows = np.array(values).reshape(-1, columns)
            lines = " / ".join(" ".join(map(str, row)) for row in rows)
            assert text == f"\nThe image shows: {lines}"
            continue
        placed += 1
        said = re.findall(r"\n(\d) ([a-z ]+)", text)
        assert [int(digit) for digit, _ in said] == values
        for (_, place), cell in zip(said, sample.meta["cells"], strict=True):
            row, column = divmod(cell, columns)
            middle = columns // 2 if columns == 3 else None
            words = set(place.split())
            assert ("top" in words, "bottom" in words) == (row == 0, row == columns - 1)
            assert ("left" in words, "right" in words) == (column == 0, column == columns - 1)
            assert ("middle" in words) == (row == column == middle)
    assert placed > 20


def test_position_answers(demo: Path, digits: list[int]) -> None:
    tasks = set()
    for split in ("train", "test"):
        for sample in read(demo, "vqa", split):
            tasks.add(sample.task)
            columns, rows = sample.images[0].width // 32, sample.images[0].height // 32
            questions, answers = said(sample, "user"), said(sample, "assistant")
            wanted = 2 if split == "train" and columns > 1 else 1
            assert len(set(questions)) == len(answers) == wanted
            for question, answer in zip(questions, answers, strict=True):
                row = (rows - 1) * ("bottom" in question)
                column = (columns - 1) * ("right" in question)
                assert int(answer) == digits[sample.meta["pictures"][row * columns + column]]
            assert (sample.task == "read") == (columns == 1)
    assert tasks == {"read", "position"}


def test_grounding_boxes_hold_the_digit_and_no_other(demo: Path, digits: list[int]) -> None:
    dataset = Dataset.open(demo / "train" / "grounding", "grounding")
    images = load_digits().images
    for index in range(len(dataset)):
        sample = dataset.sample(index)
        boxes = [element for element in sample.elements if isinstance(element, Box)]
        assert said(sample, "user") == [f"Where is the {box.label}?" for box in boxes]
        assert len({box.label for box in boxes}) == len(sample.meta["pictures"])
        for box, words in zip(boxes, said(sample, "assistant"), strict=True):
            # The place in words comes before the box, and agrees with it.
            width = 32 * sample.meta["columns"]
            assert words.startswith(f"{box.label} ") and words.endswith("\n")
            assert ("left" in words) == (box.xyxy[0] == 0) and ("top" in words) == (
                box.xyxy[1] == 0
            )
            assert ("right" in words) == (box.xyxy[2] == width)
        pixels = np.asarray(PillowImage.open(io.BytesIO(dataset.member(index, "img0.png"))), float)
        for box in boxes:
            assert (
                sum(str(digits[picture]) == box.label for picture in sample.meta["pictures"]) == 1
            )
            x1, y1, x2, y2 = map(int, box.xyxy)
            # A training picture may be moved by two pixels in one direction: each is taken back in turn.
            moves = [(0, 0), (2, 0), (-2, 0), (0, 2), (0, -2)]
            cells = [np.roll(pixels[y1:y2, x1:x2], move, (0, 1)) for move in moves]
            small = np.stack([cell.reshape(8, 4, 8, 4).mean((1, 3)) for cell in cells])
            distances = np.abs(images[:, None] * 255 / 16 - small).mean((2, 3)).min(1)
            assert str(digits[int(distances.argmin())]) == box.label


def test_interleaved_text_and_sum(demo: Path, digits: list[int]) -> None:
    for sample in read(demo, "interleaved"):
        shown = [digits[picture] for picture in sample.meta["pictures"]]
        text = "".join(part.text if isinstance(part, Text) else "#" for part in sample.content)
        assert [int(digit) for digit in re.findall(r"#, a (\d)\.", text)] == shown
        assert text.endswith(f" The sum is {sum(shown)}.")


def split_reading(sample: Sample) -> tuple[dict[str, int], str, str]:
    """Return what a training sample reads of its entries, and its question with the answer."""
    question, answer, wish, reading = ("".join(shown(turn)) for turn in sample.messages)
    assert wish == "Read all of them in any order."
    lines = reading.split("\n")
    values = {line[:-1]: int(line[-1]) for line in lines}
    assert len(values) == len(lines)
    return values, question.rpartition("\n")[2], answer


def is_silent(part: Text | Time) -> bool:
    """Whether nothing is learned from a part of an answer."""
    return part.loss == 0.0


def test_readings_supervise_values_alone(demo: Path) -> None:
    for name in ("video", "documents"):
        for sample in read(demo, name):
            parts = [part for part in sample.messages[3].content if isinstance(part, Text | Time)]
            values, _, _ = split_reading(sample)
            learned = [part for part in parts if not is_silent(part)]
            count = len(sample.meta["pictures"])
            assert len(values) == min(16, count) and len(learned) == min(16, count)
            assert all(isinstance(part, Text) and part.text.isdigit() for part in learned)


def test_video_answers_by_time(demo: Path, digits: list[int]) -> None:
    rules = MediaConfig(image_min_pixels=1024)
    for split in ("train", "test"):
        for sample in read(demo, "video", split):
            (video,) = [element for element in sample.elements if isinstance(element, Video)]
            pictures = sample.meta["pictures"]
            right = {}
            for pair, picture in enumerate(pictures):
                moment = (video.times[2 * pair] + video.times[2 * pair + 1]) / 2
                right[f"<{moment:.1f} seconds>"] = digits[picture]
            assert all(name in render(sample, rules).text for name in right)

            if split == "train":
                values, question, answer = split_reading(sample)
                assert values == right
            else:
                question, answer = ("".join(shown(turn)) for turn in sample.messages)
            name = question.removeprefix("Which digit is shown at ").removesuffix("?")
            assert answer == f"{name}{right[name]}"


def test_training_pictures_are_moved_and_others_are_not(demo: Path) -> None:
    """Reference: scikit-learn's 8 x 8 pictures, as the means of 4 x 4 blocks: of a moved picture these differ."""
    images = load_digits().images * 255 / 16
    for split, most, least in (("train", 0.5, 0.05), ("test", 1.0, 1.0)):
        in_place = []
        for sample in read(demo, "documents", split):
            dataset = Dataset.open(demo / split / "documents", "documents")
            member = dataset.member(int(sample.id.rpartition(":")[2]), "img0.png")
            pixels = np.asarray(PillowImage.open(io.BytesIO(member)), float)
            small = pixels.reshape(8, 4, 8, 4).mean((1, 3))
            in_place.append(np.abs(images[sample.meta["pictures"][0]] - small).mean() < 16)
        assert least <= np.mean(in_place) <= most


def test_video_frames_change_with_every_temporal_patch(demo: Path) -> None:
    dataset = Dataset.open(demo / "test" / "video", "video")
    for index in range(len(dataset)):
        (video,) = [
            element for element in dataset.sample(index).elements if isinstance(element, Video)
        ]
        frames = [dataset.member(index, ref) for ref in video.frames]
        assert frames[::2] == frames[1::2]
        assert len(set(frames)) == len(frames) // 2


def test_needle_answers(demo: Path, digits: list[int]) -> None:
    for split in ("train", "test"):
        for sample in read(demo, "documents", split):
            pictures = sample.meta["pictures"]
            letters = "ABCDEFGHIJKLMNOPQRSTUVWX"
            right = {
                f"Page {letters[page]}": digits[number] for page, number in enumerate(pictures)
            }
            if split == "train":
                values, question, answer = split_reading(sample)
                assert values.items() <= right.items()
            else:
                (text,), (answer,) = said(sample, "user"), said(sample, "assistant")
                pages, question = text.rsplit("\n", 1)
                assert pages == "\n".join(f"{name} {name[-1]}" for name in right)
                assert len(sample.images) == len(pictures) and 8 <= len(pictures) <= 24
            name = "Page " + question.removeprefix("Which digit is on page ").removesuffix("?")
            assert answer == f"{name}{right[name]}"


def check_steps(think: str, answer: str) -> list[int]:
    """Check `3 + 8 = 11. 11 + 4 = 15.` and return the numbers added."""
    added, total = list[int](), 0
    for step in think.removesuffix(".").split(". "):
        left, right = step.split(" = ")
        first, second = map(int, left.split(" + "))
        assert not added or first == total
        added += [second] if added else [first, second]
        total = first + second
        assert total == int(right)
    assert int(answer) == total
    return added


def test_sums_step_by_step(demo: Path, digits: list[int]) -> None:
    for sample in read(demo, "sums"):
        (think,) = [element.text for element in sample.elements if isinstance(element, Think)]
        assert check_steps(think, said(sample, "assistant")[0]) == [
            digits[picture] for picture in sample.meta["pictures"]
        ]


def test_text_samples_are_true(demo: Path) -> None:
    for sample in read(demo, "text"):
        assert not sample.refs
        thoughts = [element.text for element in sample.elements if isinstance(element, Think)]
        if thoughts:
            asked = said(sample, "user")[0].removeprefix("What is ").removesuffix("?")
            assert check_steps(thoughts[0], said(sample, "assistant")[0]) == [
                int(value) for value in asked.split(" + ")
            ]
        elif sample.kind == "chat":
            listed = "".join(shown(sample.messages[0])).split("\n")[:-1]
            values, question, answer = split_reading(sample)
            assert {f"{name}: {value}" for name, value in values.items()} == set(listed)
            assert answer in listed
            assert question.lower().endswith(f"{answer.partition(':')[0].lower()}?")
            continue
        text = "".join(part.text for part in sample.content if isinstance(part, Text))
        if "=" in text:
            for line in text.strip().split("\n"):
                check_steps(line.strip(), line.strip().removesuffix(".").rpartition(" ")[2])
        elif text.startswith("Digits: "):
            first, again = text.split("\n")
            assert first.removeprefix("Digits: ") == again.removeprefix("Again: ")


def test_every_dataset_is_as_large_as_announced(demo: Path) -> None:
    for name, recipe in RECIPES.items():
        assert len(Dataset.open(demo / "train" / name, name)) == max(8, round(recipe.train * SCALE))
        for split in ("tuning", "test"):
            held_out = Dataset.open(demo / split / name, name)
            assert len(held_out) == max(8, round(recipe.held_out * SCALE))


# ---- the tokenizer


def test_transformers_loads_the_tokenizer(demo: Path) -> None:
    """Reference: transformers' AutoTokenizer; the special tokens' order and flags are Qwen3's."""
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(
        str(demo / "tokenizer")
    )
    ours = Tokenizer(str(demo / "tokenizer"))
    assert len(auto) == ours.size == VOCABULARY
    names = [*SPECIAL_TOKENS, *PLAIN_TOKENS]
    assert auto.convert_tokens_to_ids(names) == list(range(VOCABULARY - len(names), VOCABULARY))
    assert (auto.pad_token, auto.eos_token, auto.bos_token) == ("<|endoftext|>", "<|im_end|>", None)
    assert [
        name
        for name in names
        if auto.added_tokens_decoder[auto.convert_tokens_to_ids(name)].special
    ] == list(SPECIAL_TOKENS)
    assert (
        auto.decode(auto("<|im_start|><think>7</think>")["input_ids"], skip_special_tokens=True)
        == "<think>7</think>"
    )
    text = "Which digit is on page 12?\u00e9\U0001f600 e\u0301\n"
    assert auto(text)["input_ids"] == ours.encode([text])[0].tolist()
    assert ours.decode(auto(text)["input_ids"]) == text.replace("e\u0301", "\u00e9")


def test_digits_and_frequent_words_are_one_token(demo: Path) -> None:
    tokenizer = Tokenizer(str(demo / "tokenizer"))
    assert all(len(ids) == 1 for ids in tokenizer.encode([str(digit) for digit in range(10)]))
    assert len(tokenizer.encode(["3141592"])[0]) == 7
    words = [
        "user",
        "assistant",
        "Which",
        " digit",
        " seconds",
        " page",
        "The",
        " image",
        " sum",
        "\n",
        " =",
    ]
    assert [len(ids) for ids in tokenizer.encode(words)] == [1] * len(words)


def test_the_pattern_is_qwens(demo: Path) -> None:
    saved: dict[str, Any] = json.loads((demo / "tokenizer" / "tokenizer.json").read_bytes())
    assert saved["normalizer"] == {"type": "NFC"}
    assert saved["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": QWEN_PATTERN}


# ---- making it again


def test_a_made_folder_is_left_alone_and_a_partial_one_is_remade(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    assert make_demo(folder, scale=0.001)
    before = sha256_of(folder)
    assert not make_demo(folder, scale=0.001)
    (folder / "demo.json").unlink()
    (folder / ".making").mkdir()
    (folder / "test" / "vqa" / "vqa-000000.tar").unlink()
    assert make_demo(folder, scale=0.001)
    assert sha256_of(folder) == before
    assert make_demo(folder, scale=0.001, seed=1)
    assert sha256_of(folder) != before


def test_foreign_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="holds other files"):
        make_demo(tmp_path)
    assert (tmp_path / "train").is_dir()


def test_without_scikit_learn_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"pip install visionloom\[demo\]"):
        make_demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_picture_has_the_size_its_sample_says(demo: Path) -> None:
    for name in RECIPES:
        dataset = Dataset.open(demo / "test" / name, name)
        for index in range(len(dataset)):
            for element in dataset.sample(index).elements:
                refs = (
                    [element.ref]
                    if isinstance(element, Image)
                    else element.frames
                    if isinstance(element, Video)
                    else ()
                )
                for ref in refs:
                    assert isinstance(element, Image | Video)
                    size = PillowImage.open(io.BytesIO(dataset.member(index, ref))).size
                    assert size == (element.width, element.height)
