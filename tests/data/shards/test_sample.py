"""Schema version 1: every element survives the round trip, and every mistake is named with its sample and field."""

import copy
import json
import pickle
from typing import Any

import pytest

from visionloom.data.shards.sample import (
    Box,
    Image,
    Message,
    Point,
    Sample,
    SampleError,
    Text,
    Think,
    Time,
    ToolCall,
    Video,
    element_loss,
)
from visionloom.data.shards.sample_json import parse_sample, to_json

CHAT: dict[str, Any] = {
    "v": 1,
    "id": "digits:12",
    "kind": "chat",
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be short."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "ref": "img0.png", "w": 64, "h": 32, "max_pixels": 4096},
                {
                    "type": "video",
                    "frames": ["vid0.000.png", "vid0.001.png"],
                    "t": [0.0, 0.5],
                    "w": 32,
                    "h": 32,
                },
                {"type": "text", "text": "Where is it at ", "loss": 0.5},
                {"type": "time", "t": 12.5, "fmt": "hms"},
            ],
        },
        {
            "role": "assistant",
            "loss": 2.0,
            "content": [
                {"type": "think", "text": "Hm."},
                {"type": "box", "image": 0, "xyxy": [0, 1, 32, 32.5], "space": "px", "label": "7"},
                {"type": "point", "image": 0, "xy": [10, 1000], "space": "relative1000", "loss": 0},
            ],
        },
    ],
    "weight": 0.5,
    "task": "grounding",
    "meta": {"source": "test"},
}


def test_every_element_is_read() -> None:
    sample = parse_sample(json.dumps(CHAT).encode())
    assert sample == Sample(
        id="digits:12",
        kind="chat",
        messages=(
            Message("system", (Text("Be short."),)),
            Message(
                "user",
                (
                    Image("img0.png", 64, 32, None, 4096),
                    Video(("vid0.000.png", "vid0.001.png"), (0.0, 0.5), 32, 32),
                    Text("Where is it at ", 0.5),
                    Time(12.5, "hms"),
                ),
            ),
            Message(
                "assistant",
                (
                    Think("Hm."),
                    Box(0, (0, 1, 32, 32.5), "px", "7"),
                    Point(0, (10, 1000), "relative1000", None, 0.0),
                ),
                2.0,
            ),
        ),
        weight=0.5,
        task="grounding",
        meta={"source": "test"},
    )
    assert sample.refs == ("img0.png", "vid0.000.png", "vid0.001.png")


def test_json_reads_back_equal() -> None:
    sample = parse_sample(CHAT)
    assert parse_sample(to_json(sample)) == sample
    document = Sample(
        "d", "doc", content=(Text("a\u00e9 "), Image("i.png", 1, 2)), tools=({"name": "f"},)
    )
    assert parse_sample(to_json(document).encode()) == document


FILE: dict[str, Any] = {
    "type": "video",
    "ref": "vid0.mp4",
    "w": 640,
    "h": 360,
    "frames": 3,
    "fps": 30.0,
    "duration": 0.1,
    "t": [0.0, 0.04, 0.1],
    "start": 0.0,
    "end": 0.05,
    "sample_fps": 1.5,
    "max_frames": 7,
    "total_pixels": 65536,
}


def film(**changes: Any) -> dict[str, Any]:
    values = {name: value for name, value in (FILE | changes).items() if value is not None}
    return {"v": 1, "id": "f", "kind": "doc", "content": [values]}


def test_a_video_may_be_a_file() -> None:
    (video,) = parse_sample(film()).elements
    assert video == Video(
        (),
        (0.0, 0.04, 0.1),
        640,
        360,
        ref="vid0.mp4",
        file_frames=3,
        fps=30.0,
        duration=0.1,
        start=0.0,
        end=0.05,
        sample_fps=1.5,
        max_frames=7,
        total_pixels=65536,
    )
    assert video.frame_count == 3
    assert parse_sample(film()).refs == ("vid0.mp4",)
    for raw in (
        film(),
        film(t=None, start=None, end=None, sample_fps=None, max_frames=None, total_pixels=None),
    ):
        assert json.loads(to_json(parse_sample(raw))) == raw


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"fps": 0}, "fps: more than 0 expected"),
        ({"fps": None}, "fps: a finite number expected, got None"),
        ({"duration": -1.0}, "duration: at least 0 expected"),
        ({"frames": ["a.png"]}, "frames: an integer of at least 1 expected"),
        ({"t": [0.0, 1.0]}, "t: one time for each of the 3 frames expected, got 2"),
        ({"end": 0.0}, r"end: after start \(0 s\) expected, got 0"),
        ({"ref": "../vid0.mp4"}, "ref: a plain member name"),
        ({"sample_fps": 0}, "sample_fps: more than 0 expected"),
    ],
)
def test_mistakes_in_a_video_file_are_named(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SampleError, match=rf"sample f: content\[0\]\.{problem}"):
        parse_sample(film(**changes))


