"""The JSON Schema file and parse_sample say the same of a table of samples. Reference: the jsonschema package."""

import json
from importlib import resources
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from visionloom.data.shards.sample import KINDS, ROLES, SPACES, TIME_FORMATS, SampleError
from visionloom.data.shards.sample_json import parse_sample, to_json

SCHEMA = json.loads(
    resources.files("visionloom.data.shards").joinpath("schema/sample-v1.json").read_text()
)
VALIDATOR = Draft202012Validator(SCHEMA)

IMAGE: dict[str, Any] = {"type": "image", "ref": "img0.jpg", "w": 4, "h": 3}
FILM: dict[str, Any] = {
    "type": "video",
    "frames": ["vid0.000.jpg", "vid0.001.jpg"],
    "t": [0.0, 0.5],
    "w": 4,
    "h": 3,
}
FILE: dict[str, Any] = {
    "type": "video",
    "ref": "v.mp4",
    "w": 4,
    "h": 3,
    "frames": 9,
    "fps": 29.97,
    "duration": 0.3,
}
TEXT: dict[str, Any] = {"type": "text", "text": "x"}
BOX: dict[str, Any] = {"type": "box", "image": 0, "xyxy": [0, 1, 2.5, 3]}
CALL: dict[str, Any] = {"type": "tool_call", "name": "f", "arguments": {"a": [1]}}


def doc(*elements: Any, **top: Any) -> dict[str, Any]:
    return {"v": 1, "id": "a", "kind": "doc", "content": list(elements), **top}


def chat(*messages: tuple[str, Any], **top: Any) -> dict[str, Any]:
    return {
        "v": 1,
        "id": "a",
        "kind": "chat",
        "messages": [{"role": r, "content": c} for r, c in messages],
        **top,
    }


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


GOOD = [
    doc(TEXT),
    doc({"type": "text", "text": "", "loss": 0}, {**TEXT, "loss": None}, IMAGE, FILM, FILE),
    doc({**IMAGE, "min_pixels": 1, "max_pixels": None}, {**BOX, "label": "cat", "space": "px"}),
    doc(
        IMAGE,
        {**BOX, "xyxy": [0, 0, 1000, 1000], "space": "relative1000"},
        {"type": "point", "image": 0, "xy": [-1, 2000]},
    ),
    doc({"type": "time", "t": 12.5}, {"type": "time", "t": 0, "fmt": "hms"}),
    doc(
        {
            **FILE,
            "t": [0.1 * n for n in range(9)],
            "start": 0,
            "end": 2.5,
            "sample_fps": 0.5,
            "max_frames": 4,
        }
    ),
    doc({**FILM, "total_pixels": 100, "start": None}, {**FILE, "t": None}),
    doc(TEXT, unknown={"a": 1}, weight=0, task=None, meta=None, tools=None),
    doc(TEXT, weight=0.5, task="ocr", meta={"url": "u"}, tools=[{"name": "f"}]),
    doc({**TEXT, "unknown": [1]}, messages=5),
    chat(("user", "hello"), ("assistant", [{"type": "think", "text": "hm"}, TEXT, CALL])),
    chat(
        ("system", "s"),
        ("user", [IMAGE]),
        ("assistant", []),
        ("tool", "r"),
        ("assistant", "a"),
        content=3,
    ),
    {**chat(("user", "q")), "messages": [{"role": "user", "content": "q", "loss": 0.5}]},
]
BAD = [
    {},
    [],
    doc(),
    doc(TEXT, v=2),
    doc(TEXT, v="1"),
    doc(TEXT, id=""),
    doc(TEXT, id=7),
    without(doc(TEXT), "id"),
    doc(TEXT, kind="text"),
    doc(TEXT, weight=-1),
    doc(TEXT, weight=None),
    doc(TEXT, weight="1"),
    doc(TEXT, task=1),
    doc(TEXT, meta=[]),
    doc(TEXT, tools={}),
    doc(TEXT, tools=["f"]),
    doc("x"),
    doc({"type": "audio"}),
    doc({"text": "x"}),
    doc({"type": "text"}),
    doc({"type": "text", "text": 1}),
    doc({**TEXT, "loss": -0.1}),
    doc({**TEXT, "loss": "1"}),
    doc({"type": "think", "text": "x"}),
    doc(CALL),
    *(doc(without(IMAGE, name)) for name in ("ref", "w", "h")),
    *(
        doc({**IMAGE, "ref": ref})
        for ref in ("../a.jpg", "/a.jpg", "a/b.jpg", ".jpg", "json", "a..b", "", "a" * 81, "a b", 1)
    ),
    *(doc({**IMAGE, "w": width}) for width in (0, -1, 1.5, "4", None, True)),
    doc({**IMAGE, "max_pixels": 0}),
    *(doc(without(FILM, name)) for name in ("frames", "t", "w", "h")),
    doc({**FILM, "frames": []}),
    doc({**FILM, "frames": ["a.jpg", "../b.jpg"]}),
    doc({**FILM, "t": [0, -1]}),
    doc({**FILM, "t": 0.5}),
    *(doc(without(FILE, name)) for name in ("frames", "fps", "duration", "w")),
    doc({**FILE, "frames": ["a.jpg"]}),
    doc({**FILE, "fps": 0}),
    doc({**FILE, "duration": -1}),
    doc({**FILE, "start": -1}),
    doc({**FILE, "sample_fps": 0}),
    doc({**FILE, "max_frames": 0}),
    doc({**FILE, "ref": "../v.mp4"}),
    *(doc(IMAGE, without(BOX, name)) for name in ("image", "xyxy")),
    doc(IMAGE, {**BOX, "image": -1}),
    doc(IMAGE, {**BOX, "xyxy": [0, 1, 2]}),
    doc(IMAGE, {**BOX, "xyxy": [0, 1, 2, "3"]}),
    doc(IMAGE, {**BOX, "space": "percent"}),
    doc(IMAGE, {**BOX, "label": 3}),
    doc(IMAGE, {**BOX, "xyxy": [0, 0, 1001, 5], "space": "relative1000"}),
    doc(IMAGE, {"type": "point", "image": 0, "xy": [1]}),
    doc({"type": "time"}),
    doc({"type": "time", "t": -1}),
    doc({"type": "time", "t": 1, "fmt": "minutes"}),
    chat(),
    without(chat(("user", "x")), "messages"),
    chat(("robot", "x")),
    chat(("user", 5)),
    chat(("user", None)),
    chat(("user", "x"), ("system", "late")),
    chat(("user", [{"type": "think", "text": "x"}])),
    chat(("user", [CALL])),
    chat(("assistant", [without(CALL, "arguments")])),
    chat(("assistant", [{**CALL, "arguments": "a"}])),
    {**chat(("user", "q")), "messages": [{"role": "user"}]},
    {**chat(("user", "q")), "messages": [{"role": "user", "content": "q", "loss": -1}]},
    {**chat(("user", "q")), "messages": {"role": "user", "content": "q"}},
]


