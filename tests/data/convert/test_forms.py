"""One thing said in several forms: JSON text in place of an object, calls twice, captions with placeholders, marks of parts.

The right values are what the same record says in the plain form, which other tests hold.
"""

import base64
import io
import json
import tarfile
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from visionloom.data.encode.chat import render
from visionloom.data.shards.sample import (
    Box,
    Element,
    Image,
    Message,
    Sample,
    Text,
    Think,
    ToolCall,
)
from visionloom.tests.data.conversion import Run
from visionloom.tests.data.samples import RULES, png

ASK = {"role": "user", "content": "age?"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"function": {"name": "age", "arguments": {"born": 1990}}}],
}
AGE = ToolCall("age", {"born": 1990})
DONE = {"role": "assistant", "content": "36"}


def one(run: Run, record: dict[str, Any], kind: str = "sharegpt") -> Sample:
    """The sample of one record."""
    (sample,) = run(kind, run.lines(record))
    return sample


def reason(run: Run, record: dict[str, Any], kind: str = "sharegpt") -> str:
    """Why one record is left out, beside one that is not."""
    good = {"messages": [ASK, DONE]} if kind == "sharegpt" else {"text": "good"}
    assert len(run(kind, run.lines(good, record))) == 1
    ((place, why),) = run.skipped
    assert place == "records.jsonl:1"
    return why


def tar(path: Path, members: dict[str, bytes]) -> Path:
    """A tar of these members."""
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


# ---- JSON text and objects


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ({"age": 36, "unit": "years"}, '{"age": 36, "unit": "years"}'),
        ({"type": "person", "name": "Zoë"}, '{"type": "person", "name": "Zoë"}'),
        ({"text": "36", "status": 200}, '{"text": "36", "status": 200}'),
        ([{"age": 36}, {"age": 34}], '[{"age": 36}, {"age": 34}]'),
        (["a", "b"], '["a", "b"]'),
        ([], "[]"),
        (36, "36"),
        (True, "true"),
        ([{"type": "text", "text": "36"}], "36"),
        ("36", "36"),
    ],
)
def test_what_a_tool_returns_is_text_or_its_json(content: Any, text: str, run: Run) -> None:
    sample = one(run, {"messages": [ASK, CALL, {"role": "tool", "content": content}, DONE]})
    assert sample.messages[2] == Message("tool", (Text(text),))


def test_audio_that_a_tool_returns_is_no_json(run: Run) -> None:
    part = {"type": "input_audio", "input_audio": {"data": "x"}}
    assert (
        reason(run, {"messages": [ASK, CALL, {"role": "tool", "content": [part]}, DONE]})
        == "unknown part of a turn"
    )


def test_a_result_in_text_may_show_a_picture(run: Run) -> None:
    run.put("a.png", png(8, 8))
    result = {"role": "user", "content": "<tool_response>\n<image>\na map\n</tool_response>"}
    sample = one(run, {"messages": [ASK, CALL, result, DONE], "images": ["a.png"]})
    assert sample.messages[0].content == (Text("age?"),)
    assert sample.messages[2] == Message("tool", (Image("img0.png", 8, 8), Text("a map")))


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_turns_may_be_json_text(key: str, run: Run) -> None:
    sample = one(run, {key: json.dumps([ASK, {**DONE, "loss": None}])})
    assert sample.messages == (
        Message("user", (Text("age?"),)),
        Message("assistant", (Text("36"),)),
    )


def test_turns_that_are_no_json_are_named(run: Run) -> None:
    assert reason(run, {"messages": str([ASK, DONE])}) == "no conversation"


def test_objects_may_be_json_text(run: Run) -> None:
    run.put("a.png", png(50, 50))
    said = [
        {"role": "user", "content": "<image>where is the <ref-object>?"},
        {"role": "assistant", "content": "<bbox>"},
    ]
    objects = {"ref": ["cat"], "bbox": [[1, 2, 3, 4]]}
    sample = one(run, {"messages": said, "images": ["a.png"], "objects": json.dumps(objects)})
    assert sample.messages[0].content[1:] == (Text("where is the "), Text("cat"), Text("?"))
    assert sample.messages[1].content == (Box(0, (1, 2, 3, 4)),)


def test_calls_as_hermes_writes_them(run: Run) -> None:
    """Of NousResearch/hermes-function-calling-v1: Python's dictionaries, not JSON."""
    said = "<tool_call>\n{'arguments': {'born': 1990, 'alive': True, 'died': None}, 'name': 'age'}\n</tool_call>\n"
    sample = one(run, {"messages": [ASK, {"role": "assistant", "content": said}]})
    assert sample.messages[1].content == (
        ToolCall("age", {"born": 1990, "alive": True, "died": None}),
    )


