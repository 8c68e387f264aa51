"""No key of a record is lost without a word: random keys at random places are read, counted, or leave the record out.

Reference: the record itself, walked by brute force.
"""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from visionloom.data.convert.keys import Keys
from visionloom.data.convert.run import SOURCES
from visionloom.tests.data.conversion import Run
from visionloom.tests.data.samples import png

PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"
TURNS = [
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": "aye"},
]
OWN = {
    "id": "x",
    "kind": "chat",
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "b"},
    ],
}
CALL = {
    "role": "assistant",
    "content": "yes",
    "tool_calls": [{"function": {"name": "f", "arguments": {}}}],
}

Record = dict[str, Any]
Place = Callable[[Record], Record]
PLACES: dict[str, tuple[Record, dict[str, Place]]] = {
    "sharegpt": (
        {
            "messages": [*TURNS, {"role": "user", "content": "more"}, CALL],
            "objects": {"ref": ["x"]},
        },
        {
            "record": lambda record: record,
            "turn": lambda record: record["messages"][0],
            "answer": lambda record: record["messages"][1],
            "part": lambda record: record["messages"][0]["content"][0],
            "call": lambda record: record["messages"][3]["tool_calls"][0],
            "function": lambda record: record["messages"][3]["tool_calls"][0]["function"],
            "objects": lambda record: record["objects"],
        },
    ),
    "llava": (
        {
            "image": {"path": "a.png"},
            "conversations": [
                {"from": "human", "value": "<image>hi"},
                {"from": "gpt", "value": "aye"},
            ],
        },
        {
            "record": lambda record: record,
            "turn": lambda record: record["conversations"][1],
            "picture": lambda record: record["image"],
        },
    ),
    "hf": (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "aye"}]},
        {"record": lambda record: record, "turn": lambda record: record["messages"][1]},
    ),
    "jsonl": ({"text": "a document"}, {"record": lambda record: record}),
    "own": (
        OWN,
        {
            "turn": lambda record: record["messages"][1],
            "part": lambda record: record["messages"][0]["content"][0],
        },
    ),
    "mmc4": (
        {"text_list": ["One."], "image_info": [{"image_name": "a.png", "matched_text_index": 0}]},
        {"record": lambda record: record, "picture": lambda record: record["image_info"][0]},
    ),
    "obelics": ({"images": [None], "texts": ["One."]}, {"record": lambda record: record}),
    "omnicorpus": ({"images": [None], "texts": ["One."]}, {"record": lambda record: record}),
    "folder": ({"file_name": "a.png", "text": "a picture"}, {"record": lambda record: record}),
    "webdataset": ({"caption": "a picture"}, {"record": lambda record: record}),
}
WORDS = """score audio audios rejected chosen weight loss train mask labels name id fps nframes max_pixels detail label system task url
key loss_mask image_path tools kto_tag question answer text caption value content reasoning duration input output"""
NAMES = st.one_of(st.sampled_from(WORDS.split()), st.text("abcdefgh_", min_size=1, max_size=6))
VALUES = st.one_of(
    st.integers(0, 3),
    st.booleans(),
    st.sampled_from(["x", "0.5", "some text"]),
    st.just([1]),
    st.just({"a": 1}),
)


@pytest.mark.parametrize("kind", PLACES)
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_no_key_is_lost_without_a_word(kind: str, data: st.DataObject) -> None:
    base, places = PLACES[kind]
    record = json.loads(json.dumps(base))
    place = data.draw(st.sampled_from(sorted(places)))
    target, name, value = places[place](record), data.draw(NAMES), data.draw(VALUES)
    if name in target:
        return
    before = outcome(kind, base)
    target[name] = value
    after = outcome(kind, record)
    counted = any(key.endswith(f" key {name}") for key in after["counts"])
    left_out = bool(after["skipped"])
    assert (
        counted
        or left_out
        or after["samples"] != before["samples"]
        or known_without_effect(kind, name)
    ), (record, after)


def known_without_effect(kind: str, name: str) -> bool:
    """Whether a table of the format says that such a key changes nothing of the text that is trained on."""
    silent = (
        "no effect",
        "id of the sample",
        "as our schema",
        "weight in the loss",
        "rate of",
        "pixels",
        "picture of each box",
    )
    tables = SOURCES["jsonl" if kind == "own" else kind].keys
    return any(
        name in keys.read and any(word in keys.read[name] for word in silent) for keys in tables
    )


def outcome(kind: str, record: Record) -> dict[str, Any]:
    """What becomes of one record: samples as JSON, reasons, counts."""
    with TemporaryDirectory() as folder:
        run = Run(Path(folder))
        run.put("a.png", png(8, 8))
        samples: list[Any] = []
        try:
            samples = run("jsonl" if kind == "own" else kind, source_of(run, kind, record))
        except Exception as error:
            assert "no sample could be converted" in str(error)
        return {"samples": samples, "skipped": run.skipped, "counts": getattr(run, "counts", {})}


def source_of(run: Run, kind: str, record: Record) -> Path:
    """A source of this kind with one record."""
    if kind in ("hf", "obelics", "omnicorpus"):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([record]), run.source / "a.parquet")
        return run.source / "a.parquet"
    if kind == "folder":
        run.put("metadata.jsonl", json.dumps(record))
        return run.source
    if kind == "webdataset":
        with tarfile.open(run.source / "a.tar", "w") as tar:
            for name, content in (("a.json", json.dumps(record).encode()), ("a.png", png(8, 8))):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
        return run.source / "a.tar"
    return run.lines(record)


def rows(keys: Keys) -> list[str]:
    """The lines of a table, keys with one meaning together."""
    meanings: dict[str, list[str]] = {}
    for name, meaning in keys.read.items():
        meanings.setdefault(meaning, []).append(f"`{name}`")
    found = [
        f"| {keys.kind} | {', '.join(names)} | {meaning} |" for meaning, names in meanings.items()
    ]
    return (
        [*found, f"| {keys.kind} | all others | kept in `{keys.others}` |"]
        if keys.others
        else found
    )


def page() -> str:
    """The tables of docs/data.md, as the code has them."""
    text = ""
    shown: dict[str, str] = {}
    for kind, source in SOURCES.items():
        table = "\n".join(
            [
                "| object | keys | become |",
                "|---|---|---|",
                *(line for keys in source.keys for line in rows(keys)),
            ]
        )
        if table in shown.values():
            text += f"`{kind}`: as `{next(name for name, other in shown.items() if other == table)}`.\n\n"
        else:
            shown[kind] = table
            text += f"`{kind}`:\n\n{table}\n\n"
    return text


def test_the_documentation_has_the_tables_of_the_code() -> None:
    assert page() in PAGE.read_text()