def test_tool_calls_end_an_assistants_turn() -> None:
    call: dict[str, Any] = {
        "type": "tool_call",
        "name": "f",
        "arguments": {"x": [1, "\u00e9"]},
        "loss": 0.5,
    }

    def chat(role: str, *content: dict[str, Any]) -> dict[str, Any]:
        return {
            "v": 1,
            "id": "c",
            "kind": "chat",
            "messages": [{"role": role, "content": list(content)}],
        }

    text = {"type": "text", "text": "hm"}
    raw = chat("assistant", text, call, call)
    assert parse_sample(raw).elements[1:] == (ToolCall("f", {"x": [1, "\u00e9"]}, 0.5),) * 2
    assert json.loads(to_json(parse_sample(raw))) == raw
    for wrong, problem in (
        (chat("user", call), "tool_call belongs to assistant messages only"),
        (chat("assistant", call, text), "tool calls come last in a message"),
        (chat("assistant", call | {"arguments": "{}"}), r"arguments: an object expected, got str"),
    ):
        with pytest.raises(SampleError, match=problem):
            parse_sample(wrong)


def test_weights_fall_back_from_element_to_message_to_role() -> None:
    system, user, assistant = parse_sample(CHAT).messages
    assert element_loss(system.content[0], system) == 0
    assert [element_loss(element, user) for element in user.content] == [0, 0, 0.5, 0]
    assert [element_loss(element, assistant) for element in assistant.content] == [2, 2, 0]
    assert element_loss(Text("x"), Message("assistant", ())) == 1
    assert [element_loss(element) for element in (Text("x"), Image("i.png", 1, 1))] == [1, 0]