@pytest.mark.parametrize(
    "body",
    ["{'name': age()}", "{'name': {1, 2}}", "[" * 3000, "{'name': 'age', 'arguments': {1: b'x'}}"],
)
def test_other_python_is_a_broken_call(body: str, run: Run) -> None:
    assert (
        reason(
            run,
            {"messages": [ASK, {"role": "assistant", "content": f"<tool_call>{body}</tool_call>"}]},
        )
        == "broken tool call"
    )


# ---- said twice


def test_calls_in_text_and_in_a_key_are_the_same_calls(run: Run) -> None:
    text = '<tool_call>\n{"name": "age", "arguments": {"born": 1990}}\n</tool_call>'
    twice = {
        **CALL,
        "content": text,
        "function_call": {"name": "age", "arguments": '{"born": 1990}'},
    }
    sample = one(run, {"messages": [ASK, twice]})
    assert sample.messages[1].content == (AGE,)
    assert render(sample, RULES).text.endswith(f"<|im_start|>assistant\n{text}<|im_end|>\n")


def test_different_calls_in_two_places_are_a_fault(run: Run) -> None:
    other = {**CALL, "function_call": {"name": "age", "arguments": {"born": 2000}}}
    assert reason(run, {"messages": [ASK, other]}) == "two lists of calls in a turn"


def test_ids_of_calls_have_no_effect_and_are_not_counted(run: Run) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "age", "arguments": {"born": 1990}},
    }
    one(run, {"messages": [ASK, {**CALL, "tool_calls": [call]}]})
    assert not [name for name in run.counts if name.startswith("not read")]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (b"a cat", (Image("img0.png", 8, 8), Text("a cat"))),
        (b"\xef\xbb\xbfa cat", (Image("img0.png", 8, 8), Text("a cat"))),
        (b"<image>\na cat", (Image("img0.png", 8, 8), Text("a cat"))),
        (b"a cat:\n<image>", (Text("a cat:"), Image("img0.png", 8, 8))),
        (b"a <video> tag", (Image("img0.png", 8, 8), Text("a <video> tag"))),
    ],
)
@pytest.mark.parametrize("kind", ["webdataset", "folder"])
def test_a_caption_says_where_its_picture_stands(
    kind: str, text: bytes, content: tuple[Element, ...], run: Run
) -> None:
    members = {"a.png": png(8, 8), "a.txt": text}
    for name, data in members.items() if kind == "folder" else ():
        run.put(name, data)
    source = run.source if kind == "folder" else tar(run.source / "a.tar", members)
    assert [sample.content for sample in run(kind, source)] == [content]


def test_a_caption_with_more_placeholders_than_pictures_is_left_out(run: Run) -> None:
    for name in ("a", "b"):
        run.put(f"{name}.png", png(8, 8))
        run.put(f"{name}.txt", "<image><image> two" if name == "a" else "one")
    assert len(run("folder", run.source)) == 1
    assert run.skipped == [("a.png", "placeholders that do not match the media")]


@pytest.mark.parametrize(
    ("text", "facts", "caption", "unread"),
    [
        (b"a cat", {"caption": "a cat", "status": "success"}, "a cat", ["record key status"]),
        (b"a cat", {"caption": "a dog"}, "a cat", ["record key caption"]),
        (b" \n", {"caption": "a cat"}, "a cat", []),
    ],
)
def test_a_caption_in_two_members(
    text: bytes, facts: dict[str, Any], caption: str, unread: list[str], run: Run
) -> None:
    """As img2dataset writes them: 0.jpg, 0.txt and 0.json with the caption again."""
    members = {"0.png": png(8, 8), "0.txt": text, "0.json": json.dumps(facts).encode()}
    (sample,) = run("webdataset", tar(run.source / "a.tar", members))
    assert sample.content == (Image("img0.png", 8, 8), Text(caption))
    assert [
        name.removeprefix("not read: ") for name in run.counts if name.startswith("not read")
    ] == unread


# ---- marks of the loss, of audio, of other formats


@pytest.mark.parametrize(
    "mark",
    [{"loss": False}, {"weight": 0}, {"train": False}, {"trainable": False}, {"loss_scale": 0}],
)
def test_a_part_is_learned_as_its_marks_say(mark: dict[str, Any], run: Run) -> None:
    parts = [
        {"type": "thinking", "thinking": "hm", **mark},
        {"type": "text", "text": "4", **mark},
        {"type": "text", "text": "!"},
    ]
    sample = one(run, {"messages": [ASK, {"role": "assistant", "content": parts}]})
    assert sample.messages[1].content == (Think("hm", loss=0.0), Text("4", loss=0.0), Text("!"))


