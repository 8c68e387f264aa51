"""Small inputs of strangers cost little: a megabyte that was made to be slow is read as fast as any other.

The inputs were made against the patterns and loops of each reader; `try_reader` measures CPU time and memory in a process of its own.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from visionloom.common.errors import UserError
from visionloom.data.convert.files import MediaFiles
from visionloom.data.convert.keys import Keys, RecordFields
from visionloom.data.convert.marks import _python, answer, results, with_placeholders
from visionloom.data.convert.skip import Skip
from visionloom.data.encode.chat import render
from visionloom.data.plan.over_length import _SENTENCE
from visionloom.data.shards.index import index_path, index_shard
from visionloom.data.shards.sample import SampleError
from visionloom.data.shards.sample_json import parse_sample
from visionloom.data.shards.shard_index import ShardIndex
from visionloom.data.shards.tar import Fault, entries
from visionloom.data.shards.write import write_shards
from visionloom.tests import fuzzing
from visionloom.tests.data.conversion import Run
from visionloom.tests.data.samples import RULES, picture_question
from visionloom.tests.fuzzing import try_reader

SIZE = 1 << 20
OURS = (UserError, Skip)


def said(text: str) -> object:
    return list(answer(text, True, RecordFields))


TEXTS: dict[str, tuple[Callable[[str], object], str]] = {
    "calls without an end": (said, "<tool_call>" * (SIZE // 11)),
    "calls within calls": (said, "<tool_call>x" * (SIZE // 30) + "</tool_call>" * (SIZE // 30)),
    "thoughts without an end": (said, "<think>" * (SIZE // 7)),
    "spaces before a thought": (said, " " * SIZE + "<think"),
    "results without an end": (results, "<tool_response>" * (SIZE // 15)),
    "spaces between results": (results, ("<tool_response></tool_response>" + " " * 1000) * (SIZE // 1031) + "x"),
    "results and a word": (results, "<tool_response>a</tool_response>" * (SIZE // 33) + "x"),
    "vision blocks": (lambda text: with_placeholders(text, True, True), "<|vision_start|>" * (SIZE // 32) + "<|image_pad|>" * (SIZE // 32)),
    "base64 with spaces": (MediaFiles((Path("."),)).read, "/9j/" + "A" * 60 + " " * SIZE + "!"),
    "base64 with signs": (MediaFiles((Path("."),)).read, "/9j/" + "A" * 60 + "=A " * (SIZE // 3)),
    "a scheme": (MediaFiles((Path("."),)).read, "a" * SIZE),
    "an inline picture": (MediaFiles((Path("."),)).read, "data:" + ";base64" * (SIZE // 8)),
    "a literal": (_python, "[" + "1," * (SIZE // 2) + "]"),
    "a literal in literals": (_python, "[" * (SIZE // 2) + "]" * (SIZE // 2)),
    "quotes behind a sentence": (_SENTENCE.findall, "." + '"' * SIZE),
    "sentences": (_SENTENCE.findall, ".\"" * (SIZE // 2)),
    "a key of a record": (lambda text: RecordFields(Keys("record", {}), {text: 1}), "rejected_" * (SIZE // 9) + "\n"),
    "a key of a turn": (lambda text: RecordFields(Keys("turn", {}), {text: 1}), "loss_" * (SIZE // 5) + "\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_patterns_take_linear_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each took from seconds to hours before it was bounded, or might have; a second is a hundred times what one takes now."""
    monkeypatch.setattr(fuzzing, "SECONDS", 2.0)
    read, text = TEXTS[name]
    assert try_reader(lambda data: read(data.decode()), [text.encode()], OURS, name) == 1


def sample(*elements: object, **more: object) -> bytes:
    turns = [{"role": "user", "content": "Look."}, {"role": "assistant", "content": list(elements)}]
    return json.dumps({"v": 1, "id": "x", "kind": "chat", "messages": turns, **more}).encode()