def test_unknown_keys_are_tolerated_and_kept_at_the_top() -> None:
    raw = copy.deepcopy(CHAT) | {"licence": "CC0"}
    raw["messages"][0]["name"] = "x"
    raw["messages"][0]["content"][0]["language"] = "en"
    sample = parse_sample(raw)
    assert sample.meta == {"licence": "CC0", "source": "test"}
    assert sample.messages == parse_sample(CHAT).messages


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("v", 2, "v: schema version 1 expected, got 2"),
        ("kind", "book", "kind: one of chat, doc expected, got 'book'"),
        ("messages", [], "messages: at least one message expected"),
        ("messages", 3, "messages: a list expected, got int"),
        ("weight", -1, "weight: at least 0 expected"),
        ("weight", True, "weight: a finite number expected, got True"),
        ("meta", [], "meta: an object expected, got list"),
        (
            "messages.1.role",
            "bot",
            "messages[1].role: one of system, user, assistant, tool expected, got 'bot'",
        ),
        ("messages.1.role", ["user"], "messages[1].role: one of"),
        ("messages.1.role", "system", "messages[1].role: a system message comes first"),
        ("messages.1.content.0", 7, "messages[1].content[0]: an object expected, got int"),
        ("messages.1.content.0.type", "audio", "messages[1].content[0].type: one of text, image"),
        (
            "messages.1.content.0.ref",
            "../etc/passwd",
            "messages[1].content[0].ref: a plain member name",
        ),
        (
            "messages.1.content.0.ref",
            "/img0.png",
            "messages[1].content[0].ref: a plain member name",
        ),
        ("messages.1.content.0.ref", "json", "messages[1].content[0].ref: a plain member name"),
        ("messages.1.content.0.ref", "a..png", "messages[1].content[0].ref: a plain member name"),
        (
            "messages.1.content.0.ref",
            "img0.png\n",
            "messages[1].content[0].ref: a plain member name",
        ),
        (
            "messages.1.content.0.w",
            0,
            "messages[1].content[0].w: an integer of at least 1 expected, got 0",
        ),
        (
            "messages.1.content.0.w",
            64.0,
            "messages[1].content[0].w: an integer of at least 1 expected",
        ),
        (
            "messages.1.content.1.frames",
            [],
            "messages[1].content[1].frames: at least one frame expected",
        ),
        (
            "messages.1.content.1.frames.1",
            "a/b",
            "messages[1].content[1].frames[1]: a plain member name",
        ),
        (
            "messages.1.content.1.t",
            [0.0],
            "messages[1].content[1].t: one time for each of the 2 frames expected, got 1",
        ),
        ("messages.1.content.1.t", [1.0, 0.5], "messages[1].content[1].t: times must not decrease"),
        (
            "messages.1.content.1.ref",
            "vid0.mp4",
            "messages[1].content[1].frames: an integer of at least 1 expected",
        ),
        ("messages.1.content.1.end", -1, "messages[1].content[1].end: at least 0 expected"),
        (
            "messages.1.content.1.max_frames",
            0,
            "messages[1].content[1].max_frames: an integer of at least 1 expected",
        ),
        ("messages.1.content.2.loss", -0.1, "messages[1].content[2].loss: at least 0 expected"),
        (
            "messages.1.content.3.t",
            float("nan"),
            "messages[1].content[3].t: a finite number expected, got nan",
        ),
        (
            "messages.1.content.3.t",
            10**400,
            "messages[1].content[3].t: a finite number expected, got 1000",
        ),
        (
            "messages.1.content.1.t",
            [0.0, float("-inf")],
            "messages[1].content[1].t[1]: a finite number expected, got -inf",
        ),
        (
            "messages.1.content.1.t",
            [-0.5, 0.5],
            "messages[1].content[1].t[0]: at least 0 expected, got -0.5",
        ),
        (
            "messages.1.content.3.type",
            "think",
            "messages[1].content[3].type: think belongs to assistant",
        ),
        (
            "messages.2.content.1.xyxy",
            [float("-inf"), 0.0, 1.0, 1.0],
            "messages[2].content[1].xyxy[0]: a finite number",
        ),
        (
            "messages.2.content.1.xyxy",
            [1, 2, 3],
            "messages[2].content[1].xyxy: 4 numbers expected, got 3",
        ),
        (
            "messages.2.content.1.xyxy",
            [9, 2, 3, 4],
            "messages[2].content[1].xyxy: x1 <= x2 and y1 <= y2 expected",
        ),
        ("messages.2.content.1.image", 1, "box.image: picture 1 of 1"),
        (
            "messages.2.content.2.xy",
            [10, 1001],
            "messages[2].content[2].xy: numbers from 0 to 1000 expected",
        ),
    ],
)
def test_mistakes_name_the_sample_and_the_field(path: str, value: Any, message: str) -> None:
    raw = copy.deepcopy(CHAT)
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    target: Any = raw
    for part in parents:
        target = target[part]
    target[last] = value
    with pytest.raises(SampleError) as caught:
        parse_sample(raw)
    assert str(caught.value).startswith(f"sample digits:12: {message}")


@pytest.mark.parametrize(
    "raw", [b"{", b"\xff\xfe{}", b"[1]", b"{}", b"[" * 100_000, b'{"id": ""}', b'{"id": 3}']
)
def test_broken_json_names_where_it_lies(raw: bytes) -> None:
    with pytest.raises(SampleError, match=r"^sample shard\.tar:000000003: "):
        parse_sample(raw, origin="shard.tar:000000003")


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(SampleError("a:1", "messages[0].role", "wrong")))
    assert (str(error), error.sample_id, error.where) == (
        "sample a:1: messages[0].role: wrong",
        "a:1",
        "messages[0].role",
    )


@pytest.mark.parametrize("name", ["train", "weight", "loss_mask", "is_trained", "train_detail"])
def test_a_mark_of_the_loss_that_the_schema_has_no_word_for_is_refused(name: str) -> None:
    turns = [
        {"role": "user", "content": "a", "name": "me"},
        {"role": "assistant", "content": "b", name: 0},
    ]
    with pytest.raises(
        SampleError, match=rf"sample x: messages\[1\]\.{name}: unknown mark of the loss"
    ):
        parse_sample({"v": 1, "id": "x", "kind": "chat", "messages": turns})