def parses(sample: Any) -> bool:
    try:
        parse_sample(json.dumps(sample))
    except SampleError:
        return False
    return True


def test_the_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("sample", GOOD, ids=range(len(GOOD)))
def test_both_accept(sample: dict[str, Any]) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(sample)] == []
    written = json.loads(to_json(parse_sample(json.dumps(sample))))
    assert [error.message for error in VALIDATOR.iter_errors(written)] == [], (
        "what is written keeps to the schema too"
    )


@pytest.mark.parametrize("sample", BAD, ids=range(len(BAD)))
def test_both_refuse(sample: Any) -> None:
    assert not parses(sample)
    assert not VALIDATOR.is_valid(sample)


def test_the_words_of_the_schema_are_those_of_the_code() -> None:
    definitions = SCHEMA["$defs"]
    assert SCHEMA["properties"]["kind"]["enum"] == list(KINDS)
    assert definitions["message"]["properties"]["role"]["enum"] == list(ROLES)
    assert definitions["box"]["properties"]["space"]["enum"] == list(SPACES)
    assert definitions["time"]["properties"]["fmt"]["enum"] == list(TIME_FORMATS)


def _paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(found for key, inner in items for found in _paths(inner, (*path, key)))]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_both_agree_when_any_value_is_replaced(data: st.DataObject) -> None:
    """Values of other types anywhere in good samples; what only parse_sample can know is left out."""
    sample = json.loads(json.dumps(data.draw(st.sampled_from(GOOD))))
    path = data.draw(st.sampled_from(_paths(sample)[1:]))
    inner = sample
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = data.draw(
        st.sampled_from([None, True, "", "x", -1, 1, [], {}, [{}], ["a.b"]])
    )
    if parses(sample):
        assert VALIDATOR.is_valid(sample)
    elif VALIDATOR.is_valid(sample):
        with pytest.raises(
            SampleError, match=r"for each of the|decrease|<= x2|after start|count from 0|come last"
        ):
            parse_sample(json.dumps(sample))