def test_a_part_s_own_true_goes_before_its_turn_s_false(run: Run) -> None:
    parts = [{"type": "text", "text": "a", "loss": True}, {"type": "text", "text": "b"}]
    sample = one(run, {"messages": [ASK, {"role": "assistant", "content": parts, "loss": False}]})
    weights = {
        piece.text: piece.weight for piece in render(sample, RULES).pieces if piece.text in "ab"
    }
    assert weights == {"a": 1.0, "b": 0.0}


def test_contradicting_marks_of_a_part(run: Run) -> None:
    parts = [{"type": "text", "text": "a", "loss": True, "weight": 0}]
    assert (
        reason(run, {"messages": [ASK, {"role": "assistant", "content": parts}]})
        == "unknown loss mark"
    )


@pytest.mark.parametrize("weight", [1e300, 1e7])
def test_a_weight_that_would_drown_all_others_is_left_out(weight: float, run: Run) -> None:
    assert reason(run, {"messages": [ASK, {**DONE, "weight": weight}]}) == "breaks the schema"


def test_a_weight_that_is_too_large_as_a_product_is_left_out(run: Run) -> None:
    assert (
        reason(run, {"messages": [ASK, {**DONE, "weight": 1e5}], "weight": 1e5})
        == "weight too large"
    )


def test_a_weight_that_training_rounds_to_nothing_teaches_nothing(run: Run) -> None:
    assert reason(run, {"messages": [ASK, {**DONE, "weight": 1e-60}]}) == "nothing supervised"


@pytest.mark.parametrize(
    "text", ["<audio>what is said?", "<audio>\nwhat is said?", "what is said?\n<audio>", "<audio>"]
)
def test_a_sound_that_is_missing(text: str, run: Run) -> None:
    assert reason(run, {"messages": [{"role": "user", "content": text}, DONE]}) == "audio"


@pytest.mark.parametrize(
    "text", ["what is <audio> in HTML?", "Use <audio>", "<audio> and <video> are tags"]
)
def test_words_about_sound_stay(text: str, run: Run) -> None:
    assert one(run, {"messages": [{"role": "user", "content": text}, DONE]}).messages[
        0
    ].content == (Text(text),)


@pytest.mark.parametrize(
    "text",
    ["<image 1> what?", "<|image_1|>\nwhat?", "<IMAGE> what?", "<ImageHere>what?", "in <image_2>?"],
)
def test_another_format_s_placeholder_is_no_word(text: str, run: Run) -> None:
    run.put("a.png", png(8, 8))
    assert (
        reason(run, {"messages": [{"role": "user", "content": text}, DONE], "images": ["a.png"]})
        == "unknown placeholder"
    )


@pytest.mark.parametrize(
    "text",
    [
        "write an <img> and a <video> tag",
        "<image 1>: <image>",
        "<picture>?",
        "what is <|image_pad|>",
    ],
)
def test_words_beside_a_picture_stay(text: str, run: Run) -> None:
    run.put("a.png", png(8, 8))
    (first, *_) = one(
        run, {"messages": [{"role": "user", "content": text}, DONE], "images": ["a.png"]}
    ).messages
    said = [element.text for element in first.content if isinstance(element, Text)]
    assert said == [text.replace("<image>", "").replace("<|image_pad|>", "")]


@pytest.mark.parametrize(
    "turn",
    [
        {"content": "36", "reasoning_content": "a </think> b"},
        {"content": "<think>a <|im_end|> b</think>36"},
        {
            "content": [
                {"type": "thinking", "thinking": "<tool_call>"},
                {"type": "text", "text": "36"},
            ]
        },
        {"content": "", "tool_calls": [{"name": "age", "arguments": {"of": "</tool_call>"}}]},
    ],
)
def test_marks_in_thoughts_and_calls_leave_the_record_out(turn: dict[str, Any], run: Run) -> None:
    assert reason(run, {"messages": [ASK, {"role": "assistant", **turn}]}).endswith("> in a text")


def test_marks_in_thoughts_of_our_own_schema(run: Run) -> None:
    content = [{"type": "think", "text": "a </think> b"}, {"type": "text", "text": "36"}]
    written = {
        "id": "x",
        "kind": "chat",
        "messages": [ASK, {"role": "assistant", "content": content}],
    }
    assert reason(run, written, kind="jsonl") == "</think> in a text"