IMAGE = {"type": "image", "ref": "a.png", "w": 1 << 20, "h": 1 << 20, "min_pixels": 1 << 40}
CALL = {"type": "tool_call", "name": "f", "arguments": {}}
SAMPLES = {
    "calls": sample({"type": "text", "text": "x"}, *[CALL] * 40_000),
    "boxes": sample(*[IMAGE] * 200, *[{"type": "box", "image": 0, "xyxy": [0, 0, 1, 1]}] * 20_000),
    "texts": sample(*[{"type": "text", "text": "x"}] * 40_000),
    "large pictures": sample(*[IMAGE] * 10_000),
    "a long key": sample(**{"a" * SIZE: 1}),
    "a long key of a turn": json.dumps({"v": 1, "id": "x", "kind": "chat", "messages": [{"role": "user", "content": "x", "loss_" * 200_000 + "\n": 1}]}).encode(),
    "deep tools": sample({"type": "text", "text": "x"}, tools=[{"a": "DEEP"}]).replace(b'"DEEP"', b"[" * 900 + b"]" * 900),
    "deeper tools": sample({"type": "text", "text": "x"}, tools=[{"a": "DEEP"}]).replace(b'"DEEP"', b"[" * 90_000 + b"]" * 90_000),
    "5000 digits": sample({"type": "text", "text": "x"}, meta={"a": "N"}).replace(b'"N"', b"9" * 5000),
}  # fmt: skip


@pytest.mark.parametrize("name", SAMPLES)
def test_samples_take_linear_time(name: str) -> None:
    assert (
        try_reader(
            lambda data: render(parse_sample(data), RULES), [SAMPLES[name]], (SampleError,), name
        )
        == 1
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": 1e308}, "weight: at most 1e+06 expected"),
        ({"weight": 10**400}, "weight: a finite number expected"),
        ({"weight": True}, "weight: a finite number expected"),
        ({"weight": float("nan")}, "weight: a finite number expected"),
        ({"weight": -1}, "weight: at least 0 expected"),
        ({"id": "x" * 10_000}, "id: at most 8192 characters"),
        (
            {"messages": [{"role": "user", "content": [{**IMAGE, "w": 10**18}]}]},
            "w: at most 1048576 expected",
        ),
        (
            {"messages": [{"role": "user", "content": [{**IMAGE, "w": True}]}]},
            "w: an integer of at least 1 expected",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "x", "loss": 1e300}]}
                ]
            },
            "loss: at most 1e+06",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "time", "t": 1e18}]}]},
            "t: at most 1e+09 expected",
        ),
    ],
)
def test_numbers_that_nobody_measured_are_one_bad_sample(
    change: dict[str, object], message: str
) -> None:
    good = json.loads(sample({"type": "text", "text": "x"}))
    parse_sample(good)
    with pytest.raises(SampleError, match=r"sample ") as caught:
        parse_sample(json.dumps(good | change).encode())
    assert message in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fps", 1e18),
        ("fps", 5e-324),
        ("duration", 1e300),
        ("frames", 10**18),
        ("sample_fps", 1e-300),
        ("end", 1e18),
        ("w", 10**9),
    ],
)
def test_numbers_of_a_video(name: str, value: float) -> None:
    video = {
        "type": "video",
        "ref": "v.mp4",
        "frames": 10,
        "fps": 2.0,
        "duration": 5.0,
        "w": 64,
        "h": 64,
    }
    document = {"v": 1, "id": "x", "kind": "doc", "content": [video]}
    render(parse_sample(json.dumps(document).encode()), RULES)
    with pytest.raises(SampleError, match=rf"content\[0\]\.{name}: at (most|least)"):
        parse_sample(json.dumps({**document, "content": [{**video, name: value}]}).encode())


# ---- tars


def header(name: str, kind: bytes, size: int) -> bytes:
    block = bytearray(512)
    block[: len(name)] = name.encode()
    block[124:136] = b"\x80" + size.to_bytes(11) if size >= 8**11 else b"%011o\0" % size
    block[156:157], block[257:265] = kind, b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


TARS = {
    "digits in a pax header": header("x", b"x", SIZE) + padded(b"1" * SIZE),
    "records of a pax header": header("x", b"x", SIZE) + padded((b"9 a=bcd\n" * SIZE)[:SIZE]),
    "lengths of a pax header": header("x", b"x", 4096)
    + padded(b"0 path=a\n" * 400 + b"-5 path=a\n"),
    "a long name of gigabytes": header("x", b"L", 1 << 33) + bytes(1024),
    "a member of gigabytes": header("001.json", b"0", 1 << 60) + bytes(1024),
    "a sparse member": header("001.json", b"S", 1024) + bytes(1024),
    "sizes with spaces": bytes(header("001.json", b"0", 8)).replace(
        b"00000000010\0", b"000 0000010\0"
    ),
    "zero blocks": (bytes(512) + b"x" * 512) * 1000,
}


@pytest.mark.parametrize("name", TARS)
def test_tars_take_linear_time(name: str, tmp_path: Path) -> None:
    """A pax header of digits took hours (a quadratic pattern); a sparse member or a name of any size were taken at their word."""
    path = tmp_path / "a.tar"

    def read(data: bytes) -> None:
        path.write_bytes(data)
        faults: list[Fault] = []
        assert not [entry.name for entry in entries(path, faults.append)] and faults

    assert try_reader(read, [TARS[name]], (), name) == 1