def test_a_user_s_turn_that_is_learned_is_no_place_for_marks(run: Run) -> None:
    assert (
        reason(run, {"messages": [{"role": "user", "content": "<|im_end|>", "train": True}, DONE]})
        == "<|im_end|> in a text"
    )


# ---- what cannot be meant


@pytest.mark.parametrize(
    "part",
    [
        {"image": "a.png", "text": "what?"},
        {"type": "text", "text": "what?", "image": "a.png"},
        {"type": "image", "image": "a.png", "text": "what?"},
    ],
)
def test_a_part_that_shows_two_things_is_left_out(part: dict[str, Any], run: Run) -> None:
    run.put("a.png", png(8, 8))
    assert (
        reason(run, {"messages": [{"role": "user", "content": [part]}, DONE]})
        == "part of several kinds"
    )


@pytest.mark.parametrize("kind", ["sharegpt", "jsonl"])
def test_limits_that_exclude_each_other(kind: str, run: Run) -> None:
    run.put("a.png", png(64, 64))
    part = {"type": "image", "file": "a.png", "min_pixels": 4096, "max_pixels": 1024}
    record = {"id": "x", "kind": "chat", "messages": [{"role": "user", "content": [part]}, DONE]}
    assert (
        reason(run, {**record, "messages": [{"role": "user", "content": [part]}, DONE]}, kind)
        == "limits that exclude each other"
    )


def test_a_chat_of_another_format_is_not_our_schema(run: Run) -> None:
    assert reason(run, {"messages": [ASK, DONE]}, kind="jsonl") == "not our schema"


@pytest.mark.parametrize(
    ("box", "kept"), [([0, 0, 50, 50], True), ([0, -1, 51, 50], True), ([10, 10, 900, 800], False)]
)
def test_a_box_in_other_units_is_not_put_on_the_edge(box: list[int], kept: bool, run: Run) -> None:
    run.put("a.png", png(50, 50))
    said = [
        {"role": "user", "content": "<image>where?"},
        {"role": "assistant", "content": "<bbox>"},
    ]
    record = {"messages": said, "images": ["a.png"], "objects": {"bbox": [box]}}
    assert len(run("sharegpt", run.lines({"messages": [ASK, DONE]}, record))) == 1 + kept
    assert run.skipped == ([] if kept else [("records.jsonl:1", "box outside its picture")])


@pytest.mark.parametrize("form", ["base64", "url"])
def test_a_picture_as_anthropic_s_messages_have_it(form: str, run: Run) -> None:
    run.put("a.png", png(8, 8, 1))
    data = {
        "type": "base64",
        "media_type": "image/png",
        "data": base64.b64encode(png(8, 8, 1)).decode(),
    }
    part = {
        "type": "image",
        "source": data if form == "base64" else {"type": "url", "url": "a.png"},
    }
    one(
        run,
        {
            "messages": [
                {"role": "user", "content": [part, {"type": "text", "text": "what?"}]},
                DONE,
            ]
        },
    )
    assert run.dataset.member(0, "img0.png") == png(8, 8, 1)
    assert not [name for name in run.counts if name.startswith("not read")]


# ---- tables


def test_moments_that_python_has_no_type_for_are_a_column_that_is_not_read(run: Run) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    moments = pyarrow.array([1, 10**18], pyarrow.timestamp("ns"))
    parquet.write_table(
        pyarrow.table({"text": ["a", "b"], "made": moments}), run.source / "a.parquet"
    )
    assert [sample.content for sample in run("hf", run.source)] == [(Text("a"),), (Text("b"),)]
    assert run.counts["not read: record key made"] == 2
    assert isinstance(
        pyarrow.array([10**18], pyarrow.timestamp("ns"))[0].as_py(), datetime
    )  # only the first cannot be


def test_a_damaged_row_group_costs_its_rows(run: Run) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = run.source / "a.parquet"
    table = pyarrow.table({"text": [f"text {number} " + "x" * 50 for number in range(30)]})
    parquet.write_table(table, path, row_group_size=10, compression="snappy", use_dictionary=False)
    column = parquet.ParquetFile(path).metadata.row_group(1).column(0)
    place, data = (
        column.data_page_offset + column.total_compressed_size // 2,
        bytearray(path.read_bytes()),
    )
    data[place : place + 40] = b"\xff" * 40
    path.write_bytes(data)
    kept = [sample.id for sample in run("hf", path)]
    assert kept == [f"set:a.parquet:{number}" for number in (*range(10), *range(20, 30))]
    assert run.skipped == [(f"a.parquet:{number}", "damaged table") for number in range(10, 20)]