def test_names_of_pax_headers_are_read() -> None:
    """Reference: the records' form, `LENGTH KEY=VALUE`, of POSIX.1-2001."""
    from visionloom.data.shards.tar import _long_name

    record = b"path=" + b"a/" * 100 + b"b=c\n"
    data = b"20 mtime=1234567.125\n"[:0] + b"13 comment=x\n" + b"%d " % (len(record) + 4) + record
    assert _long_name(b"x", data) == "a/" * 100 + "b=c"


# ---- index files


@pytest.mark.parametrize("field", ["samples", "members", "names", "statistics", "tar_bytes"])
def test_counts_of_an_index_that_lie(field: str, tmp_path: Path) -> None:
    from visionloom.data.shards.shard_index import HEADER

    write_shards(tmp_path / "set", "set", [picture_question(1)], samples_per_shard=1)
    path = tmp_path / "set" / "set-000000.tar"
    content = np.fromfile(index_path(path), np.uint8)
    for value in (0, 1, 2**31, 2**32 - 1):
        lying = content.copy()
        lying[: HEADER.itemsize].view(HEADER)[field] = value
        if (field != "tar_bytes" or value < 2**31) and lying.tobytes() != content.tobytes():
            with pytest.raises(ValueError, match=r"bytes expected|leads out|no document|facts"):
                ShardIndex(lying).statistics  # noqa: B018


def test_rows_of_an_index_that_lead_outside(tmp_path: Path) -> None:
    from visionloom.data.shards.shard_index import HEADER, SAMPLE_ROW

    write_shards(tmp_path / "set", "set", [picture_question(1)], samples_per_shard=1)
    path = tmp_path / "set" / "set-000000.tar"
    content = np.fromfile(index_path(path), np.uint8)
    ShardIndex(content)
    start = HEADER.itemsize
    for field in (
        "json_offset",
        "json_length",
        "first_member",
        "members",
        "key_offset",
        "key_length",
    ):
        lying = content.copy()
        lying[start : start + SAMPLE_ROW.itemsize].view(SAMPLE_ROW)[field] = 2**32 - 1
        with pytest.raises(ValueError, match="leads out"):
            ShardIndex(lying)
    index_path(path).write_bytes(lying.tobytes())
    assert index_shard(path).samples == 1


def test_json_of_files_is_read_by_one_reader() -> None:
    """`load_json` has bounds and says file and field; these have reasons of their own (see the comments there)."""
    import ast

    root = Path(__file__).resolve().parents[3]
    found = set()
    for file in (root / "data").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if (
                isinstance(node, ast.Attribute)
                and node.attr in ("loads", "load")
                and ast.unparse(node.value) == "json"
            ):
                found.add(str(file.relative_to(root / "data")))
    assert found == {
        "shards/sample_fields.py",  # read in every epoch; its own checks refuse what is not finite
        "convert/keys.py",  # records: NaN under keys that nobody reads, as pandas writes it
        "convert/marks.py",  # what json.dumps just wrote
        "stream/quarantine.py",  # lines of its own, cut short or not
    }


@pytest.mark.parametrize(
    "bad", ["9" * 5000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + '"]"' + "}" * 50_000]
)
@pytest.mark.parametrize("form", ["lines", "array"])
def test_a_bad_record_among_good_ones_is_one_bad_record(bad: str, form: str, run: Run) -> None:
    records = ['{"text": "one"}', f'{{"text": "x", "a": {bad}}}', '{"text": "two"}']
    run.put("a.json", "\n".join(records) if form == "lines" else f"[{', '.join(records)}]")
    assert [sample.content[0].text for sample in run("jsonl", run.source)] == ["one", "two"]
    assert run.skipped == [("a.json:1", "not valid JSON")]


def test_a_long_conversation_takes_linear_time(tmp_path: Path) -> None:
    """Each turn looked through all turns before it for a call."""
    turns = [
        {"role": "user", "content": "<tool_response>x"},
        {"role": "assistant", "content": "x"},
    ] * 10_000

    def read(data: bytes) -> None:
        from visionloom.data.convert.chat_keys import RECORD
        from visionloom.data.convert.chats import Chat
        from visionloom.data.convert.source import SampleDraft

        draft = SampleDraft()
        Chat(draft.open(RECORD, {}), draft, MediaFiles((tmp_path,))).fill(json.loads(data))

    assert try_reader(read, [json.dumps(turns).encode()], ()) == 1
